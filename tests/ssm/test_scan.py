"""The scan is the loop: values, gradients, gradients of gradients, every way of cutting it up."""

from __future__ import annotations

import pytest
import torch

from controlprune.ssm import scan
from controlprune.ssm.scan import linear_scan

SHAPES = [(1, 2, 3), (2, 1, 1), (5, 2, 3), (16, 3, 2), (37, 2, 3)]


def data(shape: tuple[int, ...], dtype: torch.dtype, varies: bool) -> tuple[torch.Tensor, torch.Tensor]:
    a = 0.95 * torch.rand(shape if varies else (1, *shape[1:]), dtype=torch.float64).to(dtype)
    if dtype.is_complex:
        a = a * torch.exp(6j * torch.rand(a.shape, dtype=torch.float64))
    return a.requires_grad_(), torch.randn(shape, dtype=dtype).requires_grad_()


def plain_loop(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The recurrence as it is written."""
    x = [v[0]]
    for t in range(1, len(v)):
        x.append(a[t if len(a) > 1 else 0] * x[-1] + v[t])
    return torch.stack(x)


@pytest.fixture(params=["chunked", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BUSY", 10**9 if request.param == "chunked" else 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("varies", [False, True])
def test_values_and_gradients_are_those_of_the_loop(
    shape: tuple[int, ...], dtype: torch.dtype, varies: bool
) -> None:
    a, v = data(shape, dtype, varies)
    weight = torch.randn(shape, dtype=dtype)
    found, expected = linear_scan(a, v), plain_loop(a, v)
    assert torch.allclose(found, expected)
    mine = torch.autograd.grad((found * weight).sum().abs(), (a, v))
    loop = torch.autograd.grad((expected * weight).sum().abs(), (a, v), allow_unused=True)
    for g, h in zip(mine, loop, strict=True):
        assert torch.allclose(g, torch.zeros_like(g) if h is None else h)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("varies", [False, True])
def test_second_derivatives(varies: bool) -> None:
    a, v = data((6, 2), torch.complex128, varies)
    assert torch.autograd.gradgradcheck(linear_scan, (a, v))


@pytest.mark.parametrize("varies", [False, True])
def test_the_operator_keeps_its_promises_to_torch(varies: bool) -> None:
    a, v = data((9, 2, 3), torch.complex64, varies)
    torch.library.opcheck(torch.ops.controlprune.linear_scan.default, (a, v, False))


def test_it_compiles_into_one_graph() -> None:
    a, v = data((20, 2, 3), torch.float32, varies=True)
    compiled = torch.compile(lambda a, v: linear_scan(a, v.sin()).cos(), fullgraph=True, backend="aot_eager")
    loss = compiled(a, v).sum()
    expected = plain_loop(a, v.sin()).cos().sum()
    for g, h in zip(*(torch.autograd.grad(x, (a, v)) for x in (loss, expected)), strict=True):
        assert torch.allclose(g, h, atol=1e-5)


def test_a_long_slow_recurrence_keeps_single_precision() -> None:
    a = torch.full((1, 1), 0.9999 + 0.005j).to(torch.complex64)
    v = torch.randn(5000, 1, dtype=torch.complex64)
    found = linear_scan(a / a.abs() * 0.9999, v)
    exact = plain_loop((a / a.abs() * 0.9999).to(torch.complex128), v.to(torch.complex128))
    assert (found - exact).abs().max() <= 1e-3 * exact.abs().max()
