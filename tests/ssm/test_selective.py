"""The input-dependent layer: its recurrence, its statistics, its cut."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import softplus

from controlprune.ssm import Selective, StateSpace, Truncation, states_kept_by, truncate, values_of


def loop(layer: Selective, u: torch.Tensor) -> torch.Tensor:
    x = u.new_zeros(len(u), *layer.rate.shape)
    out = []
    for now in u.unbind(1):
        step = softplus(layer.step(now))
        driven = (step * now)[..., None] * layer.B(now)[:, None]
        x = torch.exp(-step[..., None] * layer.rate.exp()) * x + driven
        out.append((x * layer.C(now)[:, None]).sum(-1) + layer.D * now)
    return torch.stack(out, 1)


def test_it_is_its_recurrence_and_so_are_its_gradients() -> None:
    layer = Selective(3, 5, step=(0.1, 0.5)).double()
    u = torch.randn(2, 25, 3, dtype=torch.float64)
    found, expected = layer(u), loop(layer, u)
    assert torch.allclose(found, expected)
    mine = torch.autograd.grad(found.square().sum(), list(layer.parameters()))
    plain = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(mine, plain, strict=True))


def test_scores_come_from_passes_in_training_mode() -> None:
    layer = Selective(3, 5).eval()
    layer(torch.randn(2, 10, 3))
    assert values_of(layer).sum() == 0
    layer.train()(torch.randn(2, 10, 3))
    assert (values_of(layer) > 0).all()


def test_states_that_are_not_read_go_first_and_nothing_changes() -> None:
    layer = Selective(3, 6)
    with torch.no_grad():
        layer.C.weight[[0, 3]] = 0
    optimizer = torch.optim.Adam(layer.parameters())
    u = torch.randn(2, 20, 3)
    layer(u).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        layer.C.weight[[0, 3]] = 0
        layer.excited.zero_(), layer.read.zero_()
    before = layer(u)
    kept = [1, 2, 4, 5]
    moments = optimizer.state[layer.rate]["exp_avg_sq"][:, kept].clone()
    assert states_kept_by(layer, 1e-6) == 4
    cut = truncate(layer, 4, optimizer)
    assert (cut.before, cut.after, layer.states) == (6, 4, 4)
    assert math.isnan(cut.bound), "no bound is claimed"
    assert torch.allclose(layer(u), before, atol=1e-6)
    assert torch.equal(optimizer.state[layer.rate]["exp_avg_sq"], moments)
    layer(u).square().mean().backward()
    optimizer.step()


def test_it_is_cut_in_training_beside_others() -> None:
    layer = Selective(3, 8)
    optimizer = torch.optim.Adam(layer.parameters())
    truncation = Truncation(layer, optimizer, total_steps=20, tolerance=0, states=3, window=0.5, cuts=2)
    for _ in range(20):
        layer(torch.randn(2, 10, 3)).square().mean().backward()
        optimizer.step()
        truncation.step()
        optimizer.zero_grad()
    assert layer.states == 3
    assert not isinstance(layer, StateSpace), "it has no A, B, C to give"
