"""Single weights: what is off is zero everywhere, as many go as come, and runs are the same runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import batch
from torch import Tensor, nn
from torch.optim import Optimizer

import controlprune as cp
from controlprune.allocate.erdos_renyi import erk_under
from controlprune.policies.rigl import cosine

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
}
MOMENTA = {
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "prev",
}


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


def attach(model: nn.Module, optimizer: Optimizer, policy: Any, steps: int = 60, **options: Any) -> Any:
    return cp.attach(
        model,
        optimizer,
        **{
            "budget": cp.Budget(flops=0.3),
            "example_inputs": (torch.zeros(2, 8),),
            "total_steps": steps,
            "policy": policy,
            "granularity": "weight",
            **options,
        },
    )


def train(
    model: nn.Module, optimizer: Optimizer, controller: Any, start: int, stop: int, each: Any = None
) -> None:
    for t in range(start + 1, stop + 1):
        x, y = batch(t, (8,))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if each is not None:
            each(t)
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()


def off(model: nn.Module, controller: Any) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: ~m.view(parameters[name].shape) for name, m in controller.masks.items()}


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from([cp.RigL(update_every=3), cp.SET(update_every=3, drop=0.5), cp.Control(start="budget")]),
    st.integers(0, 100),
)
def test_zeros_stay_zero(name: str, policy: Any, seed: int) -> None:
    model = mlp(seed)
    optimizer = OPTIMIZERS[name](model.parameters())
    controller = attach(model, optimizer, policy, 20)
    for n, dormant in off(model, controller).items():
        assert dormant.any(), n
    parameters = dict(model.named_parameters())

    def look(t: int) -> None:
        for n, dormant in off(model, controller).items():
            p = parameters[n]
            assert p.grad is not None
            assert not p[dormant].any(), (t, n)
            assert not p.grad[dormant].any(), (t, n)
            for key, value in optimizer.state.get(p, {}).items():
                if key in MOMENTA:
                    assert not value[dormant].any(), (t, n, key)

    train(model, optimizer, controller, 0, 20, look)
    masks = controller.masks
    small = controller.finalize()
    assert controller.cost()["flops"].fraction <= 0.3
    assert all(
        int(p.count_nonzero()) <= int(masks[n].sum()) for n, p in small.named_parameters() if n in masks
    )


def test_an_optimizer_that_mixes_entries_is_masked_after_every_step() -> None:
    class Mixing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for p in (p for group in self.param_groups for p in group["params"]):
                p.add_(0.01 * p.mean())

    model = mlp()
    optimizer = Mixing(model.parameters(), lr=0.1)
    controller = attach(model, optimizer, cp.Static())
    parameters = dict(model.named_parameters())
    for t in range(1, 4):
        train(model, optimizer, controller, t - 1, t)
        assert all(not parameters[n][dormant].any() for n, dormant in off(model, controller).items())


def test_weights_and_gradients_written_by_hand_are_masked() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = attach(model, optimizer, cp.Static())
    dormant = off(model, controller)["0.weight"]
    weight = model[0].weight
    with torch.no_grad():
        weight.add_(1.0)
    model(torch.zeros(1, 8))
    assert not weight[dormant].any()
    with torch.no_grad():
        weight.add_(1.0)
    assert not model.state_dict()["0.weight"][dormant].any()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not weight[dormant].any()
    weight.grad = torch.full_like(weight, math.nan)
    optimizer.step()
    assert not weight[dormant].any()


@settings(max_examples=10, deadline=None)
@given(st.booleans(), st.floats(0.1, 0.9), st.floats(0.1, 0.6), st.sampled_from(["uniform", "erk"]))
def test_as_many_grow_as_are_dropped(rigl: bool, budget: float, drop: float, layers: Any) -> None:
    make = cp.RigL if rigl else cp.SET
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = make(drop=drop, update_every=4, layers=layers)
    controller = attach(model, optimizer, policy, 40, budget=cp.Budget(params=budget))
    before = controller.history[-1].active
    train(model, optimizer, controller, 0, 40)
    assert len(controller.history) > 3
    for row in list(controller.history)[1:]:
        assert row.off == row.on
        assert row.active == before
        if rigl and row.event != "look":
            most = [int(cosine(drop, row.step / 40, 0.75) * n) if row.step <= 30 else 0 for n in before]
            assert all(n <= k for n, k in zip(row.off, most, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.01, 1.0), st.floats(0.05, 1.0))
def test_the_cosine_fraction(progress: float, drop: float, until: float) -> None:
    share = cosine(drop, progress, until)
    if progress >= until:
        assert share == pytest.approx(0.0, abs=1e-12)
    else:
        assert share == pytest.approx(drop / 2 * (1 + math.cos(math.pi * progress / until)))


class Mixed(nn.Module):
    """Kernels and matrices of many shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.c, self.d = nn.Linear(32, 50), nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))
        return self.d(torch.relu(self.c(h)))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 0.95))
