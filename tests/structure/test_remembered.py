"""Functions under functools.lru_cache that are asked about sizes, as einops asks its own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import controlprune as cp
from controlprune.structure import analyse
from controlprune.structure.tape import remembered

from .agreement import worst


@functools.lru_cache(64)
def by_head(shape: tuple[int, ...], heads: int) -> list[int]:
    if shape[-1] % heads != 0:
        raise ValueError("heads of unequal size")
    return [*shape[:-1], heads, shape[-1] // heads]


class Attention(nn.Module):
    """Heads are told apart by a function that remembers; values and a bias per head, shared or not."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.heads, self.bias = 4, bias
        self.queries, self.keys, self.values, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        layers = self.queries, self.keys, self.values
        q, k, v = (y.reshape(by_head(y.shape, self.heads)).transpose(1, 2) for y in (f(x) for f in layers))
        scores = torch.softmax(q @ k.transpose(-1, -2) * 0.5 + self.bias, -1)
        return x + self.out((scores @ v).transpose(1, 2).reshape(*x.shape[:2], -1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 2)
        self.layers = nn.Sequential(Attention(self.bias), Attention(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.first(x)))


def test_sizes_that_went_through_a_cache_are_followed_and_stay_out_of_it() -> None:
    torch.manual_seed(0)
    by_head.cache_clear()
    model, x = Net(), torch.randn(2, 5, 3)
    model(x)  # a call of before: its answer is not one for followed sizes
    structure = analyse(model, x)
    assert {group.size for group in structure.groups} == {16, 4}, structure.refused
    assert all("way" not in refusal.reason for refusal in structure.refused)
    assert worst(model, x, structure) < 1e-5
    answer = by_head((2, 5, 16), 4)
    assert all(type(n) is int for n in answer)
    assert by_head.cache_info().maxsize == 64


def test_a_net_whose_sizes_are_remembered_meets_its_budget() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.3), example_inputs=(x,), total_steps=10)
    for _ in range(10):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    controller.finalize()
    assert controller.cost()["flops"].fraction <= 0.3
    assert model(x).isfinite().all()


def test_modules_are_read_once_and_not_at_every_pass() -> None:
    """Reading every name of every module takes 20 ms where transformers is loaded."""
    remembered._places.cache_clear()
    for _ in range(3):
        with remembered.asked_anew():
            pass
    assert remembered._places.cache_info().misses == 1
