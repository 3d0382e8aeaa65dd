"""States of state-space layers under the controller: exact costs, one scale of values, the same runs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lags import QUICK, Run, assert_ranks_are_alike, batch, flops
from rig import assert_same_bits, bits, hooks, timeless
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import ranks

import controlprune as cp
from controlprune import ssm
from controlprune.ssm.plant import StatePlant, layer_gate
from controlprune.structure.extents import Fixed, Units

STEPS = 40
ORDERS = list(itertools.permutations(("model", "optimizer", "controller")))


class Net(nn.Module):
    """One layer of each kind, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(2, 4)
        self.lru = ssm.LRU(4, 24, radius=(0.5, 0.95))
        self.both = ssm.Bidirectional(ssm.LRU(4, 10), ssm.LRU(4, 12))
        self.filter = ssm.S4D(4, 8)
        self.out = nn.Linear(4, 3)

    def forward(self, u: Tensor) -> Tensor:
        return self.out(self.filter(self.both(self.lru(self.encode(u)))).mean(1))


class Small(nn.Module):
    def __init__(self, states: int = 24) -> None:
        super().__init__()
        self.lru = ssm.LRU(2, states, radius=(0.5, 0.95))
        self.out = nn.Linear(2, 3)

    def forward(self, u: Tensor) -> Tensor:
        return self.out(self.lru(u).mean(1))


class Dense(nn.Module):
    """A layer of one's own, its A a matrix, the step written out."""

    real_output = False

    def __init__(self, states: int) -> None:
        super().__init__()
        self.A = nn.Parameter(0.9 * torch.linalg.qr(torch.randn(states, states)).Q)
        self.B, self.C = nn.Parameter(torch.randn(states, 2)), nn.Parameter(torch.randn(3, states))

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.A, self.B, self.C

    def parameters_for(self, A: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        return {"A": A, "B": B, "C": C}

    def forward(self, u: Tensor) -> Tensor:
        x = u[:, 0] @ self.B.T
        for t in range(1, u.shape[1]):
            x = x @ self.A.T + u[:, t] @ self.B.T
        return x @ self.C.T


def attach(model: nn.Module, optimizer: Any = None, **options: Any) -> cp.Controller:
    return cp.attach(
        model,
        optimizer or torch.optim.Adam(model.parameters(), lr=5e-3),
        **{
            "budget": cp.Budget(flops=0.5),
            "example_inputs": (batch(0)[0],),
            "total_steps": STEPS,
            "granularity": "state",
            "policy": QUICK,
            **options,
        },
    )


def started(make: Callable[[], nn.Module] = Small, **options: Any) -> Run:
    return Run(make, STEPS, granularity="state", **options)


def states(model: nn.Module) -> dict[str, int]:
    return {name: ssm.states_of(layer) for name, layer in ssm.state_space_layers(model)}


# --- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts", [(24, 10, 12, 8), (7, 10, 12, 8), (24, 3, 5, 8), (1, 1, 1, 2), (5, 6, 2, 3)]
)
def test_flops_and_params_are_those_of_the_truncated_model(counts: tuple[int, ...]) -> None:
    model = Net()
    problem = attach(model, budget=cp.Budget(flops=0.9, params=0.9))._run.problem
    assert problem.structure.names == ("lru.states", "both.ahead.states", "both.back.states", "filter.states")
    assert problem.structure.sizes == (24, 10, 12, 8)
    small = copy.deepcopy(model)
    for (_, layer), n in zip(ssm.state_space_layers(small), counts, strict=True):
        ssm.truncate(layer, n)
    assert problem.costs["flops"].value(counts) == flops(small)
    assert problem.costs["params"].value(counts) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("n", [9, 4, 1])
def test_of_a_dense_layer_they_go_with_the_square(n: int) -> None:
    model = Dense(9)
    problem = attach(model, budget=cp.Budget(flops=0.9, params=0.9))._run.problem
    small = copy.deepcopy(model)
    ssm.truncate(small, n)
    assert problem.costs["flops"].value((n,)) == flops(small)
    assert problem.costs["params"].value((n,)) == sum(p.numel() for p in small.parameters())


def test_of_a_layer_as_wide_as_it_has_states_too() -> None:
    """Lengths that are equal by chance are told apart."""
    model = Small(states=2)
    model.lru = ssm.LRU(2, 2)
    cost = attach(model, budget=cp.Budget(flops=0.99))._run.problem.costs["flops"]
    ssm.truncate(model.lru, 1)
    assert cost.value((1,)) == flops(model)


