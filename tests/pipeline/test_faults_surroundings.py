"""Where and how a loop runs is its own: default devices, inference mode, autocast, hooks, handlers."""

from __future__ import annotations

import copy
import signal
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rig import NETS, QUICK, Rig, batch, mlp, rig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import controlprune as cp

SEEN: list[torch.device] = []  # out of reach of what attach puts back


class DefaultDevice:
    """`torch.set_default_device`, and back."""

    def __enter__(self) -> None:
        torch.set_default_device("meta")

    def __exit__(self, *error: object) -> None:
        torch.set_default_device(None)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a default device": DefaultDevice,
    "a device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
}


def made(net: str, around: Callable[[], AbstractContextManager[Any]] = nullcontext, **options: Any) -> Rig:
    make, shape = NETS[net]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs = (torch.randn(4, *shape),)
    settings: dict[str, Any] = {"budget": cp.Budget(flops=0.5), "total_steps": 60, "policy": QUICK, **options}
    with around():
        controller = cp.attach(model, optimizer, example_inputs=inputs, **settings)
    return Rig(model, optimizer, controller, shape)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", AROUND)
def test_all_of_the_controller_runs_there(name: str, net: str) -> None:
    """The same run as anywhere, saved and resumed there too."""
    ends = []
    for around in (AROUND[name], nullcontext):
        run = made(net, around)
        for step in range(60):
            x, y = batch(step, run.shape)
            loss = F.cross_entropy(run.model(x), y)
            loss.backward()
            run.optimizer.step()
            with around():
                run.controller.step(loss)
                if step == 30:
                    run.controller.shrink()
                if step == 40:
                    run.controller.load_state_dict(run.controller.state_dict())
                    assert "groups" in run.controller.report()
            run.optimizer.zero_grad()
        with around():
            small = run.controller.finalize()
        ends.append(small.state_dict())
    for key, value in ends[1].items():
        torch.testing.assert_close(ends[0][key], value)


@pytest.mark.parametrize("net", NETS)
def test_a_whole_loop_under_autocast(net: str) -> None:
    """Its cache knows weights by their address: nothing of a shape that is gone may come from it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = made(net)
        run.train(0, 30)
        run.controller.shrink()
        run.train(30, 60)
        run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5


@pytest.mark.parametrize("name", ["a default device", "a device context"])
def test_the_users_code_finds_the_users_default_device(name: str) -> None:
    SEEN.clear()

    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            SEEN.append(torch.zeros(1).device)
            return self.inner(x)

    model, x = Makes(), torch.zeros(2, 8)
    with AROUND[name]():
        cp.find_groups(model, (x,))
    assert {device.type for device in SEEN} == {"meta"}


def test_a_model_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match=r"model: it was made in torch\.inference_mode\(\)"):
        cp.attach(
            model, None, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),), total_steps=10
        )


# --- optimizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [False, True])
def test_a_step_inside_the_backward_pass(shrink: bool) -> None:
    """One optimizer per parameter, stepped and cleared by a hook as its gradient lands."""
    torch.manual_seed(0)
    model = mlp()
    each = {p: torch.optim.SGD([p], lr=0.05, momentum=0.9) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    controller = cp.attach(
        model,
        list(each.values()),
        budget=cp.Budget(flops=0.5),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=60,
        policy=replace(QUICK, shrink=False),
    )
    for n in range(60):
        x, y = batch(n, (8,))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        controller.step(loss)
        if shrink and n == 30:
            controller.shrink()
    assert controller.skipped == 0
    assert controller.cost()["flops"].fraction <= 0.5
    F.cross_entropy(controller.finalize()(x), y).backward()


class InGroups(torch.optim.Optimizer):
    """Momentum that is kept beside the parameters of a group, not in `state`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            moments = group.setdefault("moments", [torch.zeros_like(p) for p in group["params"]])
            for p, moment in zip(group["params"], moments, strict=True):
                if p.grad is not None:
                    p.sub_(moment.mul_(0.9).add_(p.grad), alpha=group["lr"])


class InNumpy(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p].setdefault("moment", np.zeros(p.shape, np.float32))
                kept += p.grad.numpy()
                p.sub_(torch.from_numpy(kept), alpha=group["lr"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (InGroups, r"InGroups keeps a tensor of shape .* in its param_groups\[0\]\['moments'\], outside"),
        (InNumpy, r"InNumpy state 'moment' of .* is a ndarray; only plain tensors can be carried"),
    ],
)
def test_state_that_its_first_step_will_make_is_refused_before(kind: Any, message: str) -> None:
    model = mlp()
    optimizer = kind(model.parameters())
    with pytest.raises(ValueError, match=message):
        cp.attach(
            model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),), total_steps=10
        )
    assert "moments" not in optimizer.param_groups[0]
    assert not optimizer.state


