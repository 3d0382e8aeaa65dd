"""Sizes that go to torch's C++ code where no mode hears of the call: torch.Tensor(n, m), torch.vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from controlprune.structure import Structure, analyse

from .agreement import worst


class Between(nn.Module):
    """Something happens to the hidden layer."""

    def __init__(self, happens: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.out, self.happens = nn.Linear(5, 8), nn.Linear(8, 2), happens

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.happens(self.first(x)))


def analysed(happens: Callable[[Tensor], Tensor]) -> tuple[Between, Tensor, Structure]:
    torch.manual_seed(0)
    model, x = Between(happens), torch.randn(4, 5)
    structure = analyse(model, x)
    assert worst(model, x, structure) < 1e-5
    return model, x, structure


def test_torchs_old_constructor_is_refused_with_what_to_write() -> None:
    for kind in (torch.Tensor, torch.FloatTensor):
        _, _, structure = analysed(lambda h, kind=kind: h + kind(h.shape[0], h.shape[1]).zero_())
        (reason,) = [r.reason for r in structure.refused if r.name == "first"]
        assert "test_unheard_sizes.py" in reason
        assert reason.endswith("; to prune it, write torch.empty(n, m) for torch.Tensor(n, m))")


MAPPED = {
    "as_it_is": lambda h: torch.vmap(torch.tanh)(h),
    "view": lambda h: torch.vmap(lambda row: row.view(row.shape[0]))(h),
    "new": lambda h: torch.vmap(lambda row: row + torch.zeros(row.shape[-1]))(h),
    "over_rows": lambda h: torch.vmap(lambda column: column * column.shape[0], in_dims=1, out_dims=1)(h),
    "in_chunks": lambda h: torch.vmap(torch.tanh, chunk_size=2)(h),
    "twice": lambda h: torch.vmap(torch.vmap(torch.tanh))(h),
    "over_a_count": lambda h: torch.vmap(lambda n: h[:, n].mean())(torch.arange(h.shape[1])) + h,
}


@pytest.mark.parametrize("name", MAPPED)
def test_what_is_mapped_over_a_traced_size_is_pruned(name: str) -> None:
    _, _, structure = analysed(MAPPED[name])
    assert structure.names == ("first",), structure.refused


MATTERS = {
    "times_its_size": lambda h: torch.vmap(lambda row: row * row.shape[0])(h),
    "asked_inside": lambda h: torch.vmap(lambda row: 2 * row if row.shape[0] % 2 == 0 else row + 1)(h),
    "asked_deeper": lambda h: torch.vmap(torch.vmap(lambda r: -r if len(r) > 4 else r))(h[None])[0],
}


@pytest.mark.parametrize("name", MATTERS)
def test_a_size_that_matters_inside_is_refused_and_nothing_raises(name: str) -> None:
    _, _, structure = analysed(MATTERS[name])
    assert "first" not in structure.names
    assert any(r.name == "first" and r.reason for r in structure.refused)


def test_a_function_whose_gradient_is_taken_in_the_forward_keeps_its_size() -> None:
    _, _, structure = analysed(lambda h: torch.func.grad(lambda v: v.square().sum() * v.shape[-1])(h))
    assert "first" not in structure.names