def test_the_extents_of_its_tensors_are_over_its_states() -> None:
    structure = attach(Small())._run.problem.structure
    assert structure.tensors["lru.B"] == (Units(0, 24), Fixed(2), Fixed(2))
    assert structure.tensors["lru.C"] == (Fixed(2), Units(0, 24), Fixed(2))
    assert {part.tensor for part in structure.groups[0].readers} == {"lru.C"}


# --- what a state is worth -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: ssm.LRU(4, 6), lambda: ssm.S4D(4, 6)])
def test_the_gate_of_a_layer_is_that_of_its_dynamic_part(make: Callable[[], nn.Module]) -> None:
    """∂/∂g of the loss with g C, by differences in double."""
    torch.manual_seed(0)
    layer = make().double()
    u, target = torch.randn(3, 9, 4).double(), torch.randn(3, 9, 4).double()

    def loss() -> Tensor:
        return (layer(u) - target).square().mean()

    loss().backward()
    named = dict(layer.named_parameters())
    found = float(layer_gate(layer))
    A, B, C = (x.detach().clone() for x in layer.system())
    ends = []
    for g in (1 - 1e-5, 1 + 1e-5):
        with torch.no_grad():
            for name, value in layer.parameters_for(A, B, g * C).items():
                named[name].copy_(value)
            ends.append(float(loss()))
    assert found == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-5)


def test_shares_are_those_of_the_hankel_operator_s_energy() -> None:
    run = started(Net)
    shares = run.controller.plant.shares().split([24, 10, 12, 8])
    for (_, layer), share in zip(ssm.state_space_layers(run.model), shares, strict=True):
        energy = np.square(ssm.values_of(layer)).sum(0)
        pairs = energy[0::2] + energy[1::2]
        np.testing.assert_allclose(share.square().numpy(), pairs / energy.sum(), rtol=1e-5)
        assert (share.diff() <= 0).all()


def test_a_layer_that_matters_less_is_cut_more() -> None:
    """Two alike, side by side, of whose outputs one goes into the loss with a hundredth: it pays."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = ssm.LRU(2, 16, radius=(0.5, 0.95))
            self.b = copy.deepcopy(self.a)
            self.out = nn.Linear(2, 3)

        def forward(self, u: Tensor) -> Tensor:
            return self.out((self.a(u) + 0.01 * self.b(u)).mean(1))

    run = started(Two).train(0, STEPS)
    assert states(run.model)["b"] < states(run.model)["a"]


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "budget"),
    [
        (QUICK, cp.Budget(flops=0.5)),
        (QUICK, cp.Budget(params=0.6)),
        (replace(QUICK, start="budget"), cp.Budget(flops=0.5)),
        (cp.Gradual(), cp.Budget(params=0.6)),
        (cp.Magnitude(), cp.Budget(flops=0.5)),
        (cp.Static(), cp.Budget(flops=0.5)),
    ],
)
def test_a_run_ends_inside_its_budget_plain_and_trained_on(policy: cp.Policy, budget: cp.Budget) -> None:
    dense, size = flops(Net()), sum(p.numel() for p in Net().parameters())
    run = started(Net, policy=policy, budget=budget)
    before = dict(run.model.named_parameters())
    run.train(0, STEPS)
    small = run.controller.finalize()
    if "flops" in budget.targets():
        assert 0.42 * dense < flops(small) <= 0.5 * dense
    else:
        assert 0.5 * size < sum(p.numel() for p in small.parameters()) <= 0.6 * size
    assert small is run.model
    assert all(p is before[name] for name, p in small.named_parameters())
    assert not hooks(small, run.optimizer)
    cross_entropy(small(batch(0)[0]), batch(0)[1]).backward()
    run.optimizer.step()
    ssm.LRU(4, small.lru.states).load_state_dict(small.lru.state_dict())


def test_states_only_ever_go_and_every_cut_has_its_bound() -> None:
    run = started(Net).train(0, STEPS)
    rows = list(run.controller.history)
    assert sum(any(row.off) for row in rows) > 2
    assert not any(any(row.on) for row in rows)
    assert all(row.active == row.widths for row in rows)
    for before, row in itertools.pairwise(rows):
        for name, cut in zip(run.controller.history.names, row.off, strict=True):
            assert (row.bounds[name] > before.bounds[name]) == (cut > 0)
    assert f"2 Σσ of its cuts {rows[-1].bounds['lru.states']:.3g}" in run.controller.report()
    assert dict(rows[-1].bounds) == run.controller.plant.error_bounds


def test_the_bound_is_that_of_the_cut() -> None:
    run = started()
    values = ssm.values_of(run.model.lru)[0]
    run.controller.set_masks({"lru.states": torch.arange(24) < 10})
    bound = run.controller.plant.error_bounds["lru.states"]
    assert 2 * values[20:].sum() <= bound <= 2 * values[18:].sum() + 1e-3


def test_an_update_leaves_the_function_of_what_stays() -> None:
    """What a cut changes is within its bound, of the whole batch's energy."""
    run = started()
    u = torch.randn(4, 200, 2)
    with torch.no_grad():
        before = run.model.lru(u)
        run.controller.set_masks({"lru.states": torch.arange(24) < 12})
        off = run.model.lru(u) - before
    assert off.norm() <= run.controller.plant.error_bounds["lru.states"] * u.norm()


