"""The gate controller: learns what the ablations measure, and speaks only where it has earned its place."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from controlprune.saliency.network import (
    CHANGE,
    GUESS,
    Experiment,
    GateController,
    Statistics,
    features,
    first_guess,
)

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
        cost=torch.full((units,), 0.01),
        age=torch.ones(units),
        on=torch.ones(units, dtype=torch.bool) if on is None else on,
        group=(torch.arange(units) >= units // 3).long(),
        loss_slope=0.0,
        progress=0.5,
    )


def experiments(s: Statistics, true: Tensor, count: int, seed: int, error: float = 0.0) -> list[Experiment]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        members = torch.randperm(len(true), generator=g)[: int(torch.randint(1, 6, (1,), generator=g))]
        members = members[s.on[members] == s.on[members[0]]]
        off = bool(s.on[members[0]])
        change = (1 if off else -1) * float(true[members].sum())
        found.append(
            Experiment(members, off, change * (1 + error * float(torch.randn((), generator=g))), 0.0)
        )
    return found


def trained(factor: float, rounds: int = 40, error: float = 0.1) -> tuple[GateController, Statistics, Tensor]:
    gates, s = GateController(seed=0), statistics()
    true = factor * first_guess(s, gates.optimism)
    for k in range(rounds):
        gates.record(s, experiments(s, true, 3, k, error))
        gates.learn(s, 0.0, rounds=8)
    return gates, s, true


def test_an_untrained_controller_is_the_first_guess() -> None:
    gates, s = GateController(seed=0), statistics()
    guess = first_guess(s, gates.optimism)
    assert torch.equal(gates.values(s), guess)
    torch.testing.assert_close(gates._predict(s, guess), guess)
    torch.testing.assert_close(guess, 0.5 * s.curvature + (-s.mean).clamp_min(0.0))


@pytest.mark.parametrize("factor", [5.0, 0.2])
def test_the_scale_of_the_ablations_is_learned(factor: float) -> None:
    gates, s, true = trained(factor)
    assert gates.earned
    ratio = (gates.values(s) / true).log()
    assert ratio.mean().abs() < 0.2
    assert ratio.std() < 0.5
    other = statistics(seed=9)  # units it has not seen
    unseen = (gates.values(other) / (factor * first_guess(other, gates.optimism))).log()
    assert unseen.mean().abs() < 0.4


def test_what_the_guess_misses_is_learned_from_the_features() -> None:
    """The true value goes with the weight norm, which the guess does not look at."""
    gates, s = GateController(seed=0), statistics()
    true = first_guess(s, gates.optimism) * s.weight
    for k in range(60):
        gates.record(s, experiments(s, true, 3, k))
        gates.learn(s, 0.0, rounds=8)
    scores = gates.scores()
    assert gates.earned
    assert scores["learned"] > scores["second order"] + 0.05
    other = statistics(seed=3)
    wanted = (first_guess(other, gates.optimism) * other.weight).log()
    learned, guess = gates.values(other).log(), first_guess(other, gates.optimism).log()
    assert (learned - wanted).std() < 0.6 * (guess - wanted).std()


def test_it_must_earn_its_place() -> None:
    """While the guess is right and the network is disturbed, the guess is answered."""
    gates, s = GateController(seed=0), statistics()
    true = first_guess(s, gates.optimism)
    with torch.no_grad():
        gates.net[2].bias.fill_(2.0)  # type: ignore[union-attr]
    gates.record(s, experiments(s, true, 11, 0))
    assert not gates.earned  # too few to tell
    gates.record(s, experiments(s, true, 30, 1))
    assert not gates.earned
    assert torch.equal(gates.values(s), true)
    gates, s, _ = trained(5.0, rounds=3)
    assert not gates.earned  # nine experiments


def test_predictions_are_scored_before_they_are_learned() -> None:
    gates, s = GateController(seed=0), statistics()
    true = 5.0 * first_guess(s, gates.optimism)
    gates.record(s, experiments(s, true, 9, 0))
    learned, guessed, measured = (gates.table[:, k] for k in (0, GUESS, CHANGE))
    torch.testing.assert_close(learned, guessed)  # still the guess
    torch.testing.assert_close(measured, 5.0 * guessed)
    before = gates.table.clone()
    gates.learn(s, 0.0, rounds=50)
    assert torch.equal(gates.table, before)  # hindsight changes no score
    gates.record(s, experiments(s, true, 9, 1))
    sizes = gates.table[9:].float().log()
    apart = (sizes - sizes[:, CHANGE, None]).abs().mean(0)
    assert apart[0] < apart[GUESS]


def test_the_scores_rank_predictors() -> None:
    gates, s = GateController(seed=0), statistics()
    true = s.weight.clone()
    singles = [Experiment(torch.tensor([i]), True, float(true[i]), 0.0) for i in range(40)]
    assert gates.scores() == {}
    gates.record(s, singles)
    scores = gates.scores()
    assert scores["magnitude"] == pytest.approx(1.0)
    assert set(scores) == {"learned", "second order", "fisher", "taylor", "magnitude"}
    assert all(abs(value) < 0.6 for name, value in scores.items() if name != "magnitude")


def test_an_experiment_against_the_sign_teaches_nothing() -> None:
    gates, s = GateController(seed=0), statistics()
    gates.record(s, [Experiment(torch.tensor([k]), True, -1.0, 0.0) for k in range(20)])
    before = gates.values(s)
    gates.learn(s, 0.0, rounds=20, relaxed_weight=0.0)
    torch.testing.assert_close(gates._predict(s, before), before, rtol=0.05, atol=0)  # weight decay at most


def test_noisy_experiments_weigh_less() -> None:
    gates, s = GateController(seed=0), statistics()
    guess = first_guess(s, gates.optimism)
    sure = [Experiment(torch.tensor([k]), True, 5.0 * float(guess[k]), 0.0) for k in range(20)]
    noise = [
        Experiment(torch.tensor([k]), True, 0.01 * float(guess[k]), float(guess[k])) for k in range(20, 60)
    ]
    gates.record(s, sure + noise)
    gates.learn(s, 0.0, rounds=200)
    assert (gates._predict(s, guess) / guess)[:20].log().mean() > 1.0


def test_dormant_units_may_ask_to_return() -> None:
    on = torch.arange(UNITS) % 3 > 0
    s = statistics(on=on)
    mean = s.mean.clone()
    asking = int(torch.nonzero(~on)[0])
    mean[asking] = -1.0  # its gate's gradient promises a fall of the loss by one
    curvature = s.curvature.clone()
    curvature[asking] = 0.1
    s = Statistics(mean, curvature, s.weight, s.cost, s.age, on, s.group, 0.0, 0.5)
    guess = first_guess(s, 0.7)
    assert guess[asking] == pytest.approx(1.0 - 0.05)
    for g in (0, 1):
        active = guess[on & (s.group == g)]
        quiet = guess[~on & (s.group == g) & (torch.arange(UNITS) != asking)]
        assert (quiet >= 0.7 * torch.quantile(active, 0.125) * 0.999).all()
        assert (quiet > 0).all()


def test_values_are_positive_and_features_of_order_one() -> None:
    s = statistics()
    extreme = Statistics(
        s.mean * 1e6, s.curvature * 0, s.weight * 1e-30, s.cost * 0, s.age, s.on, s.group, 9.0, 1.0
    )
    for one in (s, extreme):
        phi = features(one)
        assert phi.isfinite().all()
        assert phi.abs().max() <= 15
        values = GateController(seed=0).values(one)
        assert values.isfinite().all()
        assert (values > 0).all()


def test_memory_is_bounded_and_survives_saving() -> None:
    gates, s = GateController(seed=0, memory=20), statistics()
    guess = first_guess(s, gates.optimism)
    for k in range(15):
        gates.record(s, experiments(s, 5 * guess, 3, k))
        gates.learn(s, 0.01, rounds=2)
    assert len(gates.table) == len(gates.phi) == 20
    file = io.BytesIO()
    torch.save(gates.state_dict(), file)
    file.seek(0)
    other = GateController(seed=7, memory=20)
    other.load_state_dict(torch.load(file, weights_only=True))
    for one in (gates, other):
        one.record(s, experiments(s, 5 * guess, 3, 99))
        one.learn(s, 0.01, rounds=3)
    assert torch.equal(gates.values(s), other.values(s))
    assert gates.scores() == other.scores()


def test_it_has_random_numbers_of_its_own() -> None:
    state = torch.get_rng_state()
    first, second, third = (GateController(seed=k) for k in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (gates.net[0].weight for gates in (first, second, third))  # type: ignore[union-attr]
    assert torch.equal(a, b)  # type: ignore[arg-type]
    assert not torch.equal(a, c)  # type: ignore[arg-type]
