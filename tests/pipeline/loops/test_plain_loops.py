"""Loops of torch alone: closures, accumulation, steps without a loss, optimizers of every build.

Each goes through a whole run, until the net is small and inside its budget.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import rig
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import controlprune as cp

STEPS, BUDGET = 60, 0.5
QUICK = cp.Control(observe_every=1, update_every=4)
X = torch.zeros(2, 8)


def attached(model: nn.Module, optimizer: Any, steps: int = STEPS, **options: Any) -> cp.Controller:
    options = {"policy": QUICK, "budget": cp.Budget(flops=BUDGET), **options}
    return cp.attach(model, optimizer, example_inputs=(X,), total_steps=steps, **options)


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def batches(steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(1, steps + 1):
        torch.manual_seed(step)  # for dropout
        yield rig.batch(step, (8,))


def assert_small(model: nn.Module, controller: cp.Controller) -> None:
    """It was small before the end already, and is inside the budget after it; it trains on."""
    dense = rig.flops(rig.mlp(), X)
    assert controller.history[-1].realised["flops"] <= BUDGET
    assert controller.skipped == 0
    controller.finalize()
    assert 0.8 * BUDGET * dense <= rig.flops(model, X) <= BUDGET * dense
    cross_entropy(model(X), torch.zeros(2, dtype=torch.long)).backward()


# --- closures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["position", "keyword"])
@pytest.mark.parametrize("loss_given", [True, False])
def test_a_closure(by: str, loss_given: bool) -> None:
    model = rig.mlp()
    optimizer = adam(model.parameters())
    controller = attached(model, optimizer)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure) if by == "position" else optimizer.step(closure=closure)
        controller.step(loss if loss_given else None)
    assert controller.history[-1].loss < 1.2  # known, given or not
    assert_small(model, controller)


def closed_run(*, closed: bool) -> tuple[nn.Module, list[tuple[int, ...]]]:
    torch.manual_seed(0)
    model = rig.mlp()
    optimizer = adam(model.parameters())
    controller = attached(model, optimizer)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure) if closed else closure()
        if not closed:
            optimizer.step()
        controller.step(loss)
    return model, [row.active for row in controller.history]


def test_a_closure_is_the_run_without_one() -> None:
    """The same batches, the same widths, the same weights bit for bit."""
    (model, widths), (other, theirs) = closed_run(closed=True), closed_run(closed=False)
    assert widths == theirs
    assert widths[0] != widths[-1]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_accumulation_inside_a_closure() -> None:
    model = rig.mlp()
    optimizer = adam(model.parameters())
    controller = attached(model, optimizer)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            optimizer.zero_grad()
            parts = [cross_entropy(model(a), b) / 4 for a, b in zip(x.chunk(4), y.chunk(4), strict=True)]
            for part in parts:
                part.backward()
            return sum(part.item() for part in parts)

        optimizer.step(closure)  # a closure may give a plain number
        controller.step()
    assert_small(model, controller)


# --- what a step is -------------------------------------------------------------------------------


def test_a_step_without_a_loss() -> None:
    model = rig.mlp()
    optimizer = adam(model.parameters())
    controller = attached(model, optimizer)
    for x, y in batches():
        cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert all(row.loss != row.loss for row in controller.history)  # not known, and not made up
    assert_small(model, controller)


@pytest.mark.parametrize("every", [2, 3, 8])
@pytest.mark.parametrize("per", ["micro-batch", "optimizer step"])
def test_accumulated_batches(every: int, per: str) -> None:
    """Called for each batch or once for all of them: no update is lost, and none is made on old gradients."""
    steps = 30
    model = rig.mlp()
    optimizer = adam(model.parameters())
    calls = steps * every if per == "micro-batch" else steps
    controller = attached(model, optimizer, calls, policy=cp.Control(observe_every=1, update_every=4))
    for n, (x, y) in enumerate(batches(steps * every), 1):
        loss = cross_entropy(model(x), y) / every
        loss.backward()
        if n % every == 0:
            optimizer.step()
        if per == "micro-batch" or n % every == 0:
            controller.step(loss)
        if n % every == 0:
            optimizer.zero_grad()
    rows = [row.step for row in controller.history]
    assert len(rows) >= (calls / 4 if per == "optimizer step" else min(calls / 4, steps)) - 1
    if per == "micro-batch":
        assert all(step % every == 0 for step in rows)
    assert_small(model, controller)


def test_what_was_asked_for_while_the_optimizer_did_not_run_is_read_when_it_does() -> None:
    model = rig.mlp()
    optimizer = adam(model.parameters())
    controller = attached(model, optimizer, 120, policy=cp.Control(observe_every=2, update_every=1000))
    for n, (x, y) in enumerate(batches(30), 1):
        loss = cross_entropy(model(x), y)
        loss.backward()
        if n % 3 == 0:
            optimizer.step()
        controller.step(loss)
        if n % 3 == 0:
            optimizer.zero_grad()
    count = controller.state_dict()["loop"]["units"]["moments"]["count"]
    assert torch.equal(count, torch.full_like(count, 10))  # each of the ten runs, though every sixth is asked


def test_several_runs_of_the_optimizer_to_one_step() -> None:
    model = rig.mlp()
    optimizer = adam(model.parameters())
    controller = attached(model, optimizer, STEPS // 2)
    for n, (x, y) in enumerate(batches(), 1):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if n % 2 == 0:
            controller.step()
    assert_small(model, controller)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_on_accumulated_batches(fused: bool) -> None:
    model = rig.mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    controller = attached(model, optimizer)
    for n, (x, y) in enumerate(batches(), 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x), y) / 2
        scaler.scale(loss).backward()
        if n % 2 == 0:
            scaler.step(optimizer)
            scaler.update()
        controller.step(loss)
        if n % 2 == 0:
            optimizer.zero_grad()
    assert_small(model, controller)


# --- optimizers -----------------------------------------------------------------------------------


class SAM(Optimizer):
    """Sharpness-aware minimisation as it is commonly written: two steps around a base optimizer."""

    def __init__(self, parameters: Iterable[nn.Parameter], base: type[Optimizer], rho: float, **options: Any):
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / float(norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


@pytest.mark.parametrize("how", ["two steps", "closure"])
def test_sharpness_aware_minimisation(how: str) -> None:
    model = rig.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.05, lr=0.05, momentum=0.9)
    controller = attached(model, optimizer)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = closure()
        if how == "closure":
            optimizer.step(closure)
        else:
            optimizer.first_step()
            closure()
            optimizer.second_step()
        controller.step(loss)
        optimizer.zero_grad()
    assert_small(model, controller)
    for p in model.parameters():
        assert optimizer.state[p]["old_p"].shape == p.shape
        assert optimizer.base_optimizer.state[p]["momentum_buffer"].shape == p.shape


def test_both_parts_of_a_nested_optimizer_are_carried_exactly() -> None:
    """Its momentum and its saved weights are parked and come back as they were."""
    model = rig.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.05, lr=0.05, momentum=0.9)
    controller = attached(model, optimizer, policy=cp.Control(update_every=1000))
    for x, y in batches(5):
        cross_entropy(model(x), y).backward()
        optimizer.first_step()
        cross_entropy(model(x), y).backward()
        optimizer.second_step()
        controller.step()
        optimizer.zero_grad()
    reader = model[3].weight
    inner = optimizer.base_optimizer.state
    before = [reader.detach().clone(), optimizer.state[reader]["old_p"].clone()]
    before.append(inner[reader]["momentum_buffer"].clone())
    name, size = controller.groups[0].name, controller.groups[0].size
    controller.set_masks({name: torch.arange(size) % 3 > 0})
    controller.shrink()
    assert inner[reader]["momentum_buffer"].shape == reader.shape != before[0].shape
    controller.expand()
    controller.set_masks({name: torch.ones(size, dtype=torch.bool)})
    after = [
        reader,
        optimizer.state[reader]["old_p"],
        inner[reader]["momentum_buffer"],
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Wrapped:
    """What a training script builds around an optimizer, to warm its rate up, say."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, self.count / 10)
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def test_a_wrapper_that_is_no_optimizer() -> None:
    model = rig.mlp()
    optimizer = Wrapped(adam(model.parameters()))
    controller = attached(model, optimizer)
    for x, y in batches():
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert_small(model, controller)


