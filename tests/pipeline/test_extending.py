"""The doors for people who extend the package, by public names only."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import controlprune as cp


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    controller: cp.Controller

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(self.model(x), x[:, :4].argmax(1))
            loss.backward()
            self.optimizer.step()
            self.controller.step(loss)
            self.optimizer.zero_grad()


def begun(budget: cp.Budget, policy: Any = None, steps: int = 60) -> Run:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = cp.attach(
        model, optimizer, budget=budget, example_inputs=(torch.zeros(2, 8),), total_steps=steps, policy=policy
    )
    return Run(model, optimizer, controller)


class Movement(cp.Policy):
    """Units whose consumers' norm fell most over the run go, all at one third of it."""

    def begin(self, problem: cp.Problem) -> Movement:
        run = super().begin(problem)
        run.moved = torch.zeros(sum(problem.structure.sizes))
        return run

    def wants(self, step: int) -> cp.Wants:
        return cp.Wants(gradients=True, decision=step == self.problem.total_steps // 3)

    def sees(self, observation: cp.Observation) -> None:
        if observation.gradients is not None:
            self.moved -= observation.gradients.nan_to_num(0.0)

    def decide(self, observation: cp.Observation) -> cp.Decision | None:
        if observation.step == 0:
            return None
        masks = []
        for moved, width in zip(self.problem.split(self.moved), self.uniform(), strict=True):
            mask = torch.zeros(len(moved), dtype=torch.bool)
            mask[moved.topk(width).indices] = True
            masks.append(mask)
        return cp.Decision(observation.masks if observation.final else tuple(masks))

    def state_dict(self) -> dict[str, Any]:
        return {"moved": self.moved.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moved = state["moved"].clone()

    moved: Tensor


def test_a_policy_with_a_memory_is_resumed() -> None:
    straight, half = (begun(cp.Budget(flops=0.4), Movement()) for _ in range(2))
    straight.train(0, 60)
    half.train(0, 15)
    saved = copy.deepcopy(
        [half.model.state_dict(), half.optimizer.state_dict(), half.controller.state_dict()]
    )
    resumed = begun(cp.Budget(flops=0.4), Movement())
    for part, state in zip((resumed.model, resumed.optimizer, resumed.controller), saved, strict=True):
        part.load_state_dict(state)
    resumed.train(15, 60)
    for name, mask in straight.controller.masks.items():
        assert torch.equal(mask, resumed.controller.masks[name])
    assert straight.controller.cost()["flops"].fraction <= 0.4
    small = [run.controller.finalize().parameters() for run in (straight, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*small, strict=True))


def test_a_policy_that_ends_above_the_budget_is_said() -> None:
    class Nothing(cp.Policy):
        def decide(self, observation: cp.Observation) -> None:
            return None

    run = begun(cp.Budget(flops=0.5), Nothing())
    run.train(0, 60)
    with pytest.warns(UserWarning, match="above its budget"):
        run.controller.finalize()


def own(cost: Any) -> cp.Budget:
    return cp.Budget(own={cp.Resource("x", "B", cost=cost): 0.5})


BYTES = cp.Resource("int8", "B", cost=lambda uses: uses.params)


@pytest.mark.parametrize("limit", [0.5, "50%", "600 B", "0.6 kB"])
def test_a_resource_of_ones_own_is_met(limit: float | str) -> None:
    run = begun(cp.Budget(own={BYTES: limit}))
    run.train(0, 60)
    most = 0.5 * run.controller.cost()["int8"].dense if limit in (0.5, "50%") else 600
    assert run.controller.cost()["int8"].unit == "B"
    small = run.controller.finalize()
    count = sum(p.numel() for p in small.parameters())
    assert 0.8 * most <= count <= most


def test_a_measured_resource_is_steered_by_what_is_measured() -> None:
    """Really a fifth more is used than the model of the cost says."""

    def measure(model: nn.Module) -> float:
        count = sum(p.numel() for p in model.parameters())
        return 1.2 * count if count < 1000 else float(count)

    own = cp.Resource("bytes", "B", cost=lambda uses: uses.params, measure=measure)
    run = begun(cp.Budget(own={own: 0.5}), cp.Control(update_every=4), steps=100)
    run.train(0, 100)
    dense = run.controller.cost()["bytes"].dense
    small = run.controller.finalize()
    assert 0.40 * dense <= measure(small) <= 0.52 * dense


def test_a_sensor_that_fails_is_given_up() -> None:
    def measure(model: nn.Module) -> float:
        raise OSError("no such device")

    own = cp.Resource("bytes", "B", cost=lambda uses: uses.params, measure=measure)
    run = begun(cp.Budget(own={own: 0.5}))
    run.train(0, 60)
    with pytest.warns(UserWarning, match="bytes could not be measured .OSError: no such device"):
        run.controller.shrink()
    run.controller.finalize()


def test_a_run_with_a_resource_of_ones_own_is_resumed() -> None:
    run, other = begun(cp.Budget(flops=0.6, own={BYTES: 0.5})), begun(cp.Budget(flops=0.6, own={BYTES: 0.5}))
    run.train(0, 40)
    other.controller.load_state_dict(run.controller.state_dict())
    assert other.controller.budget == run.controller.budget
    bare = begun(cp.Budget(flops=0.6))
    with pytest.raises(ValueError, match="int8"):
        bare.controller.load_state_dict(run.controller.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cp.Resource("flops", "FLOP", cost=lambda u: u.flops), "name='flops'"),
        (lambda: cp.Resource("two words", "B", cost=lambda u: u.params), "name='two words'"),
        (lambda: cp.Resource("x", "B", cost=3), "cost=3.: give a function"),  # type: ignore[arg-type]
        (lambda: cp.Budget(own={BYTES: 1.5}), "int8=1.5"),
        (lambda: cp.Budget(own={BYTES: "3 apples"}), "unknown unit 'apples'"),
        (lambda: cp.Budget(own={"int8": 0.5}), "give limits|mapping"),  # type: ignore[dict-item]
        (lambda: begun(own(lambda uses: 3.0)), "cost gave float"),
        (lambda: begun(own(lambda uses: 0.0 * uses.params)), "uses nothing"),
        (lambda: cp.operator_rule("aten::relu"), "give the full name of your own"),
        (lambda: cp.operator_rule("relu"), "give the full name of your own"),
    ],
)
def test_wrong_use_is_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_value_of_the_wrong_shape() -> None:
    run = begun(cp.Budget(flops=0.5), cp.Control(value=lambda known: known.mean[:3], update_every=4))
    with pytest.raises(ValueError, match="one finite number for each of 56"):
        run.train(0, 60)
