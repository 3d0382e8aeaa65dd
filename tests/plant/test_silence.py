"""Zeros by bits: those of `index_fill`, for every kind of number, whatever stands there."""

from __future__ import annotations

import pytest
import torch

from controlprune.plant.silence import Silence

KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
SILENT = [{0: torch.tensor([1, 3])}, {1: torch.tensor([0])}, {0: torch.tensor([0]), 2: torch.tensor([1, 2])}]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("silent", SILENT)
@pytest.mark.parametrize("layout", ["plain", "transposed", "channels last", "expanded"])
def test_zeros_where_index_fill_puts_them(
    dtype: torch.dtype, silent: dict[int, torch.Tensor], layout: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 2, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    if layout == "transposed":
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "expanded":
        x = x[:, :1].expand(-1, 3, -1, -1)
    else:
        x[1, 0, 1, 0], x[0, 0, 2, 1], x[3, 2, 1, 1] = float("nan"), float("inf"), -float("inf")
    expected = x
    for dim, index in silent.items():
        expected = expected.index_fill(dim, index, 0)
    silence = Silence(silent)
    found = silence.filled(x)
    assert found.dtype == dtype
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    if layout != "expanded":
        assert silence.fill_(x) is x
        assert torch.equal(x.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_other_numbers_in_mid_run() -> None:
    """A model goes to another number type: the same positions, as many bits."""
    silence = Silence({0: torch.tensor([1])})
    for dtype in KINDS:
        assert silence.fill_(torch.ones(3, 2, dtype=dtype)).abs().sum(1).tolist() == [2.0, 0.0, 2.0]


def test_it_is_differentiated_through() -> None:
    silence = Silence({0: torch.tensor([1])})
    x = torch.ones(3, requires_grad=True)
    (silence.filled(x) ** 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 0.0, 2.0]
