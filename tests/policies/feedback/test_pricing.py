"""Prices: the feed-forward carries what the values know, the regulator the rest; saves lose nothing."""

from __future__ import annotations

import math

import pytest
import torch

from controlprune.policies.feedback.pricing import Prices
from controlprune.price.pi import PI


def test_the_price_moves_with_the_values_and_the_regulator_sees_none_of_it() -> None:
    prices = Prices(PI(integral=0.5), ("flops",))
    prices.follow(2.0)
    before = prices.now()["flops"]
    prices.follow(0.002)
    assert prices.now()["flops"] == pytest.approx(before / 1000)
    prices.regulate("flops", 0.6, 0.4)
    assert prices.now()["flops"] == pytest.approx(0.002 * math.exp(0.5 * 0.2))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_values_that_give_no_price_leave_the_last_one(scale: float) -> None:
    prices = Prices("auto", ("flops",))
    prices.follow(3.0)
    prices.follow(scale)
    assert prices.now() == {"flops": 3.0}


def test_what_the_solver_found_is_the_price_whatever_the_feed_forward() -> None:
    for regulator in ("auto", PI()):
        prices = Prices(regulator, ("flops", "params"))
        prices.follow(0.05)
        prices.track("flops", 0.5, 0.5, 0.7)
        assert prices.now()["flops"] == pytest.approx(0.7)
        assert prices.now()["params"] == pytest.approx(0.05)


def test_auto_designs_for_what_it_saw_and_bears_late_measurements() -> None:
    prices = Prices("auto", ("flops",))
    generator = torch.Generator().manual_seed(0)
    use = reference = 0.8
    for k in range(200):
        prices.regulate("flops", use, reference)
        reference = max(0.4, 0.8 - 0.01 * k)  # the feed-forward follows it: not the price's doing
        pressed = 0.6 * math.log(prices.now()["flops"] / 1e-2)
        use = reference - pressed + 0.05 * float(torch.randn((), generator=generator))
    assert 0.4 < prices.response("flops").gain <= 0.9  # believed at first: 0.3
    (line,) = prices.describe()
    assert "identified gain" in line
    assert float(line.split("delay margin ")[1].split()[0]) >= 7.9


def test_saved_and_restored() -> None:
    prices, again = Prices("auto", ("flops",)), Prices("auto", ("flops",))
    prices.follow(0.3)
    for k in range(20):
        prices.regulate("flops", 0.5 + 0.1 * (-1) ** k, 0.5)
    again.load_state_dict(prices.state_dict())
    assert again.now() == prices.now()
    prices.regulate("flops", 0.6, 0.5)
    again.regulate("flops", 0.6, 0.5)
    assert again.now() == prices.now()
