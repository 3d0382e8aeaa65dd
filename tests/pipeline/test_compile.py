"""torch.compile after attach: masks never recompile, a shrink does once, and shapes stay few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rig
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.optim import Adam

import controlprune as cp
from controlprune.loop.recompile import COMPILED, Layouts
from controlprune.policies.feedback import pace

RESTLESS = replace(rig.QUICK, update_every=2, revise_every=1, dwell=0, hysteresis=0.0, stages=6)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation costs nothing: what remains is the bound on the number of shapes."""
    monkeypatch.setattr(pace, "COMPILE", 0.0)
    monkeypatch.setattr(pace, "COMPILE_OPERATOR", 0.0)


def run(backend: str | None, policy: cp.Control, steps: int) -> tuple[cp.Controller, int]:
    """A run with the forward compiled (None: not), and how often it was compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = rig.mlp().eval()  # dropout off
    optimizer = Adam(model.parameters(), lr=0.01)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.4),
        example_inputs=(torch.zeros(4096, 8),),  # large, so that a shrink pays
        total_steps=steps,
        policy=policy,
    )
    counter = CompileCounterWithBackend(backend or "eager")
    forward = model if backend is None else torch.compile(model, backend=counter, dynamic=False)
    for step in range(steps):
        x, y = rig.batch(step, (8,))
        loss = cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    controller.finalize()
    x, _ = rig.batch(0, (8,))
    assert torch.allclose(forward(x), model(x), atol=1e-4)
    return controller, counter.frame_count


def layouts(controller: cp.Controller) -> set[tuple[int, ...]]:
    return {row.widths for row in controller.history} | {controller._run.problem.structure.sizes}


@pytest.mark.usefixtures("instant")
def test_shapes_stay_few_and_the_budget_is_met() -> None:
    controller, compiled = run("aot_eager", RESTLESS, 60)
    assert 2 <= len(layouts(controller)) <= COMPILED
    assert compiled == len(layouts(controller))
    assert controller.cost()["flops"].fraction <= 0.4
    assert "torch.compile" in controller.report()


def test_a_compilation_that_does_not_pay_is_put_off_to_the_end() -> None:
    """Masks change, shapes do not: a few milliseconds of work are left to be saved."""
    controller, compiled = run("aot_eager", RESTLESS, 60)
    *during, last = controller.history
    assert {row.widths for row in during} == {controller._run.problem.structure.sizes}
    assert len({row.active for row in during}) > 2
    assert last.realised["flops"] <= 0.4
    assert compiled == 2


def test_an_eager_model_is_not_limited() -> None:
    controller, _ = run(None, RESTLESS, 60)
    assert len(layouts(controller)) > COMPILED
    assert "torch.compile" not in controller.report()


def test_masks_alone_never_recompile() -> None:
    controller, compiled = run("aot_eager", replace(RESTLESS, shrink=False), 30)
    assert len({row.active for row in controller.history}) > 2
    assert compiled == 2  # dense, and small after finalize


@pytest.mark.slow
@pytest.mark.usefixtures("instant")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, on import
def test_inductor() -> None:
    controller, compiled = run("inductor", RESTLESS, 60)
    assert compiled == len(layouts(controller)) <= COMPILED


def test_new_widths_are_taken_in_few_strides_and_at_the_budget() -> None:
    known = Layouts({(8, 8): 0.0})
    assert known.admits((7, 8), 0.2)
    known.compiled = True
    assert not known.admits((7, 8), 0.2)
    assert known.admits((5, 6), 0.5)
    assert not known.admits((5, 6), 0.5, pays=False)
    known.take((5, 6), 0.5)
    assert not known.admits((4, 6), 0.9)
    assert known.admits((4, 4), 1.0)
    known.take((4, 4), 1.0)
    assert known.admits((3, 5), 1.0)
    known.take((3, 5), 1.0)
    assert not known.admits((5, 3), 1.0)
    assert known.admits((4, 4), 1.0, pays=False)


def test_what_is_known_of_shapes_is_saved() -> None:
    known = Layouts({(8, 8): 0.0, (4, 4): 1.0}, compiled=True)
    assert Layouts.of(known.state_dict()) == known


@pytest.mark.usefixtures("instant")
def test_a_resumed_run_keeps_to_the_bound() -> None:
    first = rig.rig(total_steps=40)
    first.train(0, 10)
    first.controller._run.layouts.compiled = True
    for n in (20, 12):
        first.controller._run.layouts.take((n, n), 0.5)
    second = rig.rig(total_steps=40)
    second.controller.load_state_dict(first.controller.state_dict())
    assert second.controller._run.layouts == first.controller._run.layouts
    assert "at most 4 under torch.compile" in second.controller.report()
