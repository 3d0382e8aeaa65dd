"""The LRU layer against its recurrence written out; its parameters and its system are one to one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from controlprune.ssm import LRU, Bidirectional, StateSpace, hankel_singular_values


def loop(layer: LRU, u: torch.Tensor) -> torch.Tensor:
    poles, B, C = layer.system()
    x = torch.zeros(len(u), layer.states, dtype=B.dtype)
    out = []
    for t in range(u.shape[1]):
        x = poles * x + u[:, t].to(B.dtype) @ B.T
        out.append((x @ C.T).real + layer.D * u[:, t])
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("batch", "length", "features", "states"), [(1, 1, 1, 1), (3, 50, 4, 7), (2, 300, 8, 64)]
)
def test_it_is_the_recurrence_and_so_are_its_gradients(
    batch: int, length: int, features: int, states: int
) -> None:
    layer = LRU(features, states).double()
    u = torch.randn(batch, length, features, dtype=torch.float64)
    weight = torch.randn_like(u)
    found, expected = layer(u), loop(layer, u)
    assert torch.allclose(found, expected)
    for mine, plain in zip(
        torch.autograd.grad((found * weight).sum(), list(layer.parameters())),
        torch.autograd.grad((expected * weight).sum(), list(layer.parameters())),
        strict=True,
    ):
        assert torch.allclose(mine, plain)


def test_steps_one_by_one_give_the_sequence() -> None:
    layer = LRU(3, 9)
    u = torch.randn(2, 20, 3)
    x, out = None, []
    for t in range(20):
        y, x = layer.step(u[:, t], x)
        out.append(y)
    assert torch.allclose(torch.stack(out, 1), layer(u), atol=1e-5)


def test_parameters_and_system_are_one_to_one() -> None:
    layer = LRU(3, 9).double()
    again = layer.parameters_for(*layer.system())
    for name, tensor in again.items():
        if name == "theta":
            turns = (tensor - layer.theta) / (2 * math.pi)
            assert torch.allclose(turns, turns.round(), atol=1e-9)
        else:
            assert torch.allclose(tensor, layer.get_parameter(name)), name


def test_every_pole_has_parameters_also_positive_real_ones_and_zero() -> None:
    layer = LRU(1, 4)
    A = torch.tensor([0.0, 0.5, 0.99999, -0.7]).to(torch.complex64)
    B, C = torch.ones(4, 1, dtype=torch.complex64), torch.ones(1, 4, dtype=torch.complex64)
    with torch.no_grad():
        for name, tensor in layer.parameters_for(A, B, C).items():
            assert tensor.isfinite().all(), name
            layer.get_parameter(name).copy_(tensor)
        poles, entry, _ = layer.system()
    assert torch.allclose(poles, A, atol=1e-6)
    assert torch.allclose(entry, B, rtol=1e-2)


def test_states_have_unit_variance_for_white_input() -> None:
    layer = LRU(4, 64, radius=(0.5, 0.99))
    poles, B, C = layer.system()
    assert hankel_singular_values(poles, B, C).isfinite().all()
    power = (B.abs() ** 2).sum(1) / (1 - poles.abs() ** 2)
    assert power.mean().item() == pytest.approx(1, abs=0.2)
    assert poles.abs().min() > 0.5
    assert poles.abs().max() < 0.99


def test_poles_stay_inside_the_circle_whatever_the_optimizer_does() -> None:
    layer = LRU(2, 8)
    with torch.no_grad():
        layer.nu.copy_(torch.linspace(-12, 8, 8))
    assert (layer.system()[0].abs() < 1).all()
    assert layer(torch.randn(1, 30, 2)).isfinite().all()


def test_bidirectional_reads_from_both_ends() -> None:
    model = Bidirectional(LRU(2, 3), LRU(2, 5))
    u = torch.randn(1, 12, 2)
    later = u.clone()
    later[:, -1] += 1
    assert not torch.allclose(model(u)[:, 0], model(later)[:, 0])
    assert torch.allclose(model(u), model.ahead(u) + model.back(u.flip(1)).flip(1))


def test_it_follows_the_protocol_and_a_linear_layer_does_not() -> None:
    assert isinstance(LRU(2, 3), StateSpace)
    assert not isinstance(nn.Linear(2, 3), StateSpace)


def test_it_compiles_without_a_graph_break() -> None:
    layer = LRU(3, 5)
    u = torch.randn(2, 10, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(u), layer(u), atol=1e-5)


def test_a_radius_that_is_not_stable_is_refused() -> None:
    with pytest.raises(ValueError, match=r"radius=\(0.9, 1.0\)"):
        LRU(2, 3, radius=(0.9, 1.0))
