"""Every error names the argument, its value and what to do, and leaves model and optimizer as they were."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rig import QUICK, assert_same_bits, batch, bits, hooks, mlp, rig
from torch import Tensor, nn

import controlprune as cp


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with a history: gradients, optimizer state, a submodule in eval mode, a frozen bias."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = batch(0, (8,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    model[1].eval()
    model[5].bias.requires_grad_(False)
    return model, optimizer


ATTACH: dict[str, Any] = {
    "budget": cp.Budget(flops=0.5),
    "example_inputs": (torch.zeros(2, 8),),
    "total_steps": 100,
}
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "budget of another kind": ({"budget": 0.5}, TypeError, r"budget=0\.5: give controlprune\.Budget"),
    "unreachable": (
        {"budget": cp.Budget(flops=0.001)},
        cp.InfeasibleBudget,
        r"flops <= .*feasible: .* to .*of dense up",
    ),
    "unreachable params": ({"budget": cp.Budget(flops=0.9, params="7")}, cp.InfeasibleBudget, "params <= 7"),
    "nothing to meter with": ({"budget": cp.Budget(energy=0.5)}, ValueError, "state the power drawn"),
    "faster than can be": ({"budget": cp.Budget(latency="1 ns")}, cp.InfeasibleBudget, "latency <= 1e-09"),
    "no steps": ({"total_steps": 0}, ValueError, "total_steps=0: give"),
    "negative steps": ({"total_steps": -3}, ValueError, "total_steps=-3: give"),
    "half a step": ({"total_steps": 1.5}, ValueError, r"total_steps=1\.5: give"),
    "a word of steps": ({"total_steps": "many"}, ValueError, "total_steps='many': give"),
    "true steps": ({"total_steps": True}, ValueError, "total_steps=True: give"),
    "inputs too wide": ({"example_inputs": (torch.zeros(2, 9),)}, ValueError, "example_inputs do not fit"),
    "too many inputs": (
        {"example_inputs": (torch.zeros(2, 8), torch.zeros(2, 8))},
        ValueError,
        "example_inputs do not fit",
    ),
    "unknown keyword": (
        {"example_inputs": {"image": torch.zeros(2, 8)}}, ValueError, "example_inputs do not fit"
    ),
    "other inputs than it takes": (
        {"budget": cp.Budget(latency=0.5), "deploy_inputs": (torch.zeros(2, 9),)},
        ValueError,
        "deploy_inputs: the model's forward does not take them: .*shapes",
    ),
    "unknown layer": ({"ignored_layers": ["head"]}, ValueError, "ignored_layers: .* 'head'"),
    "all layers ignored": (
        {"ignored_layers": ["0", "3", "5"]}, ValueError, "nothing in Sequential can be pruned"
    ),
    "parked nowhere": ({"park_on": "gpu3"}, ValueError, "park_on='gpu3': give a device that is here"),
    "parked without values": ({"park_on": "meta"}, ValueError, "park_on='meta': it keeps no values"),
    "no width": ({"round_to": 0}, ValueError, "round_to=0: give"),
    "no policy": ({"policy": "magnitude"}, TypeError, "policy='magnitude': give a policy object"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_attach_refuses_and_changes_nothing(name: str) -> None:
    arguments, kind, message = WRONG[name]
    model, optimizer = trained()
    before, names, state = bits(model, optimizer), list(model.state_dict()), torch.get_rng_state()
    with pytest.raises(kind, match=message):
        cp.attach(model, optimizer, **{**ATTACH, **arguments})
    assert_same_bits(before, bits(model, optimizer))
    assert (names, hooks(model, optimizer)) == (list(model.state_dict()), 0)
    assert torch.equal(state, torch.get_rng_state())
    cp.attach(model, optimizer, **ATTACH).detach()  # nothing stands in the way of a right call


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, "3 apples", "", "0%", "-5%", True, [0.5]])
def test_a_budget_that_is_none(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Budget\(flops=.*\)"):
        cp.Budget(flops=value)
    with pytest.raises((ValueError, TypeError), match=r"Budget\(params=.*\)"):
        cp.Budget(params=value)


def test_an_unreachable_budget_tells_the_range() -> None:
    model, optimizer = trained()
    with pytest.raises(cp.InfeasibleBudget) as caught:
        cp.attach(model, optimizer, **{**ATTACH, "budget": cp.Budget(flops=0.01, params=0.01)})
    least, dense = caught.value.ranges["flops"]
    assert dense == 2 * 2 * (8 * 32 + 32 * 24 + 24 * 4)
    lowest = cp.Budget(flops=least / dense * 1.0001)
    controller = cp.attach(model, optimizer, **{**ATTACH, "budget": lowest})
    controller.finalize()
    assert controller.cost()["flops"].value == least


@pytest.mark.parametrize("wrong", [nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 4), nn.ReLU())])
def test_a_model_in_which_nothing_can_be_pruned(wrong: nn.Module) -> None:
    optimizer = torch.optim.SGD(wrong.parameters(), lr=0.1)
    before = bits(wrong, optimizer)
    with pytest.raises(ValueError, match=r"model: nothing in .* can be pruned"):
        cp.attach(wrong, optimizer, **ATTACH)
    assert_same_bits(before, bits(wrong, optimizer))


def test_arguments_of_another_kind() -> None:
    model, optimizer = trained()
    with pytest.raises(TypeError, match="model=function: give a torch"):
        cp.attach(mlp, optimizer, **ATTACH)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer=list: give a torch"):
        cp.attach(model, [], **ATTACH)  # type: ignore[arg-type]


def test_attach_twice() -> None:
    model, optimizer = trained()
    controller = cp.attach(model, optimizer, **ATTACH)
    before = hooks(model, optimizer)
    with pytest.raises(RuntimeError, match=r"model: a controller is attached.*finalize\(\) or detach\(\)"):
        cp.attach(model, optimizer, **ATTACH)
    assert hooks(model, optimizer) == before
    controller.detach()
    controller = cp.attach(model, optimizer, **ATTACH)
    small = controller.finalize()
    cp.attach(small, optimizer, **{**ATTACH, "budget": cp.Budget(flops=0.7)}).detach()  # a second round


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch, as it imports its compiler
@pytest.mark.parametrize("compile_it", [torch.compile, lambda m: (m.compile(), m)[1]])
def test_attach_after_compile(compile_it: Callable[[nn.Module], nn.Module]) -> None:
    model, optimizer = trained()
    compiled = compile_it(model)
    with pytest.raises(ValueError, match=r"model: torch\.compile has already wrapped it; attach first"):
        cp.attach(compiled, optimizer, **ATTACH)
    model, optimizer = trained()
    inside = nn.Sequential(model, nn.Identity())
    inside[0] = compile_it(model)
    with pytest.raises(ValueError, match=r"torch\.compile has already wrapped it"):
        cp.attach(inside, optimizer, **ATTACH)


def test_an_optimizer_that_misses_parameters() -> None:
    model, _ = trained()
    optimizer = torch.optim.SGD([model[0].weight, model[5].weight], lr=0.1)
    before = bits(model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer: .*hold 3 .*0\.bias, 3\.weight, 3\.bias.*freeze"):
        cp.attach(model, optimizer, **ATTACH)
    assert_same_bits(before, bits(model, optimizer))
    for p in (model[0].bias, model[3].weight, model[3].bias):
        p.requires_grad_(False)
    cp.attach(model, optimizer, **ATTACH).detach()  # frozen ones may be missing


def test_optimizers_whose_state_cannot_follow() -> None:
    model, _ = trained()
    optimizer = torch.optim.LBFGS(p for p in model.parameters() if p.requires_grad)
    before = bits(model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer: LBFGS keeps .*; use"):
        cp.attach(model, optimizer, **ATTACH)
    assert_same_bits(before, bits(model, optimizer))
    assert hooks(model, optimizer) == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["history"] = torch.zeros(40, 8)
    with pytest.raises(ValueError, match=r"optimizer: SGD state 'history' of .*'0\.weight'.*\(40, 8\)"):
        cp.attach(model, optimizer, **ATTACH)
    assert hooks(model, optimizer) == 0


# --- while it runs --------------------------------------------------------------------------------

NAMES = tuple(g.name for g in rig().controller.groups)
MASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown name": ({"head": torch.ones(32).bool()}, ValueError, r"masks: no group is called 'head'; the"),
    "wrong shape": ({NAMES[0]: torch.ones(31).bool()}, ValueError, rf"masks: '{NAMES[0]}' has shape \(31,\)"),
    "floats": ({NAMES[0]: torch.ones(32)}, TypeError, rf"masks: '{NAMES[0]}' is torch.float32; give"),
    "a list": ({NAMES[0]: [True] * 32}, TypeError, rf"masks: '{NAMES[0]}' is list; give"),
    "all off": ({NAMES[0]: torch.zeros(32).bool()}, ValueError, rf"masks: '{NAMES[0]}' has no active unit"),
    "one right, one wrong": (
        {NAMES[0]: torch.arange(32) > 3, NAMES[1]: torch.ones(3).bool()}, ValueError, rf"masks: '{NAMES[1]}'"
    ),
    "no mapping": ([torch.ones(32).bool()], TypeError, "masks=list: give a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("compact", [False, True])
def test_masks_that_do_not_fit(name: str, compact: bool) -> None:
    masks, kind, message = MASKS[name]
    run = rig()
    run.train(0, 2)
    run.controller.set_masks({NAMES[0]: torch.arange(32) % 3 > 0})
    if compact:
        run.controller.shrink()
    before, held = bits(run.model, run.optimizer), run.controller.masks
    with pytest.raises(kind, match=message):
        run.controller.set_masks(masks)
    assert_same_bits(before, bits(run.model, run.optimizer))
    assert all(torch.equal(held[n], m) for n, m in run.controller.masks.items())


def test_steps_without_gradients() -> None:
    """One is nothing: a part of a model may rest. Many in a row are said, and then it goes on."""
    run = rig()
    run.train(0, 3)
    before = bits(run.model, run.optimizer)
    for _ in range(9):
        run.optimizer.step()  # no backward
        run.controller.step(torch.tensor(1.0))
    assert_same_bits(before, bits(run.model, run.optimizer))
    run.optimizer.step()
    with pytest.warns(UserWarning, match=r"no parameter of the prunable layers had a gradient.*backward\(\)"):
        run.controller.step(torch.tensor(1.0))
    run.train(13, 60)  # it goes on, and says no more


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (torch.ones(3), ValueError, r"loss has shape \(3,\): give the scalar"),
        ([0.3], TypeError, "loss=list: give the scalar"),
        ("0.3", TypeError, "loss=str: give"),
        (True, TypeError, "loss=bool: give"),
    ],
)
def test_a_loss_that_is_none(loss: Any, kind: type[Exception], message: str) -> None:
    run = rig()
    with pytest.raises(kind, match=message):
        run.controller.step(loss)
    assert run.controller.steps == 0


def spoil_loss(run: Any, loss: Tensor, value: float) -> Tensor:
    return loss.detach() * 0 + value


def spoil_gradient(run: Any, loss: Tensor, value: float) -> Tensor:
    run.model[3].weight.grad[2, 5] = value
    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_a_step_that_is_not_finite_is_skipped_and_counted(spoil: Callable[..., Tensor], value: float) -> None:
    """Every second step is spoilt (the user's clipping notices and leaves the weights alone): nothing of it
    reaches the statistics, and no decision is taken on it."""
    run = rig(total_steps=60)
    clean = rig(total_steps=60)
    for step in range(1, 21):
        run.train(step - 1, step)
        clean.train(step - 1, step)
    before, state = run.controller.masks, run.controller.state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(25):
            x, y = batch(99, (8,))
            loss = nn.functional.cross_entropy(run.model(x), y)
            loss.backward()
            loss = spoil(run, loss, value)
            weights = copy.deepcopy(run.model.state_dict())
            run.optimizer.step()
            run.model.load_state_dict(weights)  # what a careful user's loop does
            run.controller.step(loss)
            run.optimizer.zero_grad()
    assert run.controller.skipped == 25
    told = [str(w.message) for w in caught]
    assert len(told) == 1
    assert "10 steps in a row were not observed" in told[0]
    assert all(torch.equal(before[n], m) for n, m in run.controller.masks.items())
    after = run.controller.state_dict()
    for key, vector in state["loop"]["units"]["moments"].items():
        assert torch.equal(vector, after["loop"]["units"]["moments"][key])
    if spoil is spoil_loss:
        assert after["loop"]["trend"] == state["loop"]["trend"]
    assert len(after["history"]["rows"]) == len(state["history"]["rows"])


def test_a_streak_ends_with_a_good_step() -> None:
    run = rig(total_steps=60)
    for step in range(18):  # nine bad ones, twice: nothing to tell
        run.train(step, step + 1)
        if step % 9 == 8:
            for _ in range(9):
                run.controller.step(torch.tensor(math.nan))
    assert run.controller.skipped == 18


def test_a_skipped_optimizer_step_is_a_skipped_observation() -> None:
    run = rig(total_steps=60)
    run.train(0, 4)
    observed = run.controller.state_dict()["loop"]["units"]["moments"]["count"]
    run.controller.step(torch.tensor(1.0))  # optimizer.step() did not run
    assert run.controller.skipped == 1
    assert torch.equal(run.controller.state_dict()["loop"]["units"]["moments"]["count"], observed)


def test_past_the_horizon_one_warning_and_training_goes_on() -> None:
    run = rig(total_steps=40)
    run.train(0, 40)
    masks, rows = run.controller.masks, len(run.controller.history)
    before = bits(run.model)
    with pytest.warns(UserWarning, match="step 41 is past total_steps=40; the masks hold"):
        run.train(40, 41)
    run.train(41, 60)  # a second warning would be an error
    assert all(torch.equal(masks[n], m) for n, m in run.controller.masks.items())
    assert len(run.controller.history) == rows
    assert any(not torch.equal(before[k], v) for k, v in bits(run.model).items() if k.startswith("state"))
    run.controller.finalize()


@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_after_the_end(end: str) -> None:
    run = rig(total_steps=40)
    run.train(0, 20)
    getattr(run.controller, end)()
    before = bits(run.model, run.optimizer)
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: run.controller.step(torch.tensor(1.0)),
        "finalize": run.controller.finalize,
        "detach": run.controller.detach,
        "shrink": run.controller.shrink,
        "expand": run.controller.expand,
        "set_masks": lambda: run.controller.set_masks({}),
        "follow": lambda: run.controller.follow(mlp()),
        "state_dict": run.controller.state_dict,
        "load_state_dict": lambda: run.controller.load_state_dict({}),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: this controller was finalized or detached; attach"):
            call()
    assert_same_bits(before, bits(run.model, run.optimizer))
    assert run.controller.cost()["flops"].value > 0  # reading still works
    assert len(run.controller.history) > 0
    assert "groups" in run.controller.report()


def test_settings_of_the_policy() -> None:
    for wrong in (
        {"update_every": 0}, {"freeze": -0.1}, {"looks": -1}, {"stages": 0}, {"dwell": -1},
    ):  # fmt: skip
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}: give"):
            cp.Control(**wrong)  # type: ignore[arg-type]
    assert QUICK.update_every == 4
