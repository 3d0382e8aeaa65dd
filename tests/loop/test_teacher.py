"""A teacher: the dense ancestor is the net of the cut, costs what is counted; its loss is the usual one."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from rig import Rig, batch, rig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import controlprune as cp
from controlprune.policies.base import Decision, Observation

QUIET = cp.Control(update_every=10**6, observe_every=1, freeze=1.0)


def _half(run: Rig) -> dict[str, Tensor]:
    return {name: torch.arange(len(m)) % 2 == 0 for name, m in run.controller.masks.items()}


@pytest.mark.parametrize("net", ["mlp", "residual"])
@pytest.mark.parametrize("compact", [False, True])
def test_the_ancestor_is_the_dense_net_of_the_cut_whatever_is_trained_later(net: str, compact: bool) -> None:
    run = rig(net, policy=QUIET)
    teacher = cp.ancestor(run.controller)
    x, _ = batch(99, run.shape)
    run.train(0, 8)
    assert teacher(x) is None
    dense = copy.deepcopy(run.model).eval()(x)
    run.controller.set_masks(_half(run))
    if compact:
        run.controller.shrink()
    assert torch.equal(teacher(x), dense)
    assert not torch.allclose(run.model.eval()(x), dense)
    run.model.train()
    run.train(8, 16)
    run.controller.expand()
    run.train(16, 20)
    assert torch.equal(teacher(x), dense)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_made_after_a_cut_it_has_what_is_parked() -> None:
    run = rig("residual", policy=QUIET)
    run.train(0, 4)
    x, _ = batch(99, run.shape)
    dense = copy.deepcopy(run.model).eval()(x)
    run.controller.set_masks(_half(run))
    run.controller.shrink()
    teacher = cp.ancestor(run.controller)
    assert torch.equal(teacher(x), dense)
    assert teacher.train().training is False


def test_its_forwards_are_in_the_flops_of_the_run() -> None:
    class AtOnce(cp.Policy):
        def decide(self, seen: Observation) -> Decision | None:
            if seen.step < 4:
                return None
            return Decision(tuple(torch.arange(len(m)) % 2 == 0 for m in seen.masks), compact=True)

    def spent(taught: bool) -> float:
        run = rig(budget=cp.Budget(flops=0.6, train_flops=0.9), policy=AtOnce(), total_steps=20)
        teacher = cp.ancestor(run.controller)
        for step in range(1, 21):
            x, y = batch(step, run.shape)
            loss = cp.distillation(run.model(x), teacher(x) if taught else None, y)
            loss.backward()
            run.optimizer.step()
            run.controller.step(loss)
            run.optimizer.zero_grad()
        return run.controller.cost()["train_flops"].fraction

    assert spent(taught=True) - spent(taught=False) == pytest.approx(16 / 3 / 20, rel=1e-6)


def test_a_resumed_run_has_the_teacher_it_had() -> None:
    run, again = rig(policy=QUIET), rig(policy=QUIET, seed=1)
    teacher = cp.ancestor(run.controller)
    x, _ = batch(99, run.shape)
    run.train(0, 4)
    run.controller.set_masks(_half(run))
    said = teacher(x)
    run.train(4, 8)
    resumed = cp.ancestor(again.controller)
    again.controller.load_state_dict(run.controller.state_dict())
    resumed.load_state_dict(teacher.state_dict())
    assert torch.equal(resumed(x), said)


def test_the_loss_is_cross_entropy_and_the_divergence_from_the_teacher_by_hand() -> None:
    s, t = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    y = torch.randint(7, (3, 5))
    y[0, 0] = -100
    rows = [(i, j) for i in range(3) for j in range(5) if (i, j) != (0, 0)]

    def softened(logits: Tensor) -> list[float]:
        return (logits / 4).softmax(0).tolist()

    apart = [
        sum(p * math.log(p / q) for p, q in zip(softened(t[row]), softened(s[row]), strict=True))
        for row in rows
    ]
    expected = 0.7 * cross_entropy(s.flatten(0, 1), y.flatten()) + 0.3 * 16 * sum(apart) / len(apart)
    found = cp.distillation(s, SimpleNamespace(logits=t), y, temperature=4.0, weight=0.3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(cp.distillation(s, None, y), cross_entropy(s.flatten(0, 1), y.flatten()))
    assert cp.distillation(s, s, temperature=3.0) == pytest.approx(0.0, abs=1e-6)


def test_where_nothing_is_parked_there_is_no_ancestor() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    controller = cp.attach(
        model,
        torch.optim.Adam(model.parameters()),
        budget=cp.Budget(flops=0.5),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=20,
        granularity="weight",
    )
    with pytest.raises(ValueError, match="is not kept"):
        cp.ancestor(controller)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": 1.5}, "weight=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"teacher": torch.zeros(4, 3)}, r"teacher: logits of shape \[4, 3\]"),
        ({"teacher": None, "labels": None}, "nothing to learn"),
    ],
)
def test_what_cannot_be_is_said(given: dict[str, object], words: str) -> None:
    usual: dict[str, object] = {"teacher": torch.zeros(4, 5), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=words):
        cp.distillation(torch.zeros(4, 5), **(usual | given))
    with pytest.raises(TypeError, match="student=NoneType"):
        cp.distillation(None, torch.zeros(4, 5))


def test_the_user_trains_with_it_to_the_budget_and_no_gradient_reaches_it() -> None:
    run = rig("residual", total_steps=60)
    teacher = cp.ancestor(run.controller)
    for step in range(1, 61):
        x, y = batch(step, run.shape)
        loss = cp.distillation(run.model(x), teacher(x), y)
        loss.backward()
        run.optimizer.step()
        run.controller.step(loss)
        run.optimizer.zero_grad()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    assert bool(teacher.taken)
    small = run.controller.finalize()
    x, _ = batch(99, run.shape)
    assert teacher(x).shape == small(x).shape
    assert all(torch.equal(before[name], p) for name, p in teacher.state_dict().items())
    assert isinstance(teacher, nn.Module)
