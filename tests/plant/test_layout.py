"""Index arithmetic of shrinking: exact both ways, memory format kept, stale accumulators reset."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from controlprune.plant.layout import fill_zero_, put_, restore_, select, set_data
from controlprune.plant.optimizer import factored, travelling, travelling_dims

LIVE = {0: torch.tensor([1, 3]), 1: torch.tensor([0, 2, 4]), 3: torch.tensor([2])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_put_after_select_is_the_identity(dtype: torch.dtype) -> None:
    full = torch.randn(4, 5, 2, 3).to(dtype) if dtype != torch.bool else torch.randn(4, 5, 2, 3) > 0
    part = select(full, LIVE)
    by_hand = full[LIVE[0]][:, LIVE[1]][..., LIVE[3]]
    assert torch.equal(part, by_hand)
    assert torch.equal(put_(full.clone(), LIVE, part), full)
    other = torch.zeros_like(full)
    put_(other, LIVE, part)
    assert torch.equal(select(other, LIVE), part)
    assert torch.count_nonzero(other) == torch.count_nonzero(part)


def test_restore_brings_back_exactly_the_dormant_entries() -> None:
    home, live = torch.randn(4, 5), torch.randn(4, 5)
    dormant = {0: torch.tensor([0]), 1: torch.tensor([2, 3])}
    dead = torch.zeros(4, 5, dtype=torch.bool)
    dead[0], dead[:, 2:4] = True, True
    assert torch.equal(restore_(live.clone(), home, dormant), torch.where(dead, home, live))
    assert torch.equal(fill_zero_(live.clone(), dormant), live.masked_fill(dead, 0))


def test_memory_formats_survive() -> None:
    image = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
    volume = torch.randn(6, 5, 2, 3, 3).to(memory_format=torch.channels_last_3d)
    matrix = torch.randn(6, 5).t()
    live = {0: torch.tensor([0, 2]), 1: torch.tensor([1, 3, 4])}
    assert select(image, live).is_contiguous(memory_format=torch.channels_last)
    assert select(volume, live).is_contiguous(memory_format=torch.channels_last_3d)
    assert select(matrix, live).t().is_contiguous()
    assert select(torch.randn(6, 5, 3, 3), live).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_a_new_shape_while_the_last_graph_is_alive(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(4, 3, dtype=dtype))
    alive = []
    for rows in (4, 2, 3):
        weight.grad = None
        set_data(weight, torch.randn(rows, 3, dtype=dtype))
        loss = (weight @ torch.randn(3, dtype=dtype)).abs().sum()
        loss.backward()
        alive.append(loss)  # keeps the graph and its gradient accumulator
        assert weight.grad is not None
        assert weight.grad.shape == (rows, 3)
        assert weight.dtype == dtype


def test_the_trap_is_real() -> None:
    """Why `set_data` takes a detour: the plain assignment fails with the old graph alive."""
    weight = nn.Parameter(torch.randn(4, 3))
    loss = weight.sum()
    loss.backward()
    weight.grad = None
    weight.data = torch.randn(2, 3)
    with pytest.raises(RuntimeError):
        weight.sum().backward()
    del loss


def test_what_travels_with_a_parameter() -> None:
    p = nn.Parameter(torch.randn(4, 3))
    assert travelling_dims(torch.zeros(4, 3), p, "s") == (0, 1)
    assert travelling_dims(torch.zeros(4, 1), p, "s") == (0,)
    assert travelling_dims(torch.zeros(1, 3), p, "s") == (1,)
    assert travelling_dims(torch.zeros(()), p, "s") == ()
    assert travelling_dims(torch.zeros(1), p, "s") == ()
    with pytest.raises(ValueError, match=r"s has shape \(12,\).*\(4, 3\)"):
        travelling_dims(torch.zeros(12), p, "s")
    with pytest.raises(ValueError, match=r"s has shape \(3, 4\)"):
        travelling_dims(torch.zeros(3, 4), p, "s")


def test_state_that_nobody_can_carry_is_named() -> None:
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    assert travelling(optimizer, p, "w", frozenset()) == {}
    assert p not in optimizer.state  # looking did not create an entry
    optimizer.state[p]["history"] = [torch.zeros(4, 3)]
    with pytest.raises(ValueError, match="SGD state 'history' of parameter 'w'"):
        travelling(optimizer, p, "w", frozenset())
    optimizer.state[p] = {"momentum_buffer": None, "count": 3, "step": torch.tensor(2.0)}
    assert travelling(optimizer, p, "w", frozenset()) == {}


def test_a_lone_unit_is_told_by_the_other_parameters() -> None:
    """Adafactor's column means of a (1, 4) parameter have its very shape; those of a (3, 4) one do not."""
    lone, other = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.Adafactor([lone, other])
    (lone.sum() + other.sum()).backward()
    optimizer.step()
    summed = factored(optimizer)
    assert summed == {("row_var", 2, 1), ("col_var", 2, 0)}
    assert travelling(optimizer, lone, "w", summed) == {"row_var": (0,), "col_var": (1,)}


def test_torch_s_adafactor_is_known_without_company() -> None:
    lone = nn.Parameter(torch.randn(3, 1))
    optimizer = torch.optim.Adafactor([lone])
    lone.sum().backward()
    optimizer.step()
    assert travelling(optimizer, lone, "w", factored(optimizer)) == {"row_var": (0,), "col_var": (1,)}
