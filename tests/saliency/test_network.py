"""The gate controller: the plain score until it has learned, then what lowers the relaxed trade-off."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from controlprune.saliency.network import OPTIMISM, GateController, Statistics, features, first_guess

UNITS = 60


def statistics(seed: int = 0, on: Tensor | None = None, units: int = UNITS) -> Statistics:
    """Made-up statistics of two groups, values spread over two decades."""
    g = torch.Generator().manual_seed(seed)

    def spread() -> Tensor:
        return torch.exp(1.2 * torch.randn(units, generator=g))

    return Statistics(
        mean=1e-4 * torch.randn(units, generator=g),
        curvature=1e-3 * spread(),
        weight=spread(),
        movement=torch.randn(units, generator=g),
        seen=torch.full((units,), 100.0),
        cost=torch.full((units,), 0.01),
        age=torch.ones(units),
        on=torch.ones(units, dtype=torch.bool) if on is None else on,
        group=(torch.arange(units) >= units // 3).long(),
        loss_slope=0.0,
        progress=0.5,
    )


def test_a_group_may_be_larger_than_torch_takes_a_quantile_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 4096 x 11008 single weights is; the last unit is off and was never seen."""
    few = statistics(on=torch.arange(UNITS) < UNITS - 1)
    few = replace(few, seen=few.seen * few.on)
    whole = first_guess(few)[-1]
    monkeypatch.setattr("controlprune.saliency.network.MOST", 16)
    assert float(first_guess(few)[-1]) == pytest.approx(float(whole), rel=0.5)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(torch.zeros(2**24 + 1), 0.125)


def test_an_untrained_controller_is_the_first_guess() -> None:
    gates, s = GateController(seed=0), statistics()
    guess = first_guess(s)
    assert torch.equal(gates.values(s), guess)
    torch.testing.assert_close(guess, 0.5 * s.curvature + (-s.mean).clamp_min(0.0))


def relaxed(gates: GateController, s: Statistics, price: float) -> float:
    """The trade-off of the module's docstring, unit by unit."""
    cost = [price * float(c) for c in s.cost]
    width = sum(cost) / len(cost)
    total = 0.0
    for v, g, h, c, m in zip(gates.values(s), s.mean, s.curvature, cost, s.on, strict=True):
        away = 1.0 / (1.0 + float(torch.exp(-(v - c) / width))) - float(m)
        total += float(g) * away + 0.5 * float(h) * away**2 + c * (away + float(m))
    return total / (float(s.mean.abs().mean()) + width) / len(cost)


def test_learning_descends_the_relaxed_trade_off() -> None:
    """Dormant units whose gradient promises more than one look at them is believed for."""
    on = torch.arange(UNITS) % 2 == 0
    s = statistics(on=on)
    s = replace(s, mean=torch.where(on, s.mean, -0.01), seen=torch.where(on, 100.0, 1.0))
    gates = GateController(seed=0)
    before, guess = gates.values(s), first_guess(s)
    first = gates.learn(s, 0.4)
    assert first == pytest.approx(relaxed(GateController(seed=0), s, 0.4), rel=1e-4)
    for _ in range(200):
        last = gates.learn(s, 0.4)
    assert last < first
    assert torch.equal(before, guess)
    learned = gates.values(s)
    assert (learned[~on] / guess[~on]).log().mean() > 0.3  # they are worth their cost, and now say so
    other = replace(statistics(seed=5, on=on), mean=s.mean, seen=s.seen)  # units it has not seen
    assert (gates.values(other)[~on] / first_guess(other)[~on]).log().mean() > 0.2


def test_dormant_units_may_ask_to_return() -> None:
    on = torch.arange(UNITS) % 3 > 0
    s = statistics(on=on)
    asking = int(torch.nonzero(~on)[0])
    mean, curvature, seen = s.mean.clone(), s.curvature.clone(), torch.where(on, 100.0, 0.0)
    mean[asking], curvature[asking], seen[asking] = -1.0, 0.1, 1e6
    guess = first_guess(replace(s, mean=mean, curvature=curvature, seen=seen))
    assert guess[asking] == pytest.approx(1.0 - 0.05, rel=1e-3)
    for g in (0, 1):
        active = guess[on & (s.group == g)]
        quiet = guess[~on & (s.group == g) & (torch.arange(UNITS) != asking)]  # never looked at
        torch.testing.assert_close(quiet, OPTIMISM * torch.quantile(active, 0.125).expand_as(quiet))


def test_few_looks_are_believed_little() -> None:
    on = torch.arange(UNITS) % 3 > 0
    s = statistics(on=on)
    worth = [first_guess(replace(s, seen=torch.full((UNITS,), n)))[~on] for n in (1.0, 4.0, 1e6)]
    torch.testing.assert_close(worth[1], 2.0 * worth[0])
    torch.testing.assert_close(worth[2], 1.5 * worth[1], rtol=1e-4, atol=0.0)


def test_values_are_positive_and_features_of_order_one() -> None:
    s = statistics()
    extreme = replace(
        s,
        mean=s.mean * 1e6,
        curvature=s.curvature * 0,
        weight=s.weight * 1e-30,
        cost=s.cost * 0,
        loss_slope=9.0,
    )
    for one in (s, extreme):
        phi = features(one)
        assert phi.isfinite().all()
        assert phi.abs().max() <= 15
        values = GateController(seed=0).values(one)
        assert values.isfinite().all()
        assert (values > 0).all()


def test_it_survives_saving() -> None:
    gates, s = GateController(seed=0), statistics()
    for _ in range(5):
        gates.learn(s, 0.01)
    file = io.BytesIO()
    torch.save(gates.state_dict(), file)
    file.seek(0)
    other = GateController(seed=7)
    other.load_state_dict(torch.load(file, weights_only=True))
    for one in (gates, other):
        one.learn(s, 0.01)
    assert torch.equal(gates.values(s), other.values(s))
    wrong = gates.state_dict()
    wrong["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match="another network"):
        other.load_state_dict(wrong)