# --- losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [QUICK, replace(QUICK, shrink=False)])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-40, 2.0**60, 2.0**96])
def test_a_loss_of_any_size_gives_the_same_run(scale: float, policy: cp.Control) -> None:
    """The optimizer divides by what the loss is multiplied with: nothing else differs."""
    ends = []
    for by in (1.0, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05 / by)
        controller = cp.attach(
            model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),),
            total_steps=60, policy=policy,
        )  # fmt: skip
        for step in range(60):
            x, y = batch(step, (8,))
            loss = F.cross_entropy(model(x), y) * by
            loss.backward()
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()
        assert controller.skipped == 0
        controller.finalize()
        ends.append(controller.masks)
    assert all(torch.equal(mask, ends[1][name]) for name, mask in ends[0].items())


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_numbers_as_losses(kind: Any) -> None:
    run = rig()
    run.train(0, 4)
    run.controller.step(kind(0.5))
    assert run.controller.metrics()["steps/skipped"] == 1.0, "the optimizer did not run, the loss is one"


# --- handlers -------------------------------------------------------------------------------------------


class Late(Exception):
    pass


def test_what_a_handler_raises_is_the_users() -> None:
    """Also while gate gradients are read: it is no trouble of the controller's, and is not swallowed."""

    def handler(*_: object) -> None:
        raise Late

    run = rig()
    run.train(0, 3)
    plant: Any = run.controller.plant
    read = plant.gate_gradient

    def slow(*args: Any) -> Tensor:
        signal.raise_signal(signal.SIGALRM)
        return read(*args)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        plant.gate_gradient = slow
        with pytest.raises(Late):
            run.train(3, 5)
        plant.gate_gradient = read
    finally:
        signal.signal(signal.SIGALRM, before)
    run.optimizer.zero_grad()
    run.train(5, 120)  # a warning that it sees nothing would be an error
    run.controller.finalize()


# --- what others change in mid-run ----------------------------------------------------------------------


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[3], "weight", 0.3)


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model[3])


def widened(model: Any) -> None:
    model[5] = nn.Linear(24, 6)


@pytest.mark.parametrize("change", [pruned, parametrized, widened])
def test_a_model_that_others_change_trains_to_its_end(change: Callable[[nn.Module], None]) -> None:
    run = rig(policy=replace(QUICK, shrink=False))
    run.train(0, 40)
    change(run.model)
    held = run.controller.masks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(40, 120)
    told = [str(w.message) for w in caught]
    assert "nothing is controlled, the masks hold: model: its tensor" in told[0]
    assert len(told) == 1, told
    assert all(torch.equal(held[name], mask) for name, mask in run.controller.masks.items())
    with pytest.raises(RuntimeError, match=r"model: its tensor '.*' is .* by others since"):
        run.controller.finalize()


def test_what_was_undone_can_be_finalized() -> None:
    run = rig(policy=replace(QUICK, shrink=False))
    run.train(0, 40)
    pruned(run.model)
    with pytest.warns(UserWarning, match="nothing is controlled"):
        run.train(40, 120)
    prune.remove(run.model[3], "weight")  # type: ignore[index]
    run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5


def test_new_parameters_under_old_names_are_taken() -> None:
    """At the next update: what was dormant is silent in them too."""
    run = rig(policy=replace(QUICK, shrink=False))
    run.train(0, 60)
    layer: Any = run.model[3]  # type: ignore[index]
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    run.optimizer.add_param_group({"params": [layer.weight]})
    run.train(60, 70)
    off = ~run.controller.masks["0"]
    assert off.any()
    assert not layer.weight[:, off].any()
    x, _ = batch(0, (8,))
    run.model.eval()
    expected = run.model(x)
    run.controller.shrink()
    torch.testing.assert_close(run.model(x), expected)


# --- frozen consumers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_units_that_a_frozen_layer_reads_are_ranked_by_norm(
    late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Their gates have no gradient: zero would say that they are worth nothing."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    model[4].requires_grad_(late)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    norms = model[4].weight.detach().square().sum(0)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),), total_steps=60,
        policy=replace(QUICK, shrink=False, revise_every=0),  # of what is off the norm tells nothing
    )  # fmt: skip
    model[4].requires_grad_(False)
    run = Rig(model, optimizer, controller, (8,))
    run.train(0, 60)
    assert caplog.text.count("what reads the units of '2' is frozen") == 1
    on = controller.masks["2"]
    assert 8 <= int(on.sum()) < 24, "about as deep as the other group"
    assert norms[on].min() >= norms[~on].max()
    assert controller.skipped == 0


def test_all_consumers_frozen_is_no_loop_without_gradients(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    model[2].requires_grad_(False)
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.01)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),), total_steps=60
    )
    run = Rig(model, optimizer, controller, (8,))
    run.train(0, 60)
    assert caplog.text.count("is frozen") == 1
    assert controller.cost()["flops"].fraction <= 0.5


def test_copies_are_what_they_were() -> None:
    """The hooks of a resting layout stay with the model that they are of."""
    run = rig(policy=replace(QUICK, shrink=False))
    run.train(0, 60)
    twin = copy.deepcopy(run.model)
    before = copy.deepcopy(twin.state_dict())
    run.train(60, 70)
    assert all(torch.equal(before[k], v) for k, v in twin.state_dict().items())
