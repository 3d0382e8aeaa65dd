"""Columns of queries and keys as units: in every head at once, read by the rows that make the keys."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from rig import bits
from torch import Tensor, nn
from torch.optim import Optimizer

import controlprune as cp
from controlprune.granularity.channels import Channels
from controlprune.granularity.parse import granularity_of
from controlprune.plant.plant import Plant
from controlprune.structure.extents import labels
from controlprune.structure.groups import Structure

WIDTH, HEADS, DIM = 8, 2, 5
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


class Around(nn.Module):
    """3 → 8, attention with a residual, 8 → 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.head = (
            nn.Linear(3, WIDTH),
            nn.Linear(HEADS * DIM, WIDTH),
            nn.Linear(WIDTH, 3),
        )
        self.heads, self.head_dim, self.scale = HEADS, DIM, 3.0

    def attended(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.out(self.attended(x).transpose(1, 2).flatten(2))).mean(1)


class Separate(Around):
    """Three projections; values have a size of their own. No bias of keys: softmax does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM, bias=n != 1) for n in range(3))

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k = (
            layer(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k)
        )
        return q, k, self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        return torch.softmax(self.scores(q, k), -1) @ v


class Fused(Around):
    """One projection, cut as `order` says; values have the size of queries and keys."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.qkv, self.order = nn.Linear(WIDTH, 3 * HEADS * DIM, bias=False), order

    def attended(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        if self.order == "3hd":
            q, k, v = y.unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        elif self.order == "h3d":
            q, k, v = y.unflatten(-1, (self.heads, 3, self.head_dim)).permute(3, 0, 2, 1, 4).unbind()
        else:
            q, k, v = (
                part.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for part in y.chunk(3, -1)
            )
        return torch.softmax(self.scores(q, k), -1) @ v


class Kernel(Separate):
    """torch's own attention, with a scale; two query heads to each of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, 2 * HEADS * DIM)
        self.out = nn.Linear(2 * HEADS * DIM, WIDTH)

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return q, k, self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attended(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.projected(x), scale=self.scale, enable_gqa=True)


class Einsum(Separate):
    """Weights of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.by_head = nn.ParameterList(torch.randn(WIDTH, HEADS, DIM) / 3 for _ in range(2))
        del self.q, self.k

    def attended(self, x: Tensor) -> Tensor:
        q, k = (torch.einsum("btc,chd->bthd", x, w) for w in self.by_head)
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        a = torch.softmax(torch.einsum("bthd,bshd->bhts", q, k) * self.scale, -1)
        return torch.einsum("bhts,bhse->bhte", a, v)


class Rotary(Separate):
    """Column i is turned with column i + D/2: a pair is a unit, of the angles too."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 2 * DIM
        self.q, self.k = (nn.Linear(WIDTH, 2 * HEADS * DIM, bias=False) for _ in range(2))
        self.angles = nn.Buffer(torch.rand(DIM))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        turned = torch.arange(q.shape[-2]).to(q)[:, None] * self.angles
        cos, sin = torch.cat([turned, turned], -1).cos(), torch.cat([turned, turned], -1).sin()
        q, k = (x * cos + half_turned(x) * sin for x in (q, k))
        return super().scores(q, k)


class Interleaved(Rotary):
    """Columns 2i and 2i + 1 are turned together, as the parts of a complex number."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        turned = torch.arange(q.shape[-2]).to(q)[:, None] * self.angles
        cos, sin = turned.cos(), turned.sin()
        pairs = ((x[..., ::2], x[..., 1::2]) for x in (q, k))
        q, k = (torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2) for a, b in pairs)
        return Separate.scores(self, q, k)