def test_two_optimizers_over_one_model() -> None:
    """Each its half; the gate gradients of both are seen, also where the first clears its own at once."""
    model = rig.mlp()
    first = torch.optim.SGD(model[0].parameters(), lr=0.05, momentum=0.9)
    second = torch.optim.Adam([*model[3].parameters(), *model[5].parameters()], lr=0.01)
    controller = attached(model, [first, second])
    alone = rig.mlp()
    alone.load_state_dict(model.state_dict())
    one = torch.optim.SGD(alone.parameters(), lr=0.05)
    beside = attached(alone, one)
    for n, (x, y) in enumerate(batches()):
        loss = cross_entropy(model(x), y)
        loss.backward()
        if n == 0:
            torch.manual_seed(1)
            cross_entropy(alone(x), y).backward()
            one.step()
            beside.step()
        first.step()
        first.zero_grad()
        second.step()
        second.zero_grad()
        controller.step(loss)
        if n == 0:
            seen = [c.state_dict()["loop"]["units"]["moments"]["first"] for c in (controller, beside)]
            torch.testing.assert_close(*seen)
    beside.detach()
    assert_small(model, controller)
    for optimizer in (first, second):
        for p, entries in optimizer.state.items():
            assert all(v.shape == p.shape for v in entries.values() if isinstance(v, Tensor) and v.ndim)


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    model = rig.mlp()
    both = [adam(model.parameters()), torch.optim.SGD(model[0].parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"a parameter of shape \(32, 8\) is held by two .*Adam and SGD"):
        attached(model, both)


def test_one_optimizer_over_two_attached_models() -> None:
    """A generator and its judge, or two towers: each has its own entry in the optimizer's state dict."""
    models = [rig.mlp(), rig.mlp()]
    optimizer = adam([p for model in models for p in model.parameters()])
    controllers = [attached(model, optimizer) for model in models]
    saved: dict[str, Any] = {}
    for n, (x, y) in enumerate(batches(), 1):
        loss = cross_entropy(models[0](x) + models[1](x), y)
        loss.backward()
        optimizer.step()
        for controller in controllers:
            controller.step(loss)
        optimizer.zero_grad()
        if n == 16:
            saved = copy.deepcopy(
                {"optimizer": optimizer.state_dict(), "models": [model.state_dict() for model in models]}
            )
    entries = {key for key in saved["optimizer"] if key.startswith("controlprune")}
    assert len(entries) == 2
    widths = [[int(mask.sum()) for mask in c.masks.values()] for c in controllers]
    for model, state in zip(models, saved["models"], strict=True):
        model.load_state_dict(state)
    optimizer.load_state_dict(saved["optimizer"])
    then = [[int(mask.sum()) for mask in c.masks.values()] for c in controllers]
    assert then != widths  # back in the middle of the run, each at its own masks
    for controller in controllers:
        controller.finalize()
    for model in models:
        assert rig.flops(model, X) <= BUDGET * rig.flops(rig.mlp(), X)
    cross_entropy(models[0](x) + models[1](x), y).backward()
    optimizer.step()


class Beside(torch.optim.SGD):
    """Keeps its averages in a list of its own."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.averages = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]


class InGroups(torch.optim.SGD):
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group["slow"] = [p.detach().clone() for p in group["params"]]


class InNumpy(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["average"] = p.numpy().copy()


class Silent(Optimizer):
    """Leaves out `Optimizer.__init__`, so that no hook of its step is ever called."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.state = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "tensors in an attribute": (
        lambda m: Beside(m.parameters(), 0.1),
        r"Beside keeps .* 'averages'",
    ),
    "tensors in its groups": (lambda m: InGroups(m.parameters(), 0.1), r"InGroups keeps .*\['slow'\]"),
    "numpy in its state": (
        lambda m: InNumpy(m.parameters(), 0.1),
        r"InNumpy state 'average' .* a ndarray",
    ),
    "without hooks": (lambda m: Silent(m.parameters()), r"Silent never called Optimizer\.__init__"),
    "none at all": (lambda m: [], r"optimizer=list: give a torch\.optim\.Optimizer, or a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_cannot_be_followed_are_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    model = rig.mlp()
    optimizer = make(model)
    before = rig.bits(model)
    with pytest.raises((ValueError, TypeError), match=message):
        attached(model, optimizer)
    rig.assert_same_bits(before, rig.bits(model))


# --- what is said ---------------------------------------------------------------------------------


def said(train: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(w.message) for w in caught]


def test_an_optimizer_made_anew_in_mid_run_is_said_at_once() -> None:
    model = rig.mlp()
    optimizer = adam(model.parameters())
    controller = attached(model, optimizer)

    def steps(count: int) -> None:
        for x, y in batches(count):
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()

    assert said(lambda: steps(10)) == []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (message,) = said(lambda: steps(1))
    assert "a SGD that the controller does not know steps 6 parameters" in message
    assert "attached to Adam" in message
    (late,) = said(lambda: steps(20))
    assert "has not run in the last 10 calls" in late
    controller.detach()
    assert said(lambda: (optimizer.step(), torch.optim.SGD(model.parameters(), lr=0.1).step())) == []


def test_another_model_is_trained() -> None:
    model, other = rig.mlp(), rig.mlp()
    optimizer = adam([*model.parameters(), *other.parameters()])
    controller = attached(model, optimizer)

    def steps() -> None:
        for x, y in batches():
            loss = cross_entropy(other(x), y)
            loss.backward()
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()

    (message,) = said(steps)
    assert "no parameter of the prunable layers had a gradient" in message
    assert "train the model that is attached" in message
    assert len(controller.history) == 0


def test_an_optimizer_that_never_runs() -> None:
    model = rig.mlp()
    controller = attached(model, adam(model.parameters()))

    def steps() -> None:
        for x, y in batches():
            loss = cross_entropy(model(x), y)
            loss.backward()
            controller.step(loss)

    (message,) = said(steps)
    assert "has not run in 30 calls of controller.step()" in message


def test_the_other_optimizers_of_a_script_are_no_strangers() -> None:
    """Only those that step parameters in which units stand."""
    model, other = rig.mlp(), rig.mlp()
    optimizer, beside = adam(model.parameters()), adam(other.parameters())
    controller = attached(model, optimizer)

    def steps() -> None:
        for x, y in batches():
            loss = cross_entropy(model(x) + other(x), y)
            loss.backward()
            optimizer.step()
            beside.step()
            controller.step(loss)
            optimizer.zero_grad()
            beside.zero_grad()

    assert said(steps) == []
    assert_small(model, controller)
