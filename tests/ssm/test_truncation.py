"""Cuts in training: when, how many, and back again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from controlprune import ssm
from controlprune.ssm import LRU, Bidirectional, Truncation


class Net(nn.Module):
    def __init__(self, states: int = 24) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.first = LRU(2, states, radius=(0.5, 0.95))
        self.both = Bidirectional(LRU(2, states, radius=(0.5, 0.95)), LRU(2, 10, radius=(0.5, 0.95)))
        self.head = nn.Linear(2, 1)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        u = self.norm(u.flatten(0, 1)).view_as(u)
        return self.head(self.both(torch.tanh(self.first(u))))[..., 0]


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    u = torch.randn(4, 16, 2)
    loss = (net(u) - u[..., 0].roll(1, 1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def made(**options) -> tuple[Net, torch.optim.Optimizer, Truncation]:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    return net, optimizer, Truncation(net, optimizer, **options)


def test_every_layer_is_cut_early_by_its_own_values() -> None:
    net, optimizer, truncation = made(total_steps=120, tolerance=0.1, window=0.25, cuts=3)
    assert list(truncation.layers) == ["first", "both.ahead", "both.back"]
    losses, at = [], []
    for now in range(1, 121):
        losses.append(step(net, optimizer))
        if truncation.step():
            at.append(now)
    assert set(at) <= {10, 20, 30}
    assert [record.step for record in truncation.history] == [10, 20, 30]
    assert truncation.states["first"] < 24
    assert truncation.states["both.back"] <= 10
    for record in truncation.history:
        for cut in record.cuts:
            assert cut.bound <= 2 * 0.1 * cut.values.sum() * (1 + 1e-6) + 0.01
            assert (record.values[cut.layer] == cut.values).all()
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_an_asked_number_of_states_is_reached_at_the_end_of_the_window() -> None:
    net, optimizer, truncation = made(
        total_steps=100, tolerance=0, states={"first": 6, "both.ahead": 3}, window=0.2, cuts=3
    )
    seen = []
    for _ in range(25):
        step(net, optimizer)
        truncation.step()
        seen.append(net.first.states)
    assert truncation.states == {"first": 6, "both.ahead": 3, "both.back": 1}
    assert [seen[6], seen[12], seen[19]] == [15, 9, 6]
    assert net.first.states == 6


def test_a_cut_that_hurts_is_rolled_back_with_all_buffers_and_moments() -> None:
    net, optimizer, truncation = made(total_steps=40, tolerance=0, states=1, window=0.5, cuts=1, allowed=0.1)
    assert not truncation.validated(0.9)
    for _ in range(19):
        step(net, optimizer)
        truncation.step()
    step(net, optimizer)
    then = {k: v.clone() for k, v in net.state_dict().items()}
    moments = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in net.named_parameters()}
    assert truncation.step()
    for _ in range(3):
        step(net, optimizer)
        truncation.step()
    assert net.first.states == 1
    assert truncation.validated(0.5)
    assert truncation.history[-1].rolled_back
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, then[name]), name
    for name, parameter in net.named_parameters():
        for key, value in moments[name].items():
            assert torch.equal(optimizer.state[parameter][key], value), (name, key)
    for _ in range(30):
        step(net, optimizer)
        assert truncation.step() == ()
    assert net.first.states == 24


def test_a_cut_that_does_not_hurt_stays() -> None:
    net, optimizer, truncation = made(total_steps=20, tolerance=0, states=5, window=0.5, cuts=2, allowed=0.1)
    truncation.validated(0.9)
    for _ in range(10):
        step(net, optimizer)
        truncation.step()
    assert not truncation.validated(0.85)
    assert net.first.states == 5


def test_a_cut_that_would_save_little_waits() -> None:
    net, _, truncation = made(total_steps=100, tolerance=1e-9)
    assert truncation.cut() == ()
    assert net.first.states == 24


def test_training_goes_on_where_values_do_not_exist() -> None:
    net, optimizer, truncation = made(total_steps=10, window=1.0, cuts=5)
    with torch.no_grad():
        net.first.B[0] = torch.nan
    assert truncation.step() == ()
    with pytest.warns(UserWarning, match="the training goes on: A, B, C: not finite"):
        truncation.step()
    for _ in range(8):
        step(net, optimizer)
        assert truncation.step() == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 1.0}, r"tolerance=1.0: give a share"),
        ({"window": 0.0}, r"window=0.0: give a share"),
        ({"cuts": 11}, r"cuts=11: give 1 to 10"),
        ({"states": {"second": 3}}, r"no state-space layer is called 'second'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(total_steps=100, **options)


def test_a_model_without_state_space_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer of it gives system"):
        Truncation(nn.Linear(2, 2), None, total_steps=100)


def test_a_snapshot_brings_back_shapes() -> None:
    layer = LRU(2, 12)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    saved = ssm.Snapshot(layer, None)
    ssm.truncate(layer, 4)
    saved.restore()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert math.isclose(layer.states, 12)
