"""The numeric check: corners are drawn, rounding is no error, few forward passes find who is guilty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from controlprune.structure import analyse

BUDGET = 20  # forward passes of attach, where nothing has to be refused


class Guarded(nn.Module):
    """The code asks for the width; the answer is another at some widths."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.out = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.kind == "parity" and h.shape[1] % 2 == 0:
            h = h * 2
        if self.kind == "squeeze":
            h = h.squeeze()
            h = h if h.dim() == 2 else h.unsqueeze(0)
        if self.kind == "thirds":
            h = h.reshape(-1, 3).cumsum(0).reshape(len(x), -1)
        if self.kind == "threshold" and h.shape[1] < 3:
            h = -h
        return self.out(self.second(h).tanh())


@pytest.mark.parametrize("kind", ["parity", "squeeze", "thirds", "threshold"])
def test_code_that_branches_on_a_width_keeps_it(kind: str) -> None:
    torch.manual_seed(0)
    structure = analyse(Guarded(kind), torch.randn(4, 5))
    assert [group.name for group in structure.groups] == ["second"]


class Loud(nn.Module):
    """The rest of a sum that cancels: in float32, outputs differ by rounding."""

    def __init__(self, doubles: bool) -> None:
        super().__init__()
        self.doubles = doubles
        self.first, self.second, self.out = nn.Linear(5, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.doubles else x.float()  # then weights of float64 don't fit
        h = self.second(self.first(x).relu())
        return self.out(h * 1e3) - self.out(h * 1e3 + (5e-2 if self.doubles else 0.5))


@pytest.mark.parametrize("doubles", [True, False])
def test_rounding_is_no_error(doubles: bool) -> None:
    torch.manual_seed(0)
    model = Loud(doubles)
    structure = analyse(model, torch.randn(4, 5))
    assert structure.sizes == (64, 64)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(h) * (1 + 1e-3 * h.shape[-1])


def test_a_small_error_is_still_seen() -> None:
    torch.manual_seed(0)
    assert not analyse(Scaled(), torch.randn(4, 5)).groups


class Deep(nn.Module):
    """Many layers, one of which has its width written down."""

    def __init__(self, layers: int, bad: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12 + i, 13 + i) for i in range(layers))
        self.bad = Written() if bad else nn.Identity()
        self.out = nn.Linear(12 + layers, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.out(self.bad(x))


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(28, 28)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).view(-1, 4, 7).flatten(1)


SEEN = [0]  # forward passes; a global, as what hangs on the model is put back


def forwards(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """(as counted by the model, as the structure says)."""
    SEEN[0] = 0

    def count(module: nn.Module, inputs: object) -> None:
        SEEN[0] += 1

    handle = model.register_forward_pre_hook(count)
    structure = analyse(model, (x,))
    handle.remove()
    return SEEN[0], structure.forwards


def test_where_all_is_well_twenty_forward_passes_do() -> None:
    torch.manual_seed(0)
    seen, told = forwards(Deep(16, 0), torch.randn(3, 12))
    assert seen == told <= BUDGET + 6  # a model this cheap has four sizes to meet at, not one


def test_the_guilty_one_is_found_by_where_the_error_was_raised() -> None:
    torch.manual_seed(0)
    model, x = Deep(16, 1), torch.randn(3, 12)
    structure = analyse(model, x)
    assert len(structure.groups) == 16
    (refusal,) = [r for r in structure.refused if r.name == "bad.map"]
    assert "test_verify.py" in refusal.reason
    assert "return self.map(x).view(-1, 4, 7).flatten(1)" in refusal.reason
    assert "write -1 for the size that shrinks" in refusal.reason
    seen, told = forwards(model, x)
    assert seen == told <= 50