class Complex(Rotary):
    """The same in complex numbers."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        turned = torch.arange(q.shape[-2]).to(q)[:, None] * self.angles
        turn = torch.polar(torch.ones_like(turned), turned)
        pairs = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
        q, k = (torch.view_as_real(x * turn).flatten(-2) for x in pairs)
        return Separate.scores(self, q, k)


class Convolved(Fused):
    """Projected by a convolution, channels first."""

    def __init__(self) -> None:
        super().__init__("")
        self.qkv = nn.Conv1d(WIDTH, 3 * HEADS * DIM, 1, bias=False)

    def attended(self, x: Tensor) -> Tensor:
        y = self.qkv(x.transpose(1, 2))
        q, k, v = y.unflatten(1, (3, self.heads, self.head_dim)).transpose(-1, -2).unbind(1)
        return torch.softmax(self.scores(q, k), -1) @ v


def half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


NETS: dict[str, Callable[[], Around]] = {
    "separate": Separate,
    "fused 3hd": lambda: Fused("3hd"),
    "fused h3d": lambda: Fused("h3d"),
    "fused chunks": lambda: Fused("chunks"),
    "kernel": Kernel,
    "einsum": Einsum,
    "rotary": Rotary,
    "rotary, interleaved": Interleaved,
    "rotary, complex": Complex,
    "convolved": Convolved,
}


def made(net: str, seed: int = 0) -> tuple[Around, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    return NETS[net]().double(), x, x.mean(1).argmax(1)


def structure_of(model: nn.Module, x: Tensor) -> Structure:
    kind = Channels(head_dim=True)
    return kind.units(model, kind.trace(model, (x,)))


def met(structure: Structure) -> list[int]:
    return [n for n, group in enumerate(structure.groups) if group.met]


def some_off(structure: Structure, seed: int, only: list[int] | None = None) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    masks = []
    for n, size in enumerate(structure.sizes):
        mask = torch.rand(size, generator=random) < 0.6
        on, off = torch.randperm(size, generator=random)[:2]
        mask[on], mask[off] = True, False
        masks.append(mask if only is None or n in only else torch.ones(size, dtype=torch.bool))
    return masks


def train(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("net", NETS)
def test_they_are_a_group_only_where_asked_for(net: str) -> None:
    model, x, _ = made(net)
    plain, asked = cp.find_groups(model, (x,)), structure_of(model, x)
    (number,) = met(asked)
    assert asked.groups[number].size == DIM
    assert not any(group.met for group in plain)


@pytest.mark.parametrize("net", NETS)
def test_masked_is_shrunk_is_the_oracle(net: str) -> None:
    model, x, _ = made(net)
    structure = structure_of(model, x)
    for seed in range(6):
        masks = some_off(structure, seed, met(structure) if seed < 2 else None)
        truth = oracle.small_copy(model, structure, masks)(x)
        plant = Plant(copy.deepcopy(model), None, structure)
        for compact in (False, True):
            plant.apply(masks, compact=compact)
            torch.testing.assert_close(plant.model(x), truth, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(truth, model(x), atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_steps_masked_are_steps_shrunk_are_steps_of_the_oracle(net: str, optimizer: str) -> None:
    """Live weights alike after five steps, what is dormant and its state to the bit as it was."""
    found = []
    for compact in (False, True):
        model, x, y = made(net)
        stepper = OPTIMIZERS[optimizer](model.parameters())
        structure = structure_of(model, x)
        plant = Plant(model, stepper, structure)
        for _ in range(2):
            train(model, stepper, x, y)
        truth = oracle.Truth(copy.deepcopy(model), stepper, structure)
        truth.optimizer = OPTIMIZERS[optimizer](truth.model.parameters())
        truth.optimizer.load_state_dict(copy.deepcopy(stepper.state_dict()))
        masks = some_off(structure, 1)
        small, small_stepper = truth.cut(masks)
        plant.apply(masks, compact=compact)
        for _ in range(5):
            train(model, stepper, x, y)
            train(small, small_stepper, x, y)
        truth.absorb(small, small_stepper, masks)
        plant.release()
        found.append(bits(model, stepper))
        expected = bits(truth.model, truth.optimizer)
        for key, value in expected.items():
            if isinstance(value, Tensor) and not key.startswith("grad"):
                torch.testing.assert_close(found[-1][key], value, rtol=1e-7, atol=1e-9, msg=key)
    assert found[0].keys() == found[1].keys()


@pytest.mark.parametrize("net", NETS)
def test_gate_gradients_are_finite_differences(net: str) -> None:
    """∂L/∂g of a gate on column i of every key, those that are off included."""
    model, x, y = made(net)
    structure = structure_of(model, x)
    plant = Plant(model, torch.optim.SGD(model.parameters(), lr=0.1), structure)
    masks = some_off(structure, 3, met(structure))
    (number,) = met(structure)
    plant.apply(masks, compact=False)
    F.cross_entropy(model(x), y).backward()
    start = sum(structure.sizes[:number])
    found = plant.gate_gradient()[start : start + DIM]
    plant.release()
    for unit in range(DIM):
        sides = []
        for step in (1e-6, -1e-6):
            other = copy.deepcopy(model)
            gate = masks[number].double()
            gate[unit] += step
            gate_readers(other, structure, number, gate)
            sides.append(F.cross_entropy(other(x), y).item())
        torch.testing.assert_close(
            found[unit].double(), torch.tensor((sides[0] - sides[1]) / 2e-6).double(), rtol=1e-4, atol=1e-7
        )


def gate_readers(model: nn.Module, structure: Structure, number: int, gate: Tensor) -> None:
    tensors = dict(model.named_parameters())
    for part in structure.groups[number].readers:
        which = labels(part.extent, number)
        factor = torch.where(which < 0, 1.0, gate[which.clamp(min=0)])
        with torch.no_grad():
            tensors[part.tensor].mul_(
                factor.view([-1 if d == part.dim else 1 for d in range(tensors[part.tensor].dim())])
            )


# --- what is refused, and why ----------------------------------------------------------------------------


class Default(Separate):
    def attended(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.projected(x))


class AsItRuns(Separate):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) * self.head_dim**-0.5


class Root(Separate):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)


class Tensors(Separate):
    """Scores are nearly nought: that they have another scale shows in no output."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.q.weight, std=1e-6)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) / torch.sqrt(torch.tensor(q.shape[-1], dtype=q.dtype))


