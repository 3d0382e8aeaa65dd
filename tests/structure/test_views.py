"""Sizes that are written into views, as in nanoGPT: they are inferred where units left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import controlprune as cp
from controlprune.state.widths import narrow, record
from controlprune.structure import analyse
from controlprune.structure.groups import widths_of
from controlprune.structure.views import InfersSizes

from .agreement import worst


class Attention(nn.Module):
    """Sizes of heads are reckoned from the width of the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.width = heads, width

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.qkv(x).split(self.width, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class Stacked(Attention):
    """As timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.out(y.transpose(1, 2).reshape(B, N, C))


class Like(Attention):
    """The answer is viewed as the question."""

    def forward(self, x: Tensor) -> Tensor:
        B, T = x.size(0), x.size(1)
        qkv = self.qkv(x).view(B, T, 3, self.heads, -1).unbind(2)
        y = nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in qkv))
        return self.out(y.transpose(1, 2).contiguous().view_as(x))


KINDS = (Attention, Stacked, Like)


class Net(nn.Module):
    def __init__(self, kind: type[Attention] = Attention) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.first, self.second, self.norm = kind(16, 4), kind(16, 4), nn.LayerNorm(16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.first(x)
        x = x + self.second(self.norm(x))
        return self.head(x)


def net(kind: type[Attention]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(kind), torch.randint(11, (2, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_the_width_around_them_leave(kind: type[Attention]) -> None:
    model, tokens = net(kind)
    structure = analyse(model, tokens)
    assert sorted(structure.sizes) == [4, 4, 16], structure.refused
    assert worst(model, tokens, structure) < 1e-5
    assert type(model.first) is kind  # dense, the modules are as they were


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_run_ends_small_and_the_small_model_is_saved_copied_and_exported(
    kind: type[Attention], tmp_path
) -> None:
    model, tokens = net(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.3), example_inputs=(tokens,), total_steps=10
    )
    for _ in range(10):
        loss = model(tokens).square().mean()
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    controller.expand()
    masked = model.eval()(tokens)
    controller.shrink()
    torch.testing.assert_close(model(tokens), masked)
    small = controller.finalize()
    assert controller.cost()["flops"].fraction <= 0.3
    assert isinstance(small.first, InfersSizes)
    assert type(small.first).__name__ == kind.__name__
    answer = small(tokens)
    cp.save(controller, tmp_path / "small.safetensors")
    again = cp.load(tmp_path / "small.safetensors", Net(kind)).eval()
    for copied in (again, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        torch.testing.assert_close(copied(tokens), answer)
    traced: Any = torch.jit.trace(small, tokens)
    torch.testing.assert_close(traced(tokens), answer)
    torch.testing.assert_close(torch.export.export(small, (tokens,)).module()(tokens), answer)
    torch.testing.assert_close(torch.compile(small, backend="eager")(tokens), answer)


def test_detached_and_pruned_again_modules_are_what_they_were() -> None:
    model, tokens = net(Attention)
    budget = cp.Budget(flops=0.5)
    for kind in (Attention, InfersSizes):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        controller = cp.attach(model, optimizer, budget=budget, example_inputs=(tokens,), total_steps=4)
        answer = model(tokens)
        controller.detach()
        assert isinstance(model.first, kind)
        torch.testing.assert_close(model(tokens), answer)
        controller = cp.attach(model, optimizer, budget=budget, example_inputs=(tokens,), total_steps=4)
        model = controller.finalize()
        assert model(tokens).isfinite().all()


def test_the_widths_as_a_record_say_which_modules_infer() -> None:
    model, tokens = net(Attention)
    structure = analyse(model, tokens)
    widths = widths_of([torch.arange(n) < n // 2 for n in structure.sizes])
    small = Net()
    narrow(small, record(structure, widths))
    assert small(tokens).shape == (2, 5, 11)
    assert isinstance(small.second, InfersSizes)
