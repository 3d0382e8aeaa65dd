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
from controlprune.structure.views import InfersSizes, inferring

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


class Deep(nn.Module):
    """Attention of two classes in turn."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList((Stacked, Attention)[k % 2](16, 4) for k in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
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


def test_views_are_seen_to_first_and_cost_few_passes() -> None:
    torch.manual_seed(0)
    model, tokens = Deep(6), torch.randint(11, (2, 5))
    structure = analyse(model, tokens)
    assert sorted(structure.sizes) == [4] * 6 + [16], structure.refused
    assert set(structure.views) == {f"blocks.{k}" for k in range(6)}
    assert structure.forwards <= 30  # three traces of 2, a pass that fails in each class, and the check
    assert worst(model, tokens, structure) < 1e-5


class Fixed(nn.Module):
    """A size that is written twice: in a view, where it can be inferred, and where it can't."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.wide, self.leave = nn.Linear(5, 12), nn.Linear(5, 32), nn.Linear(32, 2)
        self.mix = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).view(len(x), 12) + torch.zeros(len(x), 12)
        return self.leave(self.wide(x).relu()) + self.mix(h)


class Rescaled(Attention):
    """The scale follows from the width too, as in torchvision's Swin: it would be another."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.qkv(x).split(self.width, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
        q = q * (C // self.heads) ** -0.5
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def test_what_is_asked_of_sizes_is_heard_where_views_infer_theirs() -> None:
    model, tokens = net(Rescaled)
    with torch.no_grad():
        for block in (model.first, model.second):
            block.qkv.weight.mul_(1e-3)  # so that no number tells one scale from another
    structure = analyse(model, tokens)
    with inferring(model, ["first", "second"]):
        asked = analyse(model, tokens, check=False).guards
    assert any("** -0.5" in guard.line for guard in asked if guard.operator == "value")
    assert 16 not in structure.sizes
    assert worst(model, tokens, structure) < 1e-5


def test_where_inferring_does_not_help_the_rest_is_found_without() -> None:
    torch.manual_seed(0)
    model, x = Fixed(), torch.randn(3, 5)
    structure = analyse(model, x)
    assert structure.sizes == (32,)
    assert not structure.views
    assert worst(model, x, structure) < 1e-5


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
