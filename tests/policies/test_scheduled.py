"""Policies on a schedule: budgets, the invariants of each rule, resuming, replicas, and what is refused."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig import NETS, Rig, assert_same_bits, bits, flops, hooks, rig, timeless
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import ranks

import controlprune as cp
from controlprune.control.ramp import Plan
from controlprune.policies.gradual import Cubic
from controlprune.policies.rigl import cosine
from controlprune.policies.scheduled import CALM, Rule, Units, top
from controlprune.policies.set import regrow

RULES: dict[str, Rule] = {
    "magnitude": cp.Magnitude(at=0.5),
    "gradual": cp.Gradual(update_every=3),
    "movement": cp.Gradual(by="movement", update_every=3),
    "static": cp.Static(),
    "snip": cp.Static(by="snip", batches=3),
    "set": cp.SET(update_every=7),
    "rigl": cp.RigL(update_every=7, look=2),
    "rotation": cp.Rotation(active=0.4, period=4, final="small", until=0.9),
}
BUDGETS = {"flops": cp.Budget(flops=0.5), "both": cp.Budget(flops=0.6, params=0.4)}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rule", RULES)
def test_it_ends_small_and_inside_the_budget(rule: str, budget: str) -> None:
    asked = BUDGETS[budget]
    run = rig("residual", "sgd", policy=RULES[rule], budget=asked, total_steps=60)
    x, whole = torch.zeros(2, *run.shape), NETS["residual"][0]()
    dense = {"flops": flops(whole, x), "params": sum(p.numel() for p in whole.parameters())}
    run.train(0, 60)
    small = run.controller.finalize()
    use = {"flops": flops(small, x), "params": sum(p.numel() for p in small.parameters())}
    limits = {name: use[name] / dense[name] for name in asked.targets()}
    assert all(limits[name] <= target.value for name, target in asked.targets().items())
    filled = max(limits[name] / target.value for name, target in asked.targets().items())
    assert filled > 0.85 or rule == "rotation"
    assert run.controller.history[-1].event.startswith("finalize")
    assert hooks(small, run.optimizer) == 0


@pytest.mark.parametrize("rule", ["magnitude", "gradual", "static", "set", "rigl"])
def test_a_sum_over_the_run_is_met(rule: str) -> None:
    run = rig("residual", "sgd", policy=RULES[rule], budget=cp.Budget(train_flops=0.7), total_steps=100)
    run.train(0, 100)
    spent = run.controller.cost()["train_flops"].fraction
    assert 0.66 <= spent <= 0.7 * 1.02


@pytest.mark.parametrize("rule", ["static", "set", "rigl", "rotation"])
def test_the_dense_net_is_paid_for_in_looks_only(rule: str) -> None:
    """The tensors are small from the first step on, but in the steps before an exchange."""
    run = rig("mlp", "adam", policy=RULES[rule], total_steps=42)
    wide = []
    for step in range(42):
        wide.append(not run.controller.plant.compact)
        run.train(step, step + 1)
    looks = {5, 6, 12, 13, 19, 20, 26, 27}  # two before each of the steps 7, 14, 21, 28; until 0.75 · 42
    assert {k for k, w in enumerate(wide) if w} == (looks if rule == "rigl" else set())


def test_as_many_return_as_leave() -> None:
    for rule, share in (("set", 0.3), ("rigl", None), ("rotation", 0.5)):
        run = rig("mlp", "sgd", policy=RULES[rule], total_steps=70)
        run.train(0, 70)
        rows = [row for row in run.controller.history if row.step > 0]
        moved = [row for row in rows if any(row.on)]
        assert len(moved) >= (7 if rule != "rigl" else 5)
        assert all(row.on == row.off for row in rows)
        for row in moved:
            f = cosine(0.3, row.step / 70, 0.75) if share is None else share
            assert all(k <= max(1, round(f * n)) for k, n in zip(row.on, row.active, strict=True))
        assert rule != "rigl" or all(row.step <= 0.75 * 70 for row in moved)


@given(st.integers(0, 10**6), st.integers(2, 40), st.data())
def test_regrow_keeps_the_width_and_the_largest(seed: int, n: int, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(seed)
    norm, gain = torch.rand(2, n, generator=g)
    width = data.draw(st.integers(1, n))
    on = top(torch.rand(n, generator=g), width)
    drop = data.draw(st.integers(0, width))
    new = regrow(norm, on, gain, width, drop)
    assert int(new.sum()) == width
    stay = top(norm.masked_fill(~on, -torch.inf), width - drop)
    assert (stay <= on).all()
    assert (stay <= new).all()
    assert int((on & ~new).sum()) == int((new & ~on).sum()) <= drop
    grown, passed = gain[new & ~stay], gain[~new]
    assert not len(grown) or not len(passed) or grown.min() >= passed.max()


def test_the_share_that_is_dropped_follows_a_cosine() -> None:
    assert cosine(0.3, 0.0, 0.75) == pytest.approx(0.3)
    assert cosine(0.3, 0.375, 0.75) == pytest.approx(0.15)
    assert cosine(0.3, 0.75, 0.75) == pytest.approx(0.0)
    assert cosine(0.3, 1.0, 0.75) == pytest.approx(0.0)


def test_a_cubic_and_its_mean() -> None:
    cubic: Plan = Cubic(earliest=0.2, latest=0.2, deadline=0.7, duration=0.5)
    state, levels, n = cubic.init(), [], 5000
    for k in range(n):
        state = cubic.update(state, (k + 0.5) / n, CALM, 1.0)
        levels.append(state.level)
    assert levels[n // 5 - 1] == 1.0
    assert levels[int(0.45 * n)] == pytest.approx(0.125, abs=1e-3)  # half way: (1/2)³
    assert levels[int(0.7 * n)] == 0.0
    assert all(a >= b for a, b in pairwise(levels))
    for at in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8):
        k = int(at * n)
        mean = sum(levels[k:]) / (n - k)
        assert cubic.ahead(at, levels[k], 0.2 if at >= 0.2 else None) == pytest.approx(mean, abs=2e-3)


def units(n: int, on: torch.Tensor, **other: Any) -> Units:
    known = {"norm": torch.ones(n), "gradient": torch.zeros(n), "away": torch.zeros(n, dtype=torch.int32)}
    return Units(on, **(known | other), exchange=True, progress=0.5, random=torch.Generator().manual_seed(0))


def test_the_scores_of_the_cuts() -> None:
    score, all_on = torch.tensor([3.0, -5.0, 1.0, 4.0]), torch.ones(4, dtype=torch.bool)
    by_norm = units(4, all_on, norm=score)
    by_gradient = units(4, all_on, gradient=score)
    assert cp.Magnitude().choose(by_norm, 2).tolist() == [True, False, False, True]
    assert cp.Gradual().choose(by_norm, 1).tolist() == [False, False, False, True]
    assert cp.Gradual(by="movement").choose(by_gradient, 1).tolist() == [False, True, False, False]
    assert cp.Static(by="snip").choose(by_gradient, 2).tolist() == [False, True, False, True]


@pytest.mark.parametrize("active", [0.1, 0.25, 0.5, 0.9])
def test_a_rotation_trains_every_unit(active: float) -> None:
    """Nobody is away for longer than the queue before it, whatever the gradients."""
    run = rig(
        "mlp",
        "adam",
        budget=cp.Budget(flops=1.0),
        policy=cp.Rotation(active=active, period=2),
        total_steps=120,
    )
    torch.manual_seed(0)
    start = {k: v.detach() for k, v in NETS["mlp"][0]().named_parameters()}  # as it was attached
    away = {name: torch.zeros(len(m)) for name, m in run.controller.masks.items()}
    seen = run.controller.masks
    for step in range(0, 120, 2):
        for name, mask in run.controller.masks.items():
            n, live = len(mask), int(mask.sum())
            assert live <= max(1, active * n + 1)
            seen[name] |= mask
            away[name] = torch.where(mask, 0.0, away[name] + 1)
            assert away[name].max() <= -(-(n - live) // -(-live // 2)) + 1
        assert run.controller.plant.compact
        run.train(step, step + 2)
    dense = run.controller.finalize()
    assert [p.shape for p in dense.parameters()] == [p.shape for p in start.values()]
    moved = {k: (p.detach() != start[k]).flatten(1).any(1) for k, p in dense.named_parameters() if p.ndim > 1}
    assert all(m.all() for m in seen.values())
    assert all(m.float().mean() > 0.8 for m in moved.values())  # a ReLU may be dead for its whole turn
    assert hooks(dense, run.optimizer) == 0
    run.optimizer.step()


def test_a_rotation_under_a_budget_ends_dense() -> None:
    run = rig(
        "mlp", "adam", budget=cp.Budget(flops=0.2), policy=cp.Rotation(active=0.5, period=4), total_steps=20
    )
    run.train(0, 20)
    assert run.controller.cost()["flops"].fraction <= 0.2
    assert all(row.realised["flops"] <= 0.2 for row in run.controller.history)
    assert [m.out_features for m in run.controller.finalize() if isinstance(m, nn.Linear)] == [32, 24, 4]
    assert run.controller.history[-1].realised["flops"] == 1.0


@pytest.mark.parametrize("final", ["dense", "small"])
def test_a_rotation_trains_the_end_together(final: str) -> None:
    policy = cp.Rotation(active=0.25, period=5, until=0.75, final=final)
    run = rig("mlp", "adam", budget=cp.Budget(flops=1.0), policy=policy, total_steps=40)
    run.train(0, 29)
    assert any(sum(row.on) for row in list(run.controller.history)[1:])
    assert run.controller.plant.compact
    run.train(29, 30)
    masks, whole = run.controller.masks, all(bool(m.all()) for m in run.controller.masks.values())
    assert whole == (final == "dense") == (not run.controller.plant.compact)
    run.train(30, 40)
    assert all(torch.equal(mask, masks[name]) for name, mask in run.controller.masks.items())
    small = run.controller.finalize()
    assert next(m.out_features for m in small if isinstance(m, nn.Linear)) == (32 if final == "dense" else 8)
    assert hooks(small, run.optimizer) == 0


def test_a_rotation_keeps_what_is_parked() -> None:
    run = rig("mlp", "adam", policy=cp.Rotation(active=0.25, period=5), total_steps=60)
    run.train(0, 29)
    first = run.controller.groups[0].name
    mask = run.controller.masks[first]
    run.controller.expand()
    weight, state = run.model[0].weight, run.optimizer.state[run.model[0].weight]["exp_avg"]
    parked = weight.detach()[~mask].clone(), state[~mask].clone()
    run.train(29, 30)  # they rotate
    run.controller.expand()
    still = ~mask & ~run.controller.masks[first]
    assert still.any()
    state = run.optimizer.state[weight]["exp_avg"]
    assert torch.equal(weight.detach()[still], parked[0][still[~mask]])
    assert torch.equal(state[still], parked[1][still[~mask]])


@pytest.mark.parametrize("net", ["mlp", "residual"])
@pytest.mark.parametrize("rule", RULES)
def test_stopped_and_resumed_is_the_same_run(rule: str, net: str) -> None:
    half = 100 if rule in ("set", "rigl") and net == "mlp" else 20
    straight, resumed = (rig(net, "adamw", policy=RULES[rule], total_steps=2 * half) for _ in range(2))
    straight.train(0, half)
    file = io.BytesIO()
    parts = ("model", "optimizer", "controller")
    torch.save({name: getattr(straight, name).state_dict() for name in parts}, file)
    straight.train(half, 2 * half)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for name in parts:
        getattr(resumed, name).load_state_dict(states[name])
    resumed.train(half, 2 * half)
    assert_same_run(straight, resumed)


def assert_same_run(a: Rig, b: Rig) -> None:
    assert_same_bits(bits(a.model, a.optimizer), bits(b.model, b.optimizer))
    assert timeless(list(a.controller.history)) == timeless(list(b.controller.history))


def test_a_budget_that_changes_is_followed() -> None:
    for rule in ("set", "rigl", "static", "magnitude"):
        run = rig("mlp", "adam", policy=RULES[rule], total_steps=80)
        run.train(0, 50)
        for flops_, until in ((0.3, 65), (0.7, 80)):
            run.controller.budget = cp.Budget(flops=flops_)
            run.train(run.controller.steps, until)
            assert 0.85 * flops_ <= run.controller.cost()["flops"].fraction <= flops_


@pytest.mark.parametrize("rule", RULES)
def test_a_horizon_that_moves_is_followed(rule: str) -> None:
    run = rig("mlp", "adam", policy=RULES[rule], total_steps=40)
    run.train(0, 22)
    run.controller.total_steps = 60
    run.train(22, 60)
    assert run.controller.cost()["flops"].fraction <= 0.5


@ranks(2)
def replicas(rank: int, rule: str) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.Adam(inner.parameters(), lr=0.01)
    model = DDP(inner)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.5),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=40,
        policy=RULES[rule],
    )
    for step in range(40):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(2 * step + rank))
        loss = nn.functional.cross_entropy(model(x), (x[:, :4] + x[:, 4:]).argmax(1))
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert controller._run.replicas.repairs == 0
    masks = torch.cat(list(controller.masks.values())).int()
    total = masks.clone()
    torch.distributed.all_reduce(total)
    assert torch.equal(total, 2 * masks)
    assert any(any(row.on) for row in controller.history)


@pytest.mark.parametrize("rule", ["rigl", "set", "rotation"])
def test_replicas_decide_alike(rule: str) -> None:
    replicas(rule=rule)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cp.Magnitude(at=1.2), "at=1.2"),
        (lambda: cp.Gradual(start=0.6, end=0.2), "start=0.6, end=0.2"),
        (lambda: cp.Gradual(by="size"), "by='size'"),  # type: ignore[arg-type]
        (lambda: cp.Gradual(update_every=0), "update_every=0"),
        (lambda: cp.Static(by="grasp"), "by='grasp'"),  # type: ignore[arg-type]
        (lambda: cp.Static(by="snip", batches=0), "batches=0"),
        (lambda: cp.SET(drop=-0.1), "drop=-0.1"),
        (lambda: cp.SET(until=True), "until=True"),
        (lambda: cp.RigL(look=0), "look=0"),
        (lambda: cp.RigL(update_every=3, look=3), "update_every=3"),
        (lambda: cp.Rotation(active=1.2), "active=1.2"),
        (lambda: cp.Rotation(active=0.0), "active=0.0"),
        (lambda: cp.Rotation(active=float("nan")), "active=nan"),
        (lambda: cp.Rotation(period=2.5), "period=2.5"),  # type: ignore[arg-type]
        (lambda: cp.Rotation(final="half"), "final='half'"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("policy", "budget", "said"),
    [
        (cp.SET(), cp.Price(flops=0.1), "budget: cp.SET follows a limit"),
        (cp.RigL(), cp.Budget(memory=0.9), "budget: memory bounds every step"),
        (cp.Static(shrink=False), cp.Budget(train_flops=0.8), "leave shrink=True"),
    ],
)
def test_what_a_policy_cannot_do_is_said_and_nothing_changed(
    policy: cp.Policy, budget: cp.Budget | cp.Price, said: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.Adam(model.parameters())
    before = bits(model, optimizer)
    with pytest.raises(ValueError, match=said):
        cp.attach(
            model,
            optimizer,
            budget=budget,
            example_inputs=(torch.zeros(2, 8),),
            total_steps=10,
            policy=policy,
        )
    assert hooks(model, optimizer) == 0
    assert_same_bits(before, bits(model, optimizer))


def test_a_price_in_the_middle_of_a_run_is_refused_and_the_budget_stays() -> None:
    run = rig(policy=cp.SET(), total_steps=20)
    run.train(0, 5)
    before = run.controller.state_dict()["budget"]
    with pytest.raises(ValueError, match="follows a limit"):
        run.controller.budget = cp.Price(flops=0.1)
    assert run.controller.state_dict()["budget"] == before
    run.train(5, 20)