def test_densities_are_the_closed_form(budget: float) -> None:
    """Σ_d shape_d / Π_d shape_d times ε, where a layer that would be over 1 is dense and ε solved anew."""
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy, inputs = cp.Static(layers="erk"), (torch.zeros(2, 3, 8, 8),)
    controller = attach(model, optimizer, policy, budget=cp.Budget(params=budget), example_inputs=inputs)
    shapes = {n: p.shape for n, p in model.named_parameters() if p.ndim > 1}
    rest = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    left = budget * sum(p.numel() for p in model.parameters()) - rest
    dense: set[str] = set()
    while True:
        scale = (left - sum(math.prod(shapes[n]) for n in dense)) / sum(
            sum(s) for n, s in shapes.items() if n not in dense
        )
        over = {n for n, s in shapes.items() if n not in dense and scale * sum(s) / math.prod(s) > 1}
        if not over:
            break
        dense |= over
    for name, mask in controller.masks.items():
        shape = shapes[name]
        expected = math.prod(shape) if name in dense else scale * sum(shape)
        assert abs(int(mask.sum()) - expected) <= 1.0 + 1e-6 * expected, name
    problem = controller._run.problem
    assert erk_under(problem, problem.budget) == controller.history[-1].active


POLICIES = {
    "rigl": cp.RigL(update_every=10),
    "set": cp.SET(update_every=10),
    "gradual": cp.Gradual(by="movement"),
    "snip": cp.Static(by="snip", batches=3),
    "control": cp.Control(update_every=10, observe_every=2),
}


@pytest.mark.parametrize("name", POLICIES)
def test_resumed_it_is_the_same_run(name: str, tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, Optimizer, Any]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, attach(model, optimizer, POLICIES[name], 200)

    whole = fresh()
    train(*whole, 0, 200)
    first = fresh()
    train(*first, 0, 100)
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    second = fresh()
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, 100, 200)
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(m, second[2].masks[n]) for n, m in whole[2].masks.items())
    assert [r.active for r in whole[2].history] == [r.active for r in second[2].history]


def test_files_hold_a_bit_a_weight() -> None:
    model = mlp()
    controller = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), cp.Static())
    units = sum(m.numel() for m in controller.masks.values())
    plant = controller.state_dict()["plant"]
    assert sum(m.numel() * m.element_size() for n, m in plant.items() if n != "compact") == units / 8
    told = model.state_dict()._metadata[""]["controlprune"]["masks"]
    assert sum(m.numel() * m.element_size() for m in told.values()) == units / 8


def test_the_users_own_checkpoints_take_the_masks_along() -> None:
    first, second = mlp(), mlp(1)
    one = attach(first, torch.optim.SGD(first.parameters(), lr=0.1), cp.Static(), seed=1)
    two = attach(second, torch.optim.SGD(second.parameters(), lr=0.1), cp.Static(), seed=2)
    assert not torch.equal(one.masks["0.weight"], two.masks["0.weight"])
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(m, two.masks[n]) for n, m in one.masks.items())
    plain = mlp(3)
    second.load_state_dict(plain.state_dict())  # dense: every weight is on
    assert all(bool(m.all()) for m in two.masks.values())
    assert torch.equal(second[0].weight, plain[0].weight)


