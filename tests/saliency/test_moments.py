"""The observer's recurrences, against hand-written ones."""

import math

import pytest
import torch

from controlprune.saliency.moments import LossTrend, fisher, observe, start_moments, track_loss


def test_moments_follow_the_recurrence():
    generator = torch.Generator().manual_seed(0)
    decay, gradients = 0.9, torch.randn(50, 4, generator=generator)
    moments, m, s = start_moments(4), torch.zeros(4), torch.zeros(4)
    for g in gradients:
        moments = observe(moments, g, decay)
        m, s = decay * m + (1 - decay) * g, decay * s + (1 - decay) * g**2
    mean, curvature = fisher(moments, decay, batch=8)
    weight = 1 - decay**50
    torch.testing.assert_close(mean, m / weight)
    torch.testing.assert_close(curvature, 8 * (s / weight - (m / weight) ** 2) + (m / weight) ** 2)


def test_one_observation_is_unbiased():
    moments = observe(start_moments(3), torch.tensor([1.0, -2.0, 0.5]), 0.99)
    mean, curvature = fisher(moments, 0.99, batch=64)
    torch.testing.assert_close(mean, torch.tensor([1.0, -2.0, 0.5]))
    torch.testing.assert_close(curvature, mean**2, rtol=1e-3, atol=1e-3)


def test_absent_units_rest():
    moments = observe(start_moments(2), torch.tensor([1.0, 1.0]), 0.9)
    after = observe(moments, torch.tensor([math.nan, 3.0]), 0.9)
    assert after.first[0] == moments.first[0]
    assert after.count.tolist() == [1.0, 2.0]
    assert after.first[1] != moments.first[1]


def test_fisher_of_a_linear_least_squares_gate_is_its_curvature():
    """At the optimum of ½(y − g a)² with unit noise, H of the gate is E a²: the Fisher estimate."""
    generator = torch.Generator().manual_seed(1)
    batch, a = 32, torch.tensor([0.5, 2.0])
    moments = start_moments(2)
    for _ in range(3000):
        x = torch.randn(batch, 2, generator=generator)
        noise = torch.randn(batch, generator=generator)
        gradient = (noise[:, None] * a * x).mean(
            0
        )  # d/dg of ½(noise + (1 − g)·a·x)² at g = 1, mean over the batch
        moments = observe(moments, gradient, 0.999)
    _, curvature = fisher(moments, 0.999, batch)
    torch.testing.assert_close(curvature, a**2, rtol=0.15, atol=0.0)


@pytest.mark.parametrize("horizon", [100, 10000])
def test_a_constant_loss_has_no_slope_and_a_falling_one_has(horizon):
    trend = LossTrend()
    for _ in range(200):
        trend = track_loss(trend, 2.0, horizon)
    assert trend.slope == pytest.approx(0.0, abs=1e-9)
    for k in range(50):
        trend = track_loss(trend, 2.0 - 0.02 * k, horizon)
    assert trend.slope > 0.0