class Activated(Separate):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(F.softplus(q), F.softplus(k))


class KeysAreValues(Separate):
    """One projection for both: its rows do not read the scores alone."""

    def attended(self, x: Tensor) -> Tensor:
        q, k, _ = self.projected(x)
        return torch.softmax(self.scores(q, k), -1) @ k


class QueriesAreKeys(Separate):
    def attended(self, x: Tensor) -> Tensor:
        q, _, v = self.projected(x)
        return torch.softmax(self.scores(q, q), -1) @ v


class Torchs(Around):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.out = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def attended(self, x: Tensor) -> Tensor:
        return self.own(x, x, x)[0].unsqueeze(1)


REFUSED: dict[type[Around], str] = {
    Default: "the scale of attention follows from its size where none is given",
    AsItRuns: r"computes with its size as it runs .*test_head_dim.py:\d+: return q @ .* self.head_dim",
    Root: r"computes with its size as it runs .*test_head_dim.py:\d+: return q @ .* math.sqrt\(self.head_dim",
    Tensors: r"computes with its size as it runs .*test_head_dim.py:\d+: .*torch.tensor\(q.shape",
    Activated: "two activations are multiplied and summed over it",
    KeysAreValues: "is used for more than this product",
    QueriesAreKeys: "is used for more than this product",
    Torchs: "the scale of attention follows from its size where none is given",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_shown_is_refused_with_its_reason(kind: type[Around]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(6, 4, 3, dtype=torch.float64)
    structure = structure_of(model, x)
    assert not met(structure)
    told = [refusal.reason for refusal in structure.refused]
    assert any(re.search(REFUSED[kind], reason) for reason in told), told


# --- a run -----------------------------------------------------------------------------------------------


def test_a_run_ends_small_and_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Fused("3hd"), torch.randn(6, 4, 3)
    dense, y = copy.deepcopy(model), x.mean(1).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.5),
        example_inputs=(x,),
        total_steps=40,
        granularity="channel+head_dim",
    )
    (unit,) = (group for group in controller.groups if group.met)
    for _ in range(40):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert controller.cost()["flops"].fraction <= 0.5
    off = torch.tensor([True, False, True, True, False])
    controller.set_masks({unit.name: off})
    controller.shrink()
    expected = model(x)
    assert model.head_dim == 3
    cp.save(controller, tmp_path / "small.safetensors")
    torch.testing.assert_close(cp.load(tmp_path / "small.safetensors", copy.deepcopy(dense))(x), expected)
    small = controller.finalize()
    torch.testing.assert_close(small(x), expected)
    assert small.qkv.out_features == 3 * small.heads * 3


def test_it_is_one_granularity_of_several(tmp_path: Path) -> None:
    """The groups of a module that is named; the whole of it goes to no process that holds a part."""
    model, x, _ = made("separate")
    named = {"": "weight", "q": "channel+head_dim", "k": "channel+head_dim"}
    kind = granularity_of(named)
    groups = kind.units(model, kind.trace(model, (x,))).groups
    assert [group.size for group in groups if group.met] == [DIM]
    assert {part.tensor for group in groups if group.met for part in group.slices} == {
        "q.weight",
        "q.bias",
        "k.weight",
    }
