"""Attach, masks by hand, detach: nothing of the user's is changed that was not asked for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from rig import QUICK, Rig, assert_same_bits, batch, bits, flops, hooks, rig, timeless
from torch import nn

import controlprune as cp
from controlprune.structure.extents import keep

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator beside the CPU")
QUIET = cp.Control(update_every=10**6, observe_every=1, freeze=1.0)  # observes, decides nothing


def test_attach_then_detach_is_nothing() -> None:
    for net in ("mlp", "residual"):
        run = rig(net)
        model, optimizer = run.model, run.optimizer
        identities, before = [id(p) for p in model.parameters()], bits(model, optimizer)
        attributes = [sorted(vars(m)) for m in model.modules()]
        assert hooks(model, optimizer) > 0
        assert run.controller.detach() is model
        assert hooks(model, optimizer) == 0
        assert_same_bits(before, bits(model, optimizer))
        assert [id(p) for p in model.parameters()] == identities
        assert [sorted(vars(m)) for m in model.modules()] == attributes


def test_attaching_consumes_no_random_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, state = bits(model, optimizer), torch.get_rng_state()
    cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),), total_steps=10
    ).detach()
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(before, bits(model, optimizer))


@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_a_run_with_nothing_to_cut_is_the_users_own(net: str) -> None:
    """Observing disturbs neither weights nor BatchNorm nor the random numbers."""
    run, alone = (rig(net, budget=cp.Budget(flops=1.0), total_steps=50, policy=QUICK) for _ in range(2))
    alone.controller.detach()
    run.train(0, 50)
    assert (run.controller.state_dict()["loop"]["units"]["moments"]["count"] > 0).all()
    for step in range(1, 51):
        torch.manual_seed(step)
        x, y = batch(step, alone.shape)
        nn.functional.cross_entropy(alone.model(x), y).backward()
        alone.optimizer.step()
        alone.optimizer.zero_grad()
    assert_same_bits(bits(run.model, run.optimizer), bits(alone.model, alone.optimizer))


def half_off(run: Rig) -> dict[str, torch.Tensor]:
    return {g.name: torch.arange(g.size) % 2 == 0 for g in run.controller.groups}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_detach_gives_back_all_learned_weights(net: str, compact: bool) -> None:
    run = rig(net, "sgd", policy=QUIET)
    run.train(0, 10)
    parked = {k: v.detach().clone() for k, v in run.model.named_parameters()}
    masks = half_off(run)
    run.controller.set_masks(masks)
    if compact:
        run.controller.shrink()
    run.train(10, 20)
    run.controller.expand()
    live = {k: v.detach().clone() for k, v in run.model.named_parameters()}
    run.controller.detach()
    assert hooks(run.model, run.optimizer) == 0
    ordered = [masks[g.name] for g in run.controller.groups]
    moved = 0
    for name, p in run.model.named_parameters():
        alive = torch.ones(p.shape, dtype=torch.bool)
        for dim, extent in enumerate(run.controller.plant.structure.tensors[name]):
            shape = [-1 if d == dim else 1 for d in range(p.ndim)]
            alive &= keep(extent, ordered).reshape(shape)
        assert torch.equal(p.detach()[~alive], parked[name][~alive]), name
        assert torch.equal(p.detach()[alive], live[name][alive]), name
        moved += int((p.detach()[alive] != parked[name][alive]).sum())
    assert moved > 100


def test_masks_are_applied_exactly_and_cost_follows() -> None:
    run = rig("residual", policy=QUIET)
    run.train(0, 5)
    x = batch(0, run.shape)[0][:2]
    dense = flops(run.model, x)
    masks = half_off(run)
    run.controller.set_masks(masks)
    assert all(torch.equal(masks[n], m) for n, m in run.controller.masks.items())
    assert flops(run.model, x) == dense  # masked: the tensors keep their shapes
    run.model.eval()
    masked = run.model(x)
    run.controller.shrink()
    torch.testing.assert_close(run.model(x), masked)
    cost = run.controller.cost()["flops"]
    assert cost.value == flops(run.model, x)
    assert cost.dense == dense
    assert cost.fraction == cost.value / dense
    assert cost.per_example == cost.value / 2
    assert cost.unit == "FLOP"
    run.controller.expand()
    torch.testing.assert_close(run.model(x), masked, rtol=0, atol=0)
    first = run.controller.groups[0].name
    run.controller.set_masks({first: torch.ones_like(masks[first])})  # the others keep theirs
    assert run.controller.masks[first].all()
    assert all(torch.equal(masks[n], m) for n, m in run.controller.masks.items() if n != first)


def test_masks_that_are_handed_out_are_copies() -> None:
    run = rig()
    for mask in run.controller.masks.values():
        mask.zero_()
    assert all(m.all() for m in run.controller.masks.values())


def test_a_report_names_groups_and_refusals() -> None:
    run = rig("residual")
    run.train(0, 60)
    text = run.controller.report()
    for group in run.controller.groups:
        assert group.name in text
    assert "60 steps, 0 skipped" in text
    assert "sets of widths" in text


def test_ignored_layers_and_round_to() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.7),
        example_inputs=(torch.zeros(1, 8),),
        total_steps=20,
        ignored_layers=(model[4],),
        round_to=8,
    )
    assert [g.size for g in controller.groups] == [32]
    controller.finalize()
    assert model[0].out_features in (8, 16, 24)
    assert model[2].out_features == 24


def test_no_cycle_keeps_a_detached_controller() -> None:
    run = rig()
    run.train(0, 5)
    run.controller.detach()
    model, reference = run.model, weakref.ref(run.controller)
    del run
    gc.collect()
    assert reference() is None
    assert model is not None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_parking_on_the_host_changes_nothing(net: str, device: str) -> None:
    """Shrinks, looks, checkpoints and returns, with what is absent here or on the host."""
    runs = [rig(net, total_steps=80, shrink_at=24, device=device, park_on=park) for park in (None, "cpu")]
    for run in runs:
        run.train(0, 60)
        run.controller.load_state_dict(run.controller.state_dict())
        run.train(60, 80)
    beside, host = (run.controller.plant for run in runs)
    assert any("look" in row.event for row in runs[1].controller.history)
    homes = [
        home for spot in host.spots for home in (spot.home, *spot.state_home.values()) if home is not None
    ]
    assert homes
    assert {home.device.type for home in homes} == {"cpu"}
    assert timeless(runs[0].controller.history) == timeless(runs[1].controller.history)
    for plant in (beside, host):
        plant.release()
    assert_same_bits(bits(runs[0].model, runs[0].optimizer), bits(runs[1].model, runs[1].optimizer))


def test_warnings_point_at_the_users_line() -> None:
    run = rig(total_steps=1)
    with pytest.warns(UserWarning, match="past total_steps") as seen:
        run.train(0, 2)
    assert seen[0].filename.endswith("rig.py")


def test_warnings_from_inside_an_optimizer_do_too() -> None:
    run = rig()
    plant: Any = run.controller.plant
    plant.gate_gradient = None  # calling it raises
    x, y = batch(0, run.shape)

    def loss() -> torch.Tensor:
        value = nn.functional.cross_entropy(run.model(x), y)
        value.backward()
        return value

    with pytest.warns(UserWarning, match="gate gradients cannot be read here") as seen:
        run.optimizer.step(loss)

    assert seen[0].filename == __file__