def test_saved_and_loaded_without_a_trace(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = attach(model, optimizer, cp.RigL(update_every=5))
    train(model, optimizer, controller, 0, 30)
    cp.save(controller, tmp_path / "sparse.safetensors")
    other = cp.load(tmp_path / "sparse.safetensors", mlp(5))
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("ends", ["detach", "finalize"])
def test_nothing_of_ours_is_left(ends: str) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.randn(3, 8)
    controller = attach(model, optimizer, cp.RigL(update_every=5))
    train(model, optimizer, controller, 0, 60)
    masked = model(x)
    copied = copy.deepcopy(model)
    getattr(controller, ends)()
    assert torch.equal(model(x), masked)
    for net in (model, copied):
        for module in net.modules():
            assert not any(
                v
                for n, v in vars(module).items()
                if n.endswith("_hooks") and isinstance(v, dict) and net is model
            )
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters())
    copied(x).sum().backward()  # a plain model: every weight has a gradient
    assert copied[0].weight.grad.count_nonzero() > model[0].weight.count_nonzero()


def test_attach_and_detach_leave_every_bit_where_nothing_was_cut() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1), cp.Gradual()).detach()
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())


def test_accumulated_gradients_are_seen_as_one() -> None:
    """Two half batches are the whole one: RigL grows the same weights."""

    def run(parts: int) -> Any:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        controller = attach(model, optimizer, cp.RigL(update_every=4), 16)
        for t in range(1, 17):
            x, y = batch(t, (8,))
            loss = torch.zeros(())
            for part in range(parts):
                half = slice(part * len(x) // parts, (part + 1) * len(x) // parts)
                loss = nn.functional.cross_entropy(model(x[half].double().float()), y[half]) / parts
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()
        return controller.masks

    one, two = run(1), run(2)
    assert all(torch.equal(m, two[n]) for n, m in one.items())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "latency": ({"budget": cp.Budget(latency=0.5)}, "budget: latency does not fall"),
    "train_flops": ({"budget": cp.Budget(train_flops=0.5, flops=0.5)}, "budget: train_flops does not fall"),
    "rotation": ({"policy": cp.Rotation()}, "cp.Rotation parks"),
    "layers": ({"policy": cp.RigL(layers="all")}, 'layers=\'all\': give "uniform" or "erk"'),  # type: ignore[arg-type]
    "ignored": ({"ignored_layers": ["0", "2", "4"]}, "no parameter of this model has units to prune"),
    "too little": ({"budget": cp.Budget(params=0.01)}, "params <= .*feasible"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    options, message = BAD[case]
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        attach(model, optimizer, **{"policy": cp.RigL(), **options})
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_erk_is_about_weights() -> None:
    model = mlp()
    with pytest.raises(ValueError, match='layers="erk": it is about single weights'):
        attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), cp.RigL(layers="erk"), granularity="channel"
        )


def test_what_is_tied_or_parametrised_or_frozen_or_empty_is_left_alone_and_said_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.frozen, self.free = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)
            self.empty = nn.Parameter(torch.zeros(0, 8))  # MobileBERT's, where its two widths are equal

        def forward(self, x: Tensor) -> Tensor:
            x = self.free(self.frozen(self.normed(self.embed(x))))
            return torch.cat([self.head(x), nn.functional.linear(x, self.empty)], -1)

    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = (torch.zeros(2, 3, dtype=torch.long),)
    controller = attach(model, optimizer, cp.SET(), budget=cp.Budget(flops=0.9), example_inputs=inputs)
    assert list(controller.masks) == ["free.weight"]
    report = controller.report()
    for words in (
        "refused embed.weight (128): it is tied",
        "frozen.weight (64): it is frozen",
        "it is parametrised",
        "refused empty (0): it is empty",
    ):
        assert words in report


def test_the_controller_exchanges_a_part_at_a_time() -> None:
    """A gradient of one step is noise: were it taken for a promise, nearly all would be exchanged."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    policy = cp.Control(update_every=2, observe_every=1, revise_every=2, dwell=1)
    controller = attach(model, optimizer, policy, 200)
    for t in range(200):
        x, y = batch(t, (8,))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    rows = list(controller.history)
    assert sum(sum(row.on) for row in rows) > 20
    for row in rows:
        assert all(on <= 0.3 * active for on, active in zip(row.on, row.active, strict=True))
