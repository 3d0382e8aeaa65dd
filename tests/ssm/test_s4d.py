"""S4D: the convolution is the recurrence, and it is truncated filter by filter."""

from __future__ import annotations

import pytest
import torch
from systems import gain, response, sweep

from controlprune.ssm import S4D, truncate


def test_the_convolution_is_the_recurrence() -> None:
    layer = S4D(3, 8).double()
    u = torch.randn(2, 40, 3, dtype=torch.float64)
    x, out = None, []
    for t in range(40):
        y, x = layer.step(u[:, t], x)
        out.append(y)
    assert torch.allclose(torch.stack(out, 1), layer(u))


def test_its_system_is_what_it_computes_and_gives_its_parameters_back() -> None:
    layer = S4D(2, 5, step=(0.01, 0.02)).double()
    A, B, C = layer.system()
    impulse = torch.zeros(1, 30, 2, dtype=torch.float64)
    impulse[:, 0] = 1
    powers = A[..., None] ** torch.arange(30)
    expected = torch.einsum("hn,hnt->th", C[:, 0] * B[..., 0], powers).real
    expected[0] += layer.D
    assert torch.allclose(layer(impulse)[0], expected)
    for name, tensor in layer.parameters_for(A, B, C).items():
        assert torch.allclose(tensor, layer.get_parameter(name)), name


@pytest.mark.parametrize("states", [2, 7])
def test_truncation_stays_inside_the_bound_in_every_feature(states: int) -> None:
    layer = S4D(4, 16)
    optimizer = torch.optim.Adam(layer.parameters())
    u = torch.randn(2, 50, 4)
    layer(u).square().mean().backward()
    optimizer.step()
    before = [x.detach().cdouble().numpy() for x in layer.system()]
    cut = truncate(layer, states, optimizer)
    after = [x.detach().cdouble().numpy() for x in layer.system()]
    assert (layer.states, cut.reset) == (states, ())
    for old, new in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        z = sweep(old, new)
        assert gain(response(*old, z, real=True) - response(*new, z, real=True)) <= cut.bound * 1.01 + 1e-3
    layer(u).square().mean().backward()
    optimizer.step()
