"""States and neurons under one budget: one price, one history, each cut in its own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lags import Run, assert_ranks_are_alike, batch, flops
from rig import assert_same_bits, bits, hooks, timeless
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workers import ranks

import controlprune as cp
from controlprune import ssm

STEPS = 48
BOTH = {"": "channel", "lru": "state"}


class Hybrid(nn.Module):
    def __init__(self, quiet: float = 1.0) -> None:
        super().__init__()
        self.encode = nn.Linear(2, 8)
        self.lru = ssm.LRU(8, 32, radius=(0.5, 0.95))
        self.mlp = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 3))
        self.quiet = quiet

    def forward(self, u: Tensor) -> Tensor:
        u = self.encode(u)
        return self.mlp(u.mean(1) + self.quiet * self.lru(u).mean(1))


def started(quiet: float = 1.0, **options: Any) -> Run:
    given = {"budget": cp.Budget(flops=0.4), "granularity": BOTH, **options}
    return Run(lambda: Hybrid(quiet), STEPS, **given)


@pytest.mark.parametrize(
    "budget", [cp.Budget(flops=0.4), cp.Budget(params=0.5), cp.Budget(flops=0.5, params=0.5)]
)
def test_a_hybrid_ends_inside_one_budget_and_both_kinds_are_cut(budget: cp.Budget) -> None:
    dense, size = flops(Hybrid()), sum(p.numel() for p in Hybrid().parameters())
    run = started(budget=budget).train(0, STEPS)
    counted = run.controller._run.problem.costs
    small = run.controller.finalize()
    active = run.controller.history[-1].active
    numbers = {"flops": flops(small), "params": sum(p.numel() for p in small.parameters())}
    for name, target in budget.targets().items():
        assert (
            counted[name].value(active)
            == numbers[name]
            <= target.limit({"flops": dense, "params": size}[name])
        )
    assert small.lru.states < 32
    assert small.mlp[0].out_features < 96
    assert not hooks(small, run.optimizer)
    cross_entropy(small(batch(0)[0]), batch(0)[1]).backward()
    run.optimizer.step()


def test_what_is_not_heard_is_cut_first() -> None:
    """The recurrence with a hundredth of its voice ends with fewer states, and the neurons with more."""
    loud, quiet = (started(quiet=q).train(0, STEPS) for q in (1.0, 0.01))
    assert quiet.model.lru.states < loud.model.lru.states
    assert quiet.model.mlp[0].out_features + quiet.model.mlp[2].out_features > (
        loud.model.mlp[0].out_features + loud.model.mlp[2].out_features
    )


def test_neurons_come_back_and_states_do_not() -> None:
    run = started()
    masks = {"lru.states": torch.arange(32) < 20, "mlp.0": torch.arange(96) % 2 == 0}
    run.controller.set_masks(masks)
    assert (run.model.lru.states, run.model.mlp[0].out_features) == (20, 96)
    run.controller.shrink()
    assert (run.model.lru.states, run.model.mlp[0].out_features) == (20, 48)
    run.controller.set_masks({"mlp.0": torch.ones(96, dtype=torch.bool)})
    assert (run.model.lru.states, run.model.mlp[0].out_features) == (20, 96)
    with pytest.raises(ValueError, match=r"lru\.states"):
        run.controller.set_masks({"lru.states": torch.ones(32, dtype=torch.bool)})


def test_a_half_and_a_half_are_a_whole() -> None:
    half = 20
    straight = started().train(0, half)
    then = straight.saved()
    assert straight.model.lru.states < 32
    straight.train(half, STEPS)
    for order in (("model", "optimizer", "controller"), ("controller", "optimizer", "model")):
        resumed = started(seed=1).load(then, order).train(half, STEPS)
        assert_same_bits(bits(straight.model, straight.optimizer), bits(resumed.model, resumed.optimizer))
        assert timeless(list(straight.controller.history)) == timeless(list(resumed.controller.history))


def test_a_small_one_is_saved_and_loaded(tmp_path: Any) -> None:
    run = started().train(0, STEPS)
    cp.save(run.controller, tmp_path / "small.safetensors")
    small = cp.load(tmp_path / "small.safetensors", Hybrid())
    run.controller.finalize()
    u = batch(99)[0]
    torch.testing.assert_close(small(u), run.model(u))


@ranks(2)
def test_two_ranks_decide_alike(rank: int) -> None:
    run = started(rank=rank).train(0, STEPS)
    run.controller.finalize()
    assert run.model.lru.states < 32
    assert_ranks_are_alike(run)