def test_the_same_seed_is_the_same_run() -> None:
    one, two = started(Net).train(0, STEPS), started(Net).train(0, STEPS)
    assert_same_bits(bits(one.model, one.optimizer), bits(two.model, two.optimizer))
    assert timeless(list(one.controller.history)) == timeless(list(two.controller.history))


def test_to_watch_does_not_touch() -> None:
    """Without a cut the training is the one without a controller."""
    run = started(Net, budget=cp.Budget(flops=1.0)).train(0, 10)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(1, 11):
        u, y = batch(step)
        cross_entropy(model(u), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(bits(run.model), bits(model))


# --- saved and resumed ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS[::2])
def test_a_half_and_a_half_are_a_whole(order: tuple[str, ...]) -> None:
    half = 14
    straight = started(Net).train(0, half)
    assert not all(bool(m.all()) for m in straight.controller.masks.values())
    then = straight.saved()
    straight.train(half, STEPS)
    assert any(any(row.off) for row in straight.controller.history if row.step > half)
    resumed = started(Net, seed=1).load(then, order).train(half, STEPS)
    assert_same_bits(bits(straight.model, straight.optimizer), bits(resumed.model, resumed.optimizer))
    assert timeless(list(straight.controller.history)) == timeless(list(resumed.controller.history))
    assert straight.controller.plant.error_bounds == resumed.controller.plant.error_bounds


@pytest.mark.parametrize("order", ORDERS[3:4])
def test_back_to_a_checkpoint_with_more_states(order: tuple[str, ...]) -> None:
    straight = started(Net).train(0, 12)
    then = straight.saved()
    straight.train(12, STEPS)
    end = bits(straight.model, straight.optimizer)
    straight.load(then, order).train(12, STEPS)
    assert_same_bits(end, bits(straight.model, straight.optimizer))


def test_a_small_model_is_saved_and_loaded(tmp_path: Path) -> None:
    run = started(Net).train(0, STEPS)
    cp.save(run.controller, tmp_path / "small.safetensors")
    loaded = cp.load(tmp_path / "small.safetensors", Net())
    u = batch(99)[0]
    assert torch.equal(loaded(u), run.model(u))
    assert states(loaded) == states(run.model)


def test_detach_fills_the_shapes_up_with_idle_states() -> None:
    run = started(Net).train(0, STEPS)
    u = batch(99)[0]
    with torch.no_grad():
        before = run.model(u)
        run.controller.detach()
        assert states(run.model) == {"lru": 24, "both.ahead": 10, "both.back": 12, "filter": 8}
        torch.testing.assert_close(run.model(u), before)
    Net().load_state_dict(run.model.state_dict())
    cross_entropy(run.model(u), batch(99)[1]).backward()
    assert run.model.lru.C.grad[:, -1].any(), "an idle state can learn"
    run.optimizer.step()
    assert not hooks(run.model, run.optimizer)


# --- replicas ------------------------------------------------------------------------------------


@ranks(2)
def test_two_ranks_cut_alike(rank: int) -> None:
    run = started(Net, rank=rank).train(0, STEPS)
    run.controller.finalize()
    assert states(run.model) != states(Net())
    assert_ranks_are_alike(run)


@ranks(2)
def test_a_rank_in_another_basis_is_brought_back(rank: int) -> None:
    """The same masks, other states: as a BLAS that orders eigenvalues otherwise would leave them."""
    torch.manual_seed(0)
    inner = Small()
    optimizer = torch.optim.Adam(inner.parameters(), lr=5e-3)
    model = DDP(inner)
    controller = attach(model, optimizer)
    controller.set_masks({"lru.states": torch.arange(24) < 20})
    plant = controller.plant
    assert isinstance(plant, StatePlant)
    if rank == 1:
        plant._mark[0] ^= 1
        with torch.no_grad():
            inner.lru.nu.copy_(inner.lru.nu.flip(0))
    for step in range(1, 7):
        loss = cross_entropy(model(batch(step, rank)[0]), batch(step, rank)[1])
        loss.backward()
        optimizer.step()
        if step == 4:
            with pytest.warns(UserWarning, match="did not agree"):
                controller.step(loss)
        else:
            controller.step(loss)
        optimizer.zero_grad()
    others = [torch.empty_like(inner.lru.nu) for _ in range(2)]
    torch.distributed.all_gather(others, inner.lru.nu.detach())
    assert torch.equal(*others)


# --- other resources -----------------------------------------------------------------------------


def test_memory_falls_with_the_states() -> None:
    cost = attach(Small(), budget=cp.Budget(memory=0.7))._run.problem.costs["memory"]
    assert cost.value((12,)) < 0.75 * cost.value((24,))
    run = started(budget=cp.Budget(memory=0.7)).train(0, STEPS)
    assert run.controller.cost()["memory"].fraction <= 0.7


@pytest.mark.slow
def test_a_run_ends_inside_a_latency() -> None:
    large = (torch.randn(128, 48, 2),)  # where the state is what takes the time
    run = started(lambda: Small(256), budget=cp.Budget(latency=0.6), deploy_inputs=large).train(0, STEPS)
    run.controller.finalize()
    assert states(run.model)["lru"] < 200
    assert run.controller.history[-1].realised["latency"] <= 0.65


# --- refused by name -----------------------------------------------------------------------------


def test_states_do_not_come_back_by_hand() -> None:
    controller = started().controller
    mask = torch.arange(24) < 12
    controller.set_masks({"lru.states": mask})
    for wrong in (torch.ones(24, dtype=torch.bool), mask.flip(0)):
        with pytest.raises(ValueError, match=r"'lru\.states' cannot have this mask, the nearest has 12 on"):
            controller.set_masks({"lru.states": wrong})
    with pytest.raises(ValueError, match=r"expand: units of lru\.states were truncated away"):
        controller.expand()
    with pytest.raises(ValueError, match="follow: states are cut in another basis"):
        controller.follow(Small())
    assert int(controller.masks["lru.states"].sum()) == 12


@pytest.mark.parametrize("policy", [cp.Rotation(active=0.5), cp.RigL(), cp.SET()])
def test_policies_that_exchange_units_are_refused(policy: cp.Policy) -> None:
    with pytest.raises(ValueError, match="exchanges units, and states that were cut never come back"):
        attach(Small(), policy=policy)


def test_masks_only_are_refused() -> None:
    with pytest.raises(ValueError, match='with granularity="state" units leave the tensors at once'):
        attach(Small(), policy=cp.Control(shrink=False))


def test_a_model_without_states_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match='granularity="state": no layer of this model gives system'):
        attach(model)


