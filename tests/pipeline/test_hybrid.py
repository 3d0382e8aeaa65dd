"""States and neurons under one budget: one price, one history, each cut in its own way."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rig import assert_same_bits, bits, hooks, timeless
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode
from workers import ranks

import controlprune as cp
from controlprune import ssm

STEPS = 48
BOTH = {"": "channel", "lru": "state"}
GRADUAL = cp.Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5)
QUICK = cp.Control(plan=GRADUAL, stages=6, observe_every=1, update_every=4)


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


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Which of three lags does the second channel follow the first with?"""
    generator = torch.Generator().manual_seed(100 * step + rank)
    lag = torch.randint(3, (32,), generator=generator)
    first = torch.randn(32, 16, generator=generator)
    second = torch.stack([row.roll(int(k)) for row, k in zip(first, lag, strict=True)])
    return torch.stack([first, second], 2), lag


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch(0)[0])
    return counter.get_total_flops()


class Run:
    def __init__(self, seed: int = 0, quiet: float = 1.0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = Hybrid(quiet)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-3)
        given = {"budget": cp.Budget(flops=0.4), "policy": QUICK, "granularity": BOTH, **options}
        self.controller = cp.attach(
            self.model, self.optimizer, example_inputs=(batch(0)[0],), total_steps=STEPS, **given
        )

    def train(self, start: int, stop: int) -> Run:
        for step in range(start + 1, stop + 1):
            u, y = batch(step)
            loss = cross_entropy(self.model(u), y)
            loss.backward()
            self.optimizer.step()
            self.controller.step(loss)
            self.optimizer.zero_grad()
        return self

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save({n: getattr(self, n).state_dict() for n in ("model", "optimizer", "controller")}, file)
        return file.getvalue()

    def load(self, content: bytes, order: tuple[str, ...]) -> Run:
        states = torch.load(io.BytesIO(content), weights_only=True)
        for name in order:
            getattr(self, name).load_state_dict(states[name])
        return self


@pytest.mark.parametrize(
    "budget", [cp.Budget(flops=0.4), cp.Budget(params=0.5), cp.Budget(flops=0.5, params=0.5)]
)
def test_a_hybrid_ends_inside_one_budget_and_both_kinds_are_cut(budget: cp.Budget) -> None:
    dense, size = flops(Hybrid()), sum(p.numel() for p in Hybrid().parameters())
    run = Run(budget=budget).train(0, STEPS)
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
    loud, quiet = (Run(quiet=q).train(0, STEPS) for q in (1.0, 0.01))
    assert quiet.model.lru.states < loud.model.lru.states
    assert quiet.model.mlp[0].out_features + quiet.model.mlp[2].out_features > (
        loud.model.mlp[0].out_features + loud.model.mlp[2].out_features
    )


def test_neurons_come_back_and_states_do_not() -> None:
    run = Run()
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
    straight = Run().train(0, half)
    then = straight.saved()
    assert straight.model.lru.states < 32
    straight.train(half, STEPS)
    for order in (("model", "optimizer", "controller"), ("controller", "optimizer", "model")):
        resumed = Run(seed=1).load(then, order).train(half, STEPS)
        assert_same_bits(bits(straight.model, straight.optimizer), bits(resumed.model, resumed.optimizer))
        assert timeless(list(straight.controller.history)) == timeless(list(resumed.controller.history))


def test_a_small_one_is_saved_and_loaded(tmp_path: Any) -> None:
    run = Run().train(0, STEPS)
    cp.save(run.controller, tmp_path / "small.safetensors")
    small = cp.load(tmp_path / "small.safetensors", Hybrid())
    run.controller.finalize()
    u = batch(99)[0]
    torch.testing.assert_close(small(u), run.model(u))


@ranks(2)
def test_two_ranks_decide_alike(rank: int) -> None:
    torch.manual_seed(0)
    inner = Hybrid()
    optimizer = torch.optim.Adam(inner.parameters(), lr=5e-3)
    model = DDP(inner)
    controller = cp.attach(
        inner,
        optimizer,
        budget=cp.Budget(flops=0.4),
        example_inputs=(batch(0)[0],),
        total_steps=STEPS,
        policy=QUICK,
        granularity=BOTH,
    )
    for step in range(1, STEPS + 1):
        u, y = batch(step, rank)
        loss = cross_entropy(model(u), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    controller.finalize()
    assert inner.lru.states < 32
    for parameter in inner.parameters():
        others = [torch.empty_like(parameter) for _ in range(2)]
        torch.distributed.all_gather(others, parameter.detach())
        assert torch.equal(*others)
    assert controller._run.replicas.repairs == 0