def test_layers_that_cannot_be_cut_are_left_alone_and_said_so() -> None:
    model = Net()
    model.lru.requires_grad_(False)
    with torch.no_grad():
        model.filter.C.fill_(torch.nan)
    structure = attach(
        model, ignored_layers=["both.back"], budget=cp.Budget(flops=0.9)
    )._run.problem.structure
    assert structure.names == ("both.ahead.states",)
    reasons = {refusal.name: refusal.reason for refusal in structure.refused}
    assert reasons["lru.states"] == "it is frozen"
    assert reasons["both.back.states"] == "in ignored_layers"
    assert "not finite" in reasons["filter.states"]


def test_a_layer_that_keeps_its_size_is_told() -> None:
    class Keeps(Dense):
        def __init__(self) -> None:
            super().__init__(6)
            self.states = 6

        def forward(self, u: Tensor) -> Tensor:
            return super().forward(u) + torch.zeros(self.states) @ self.C.T

    with pytest.raises(ValueError, match="reads their number off the shapes of its parameters"):
        attach(Keeps())


def test_one_cut_by_others_is_told_once_and_the_training_goes_on() -> None:
    run = started().train(0, 4)
    ssm.truncate(run.model.lru, 20, run.optimizer)
    with pytest.warns(UserWarning, match="it was cut by others"):
        run.train(4, STEPS)
    assert states(run.model) == {"lru": 20}


def test_a_system_that_cannot_be_read_any_more_holds_the_masks() -> None:
    run = started().train(0, 4)
    with torch.no_grad():
        run.model.lru.nu.fill_(-40.0)  # |λ| = 1
    with pytest.warns(UserWarning, match="nothing is controlled"):
        run.train(4, STEPS)
