"""`attach` runs the model, and leaves no trace of it: whatever a forward pass can change is as it was."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import controlprune as cp
from controlprune.structure.untouched import seed_all, seeded, untouched


class Slotted:
    __slots__ = ("calls", "log")

    def __init__(self) -> None:
        self.calls, self.log = 0, ["start"]


class Restless(nn.Module):
    """Changes everything that it can reach, at every forward."""

    made = 0
    cache: dict[str, Any] = {}  # noqa: RUF012 — of the class, as people write it

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("late", None)
        self.calls, self.history, self.state = 0, [1, [2]], None
        self.settings = SimpleNamespace(step=0, inner=SimpleNamespace(shapes=[]))
        self.table, self.order = {"a": {"b": 1}}, OrderedDict(x=1, y=2)
        self.recent, self.kinds = deque([1, 2], maxlen=2), {1}
        self.slots, self.array = Slotted(), np.zeros(3)
        self.kept = [torch.zeros(2), {"h": torch.ones(2)}]
        self.own, self.python = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.old = np.random.default_rng(1), np.random.RandomState(1)
        self.count = closing()

    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        Restless.made += 1
        Restless.cache[str(self.calls)] = x
        self.calls += 1
        self.history[1].append(self.calls)  # type: ignore[union-attr, attr-defined]
        self.state = x.detach()  # type: ignore[assignment]
        self.new = self.calls
        self.settings.step += 1
        self.settings.inner.shapes.append(tuple(x.shape))
        self.table["a"]["c"] = 2
        self.order.move_to_end("x")
        self.recent.append(3)
        self.kinds.add(self.calls)
        self.slots.calls += 1
        self.slots.log.append("again")
        self.array += 1
        self.kept[0].add_(1)
        self.kept[1]["h"].mul_(2)  # type: ignore[index]
        self.kept.append(torch.ones(1))
        self.seen += x.detach().mean(0)
        self.late = x.detach().mean()
        with torch.no_grad():
            self.hidden.weight.mul_(0.99)
            self.head.bias.data.clamp_(-0.01, 0.01)
        self.head.weight.requires_grad_(True)
        self.count()
        noise = torch.rand(()) + torch.rand((), generator=self.own) + random.random() + self.python.random()
        noise = noise + np.random.rand() + self.numpy.random() + self.old.rand()  # noqa: NPY002
        if extra is not None:
            extra["log"].append(1)
            extra["y"].add_(1)
            extra.pop("once", None)
        x += 0.0 * noise
        x.mul_(1.0)
        return self.head(F.relu(self.norm(self.hidden(x))))


def closing() -> Callable[[], int]:
    numbers = [0]
    total = 0

    def count() -> int:
        nonlocal total
        total += 1
        numbers.append(total)
        return total

    count.numbers = numbers  # type: ignore[attr-defined]
    return count


def told(model: Restless) -> dict[str, Any]:
    """Everything of it that can be compared."""
    count: Any = model.count
    plain = {
        k: v for k, v in vars(model).items() if k in ("calls", "history", "table", "kinds", "state", "new")
    }
    cells = [copy.deepcopy(cell.cell_contents) for cell in count.__closure__]
    return copy.deepcopy(plain) | {
        "tensors": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "class": (Restless.made, list(Restless.cache)),
        "settings": (model.settings.step, list(model.settings.inner.shapes)),
        "order": list(model.order),
        "recent": list(model.recent),
        "slots": (model.slots.calls, list(model.slots.log)),
        "array": model.array.tolist(),
        "kept": [str(x) for x in model.kept],
        "own": model.own.get_state(),
        "python": model.python.getstate(),
        "numpy": pickle.dumps(model.numpy.bit_generator.state),
        "old": pickle.dumps(model.old.get_state()),
        "cells": cells,
        "hooks": [len(vars(m)["_forward_hooks"]) for m in model.modules()],
        "training": [m.training for m in model.modules()],
    }


def drawn() -> tuple[Any, ...]:
    """What the generators of this process give next."""
    return torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where} {n}")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    "budget", [cp.Budget(flops=0.6), cp.Budget(flops=0.6, memory=0.95), cp.Budget(flops=1.0)]
)
def test_attach_leaves_model_inputs_and_generators_as_they_were(budget: cp.Budget) -> None:
    torch.manual_seed(0)
    model, x = Restless(), torch.randn(6, 8)
    extra = {"log": [0], "y": torch.zeros(2), "once": 1}
    seen: list[int] = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    model.norm.eval()
    objects = [model.kept[0], model.history[1], model.settings.inner, model.slots, extra["y"]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, generators, given = told(model), drawn(), (x.clone(), copy.deepcopy(extra))
    controller = cp.attach(
        model, optimizer, budget=budget, example_inputs={"x": x, "extra": extra}, total_steps=10
    )
    assert_equal(told(model), before)
    assert_equal(list(drawn()), list(generators))
    assert_equal([x, extra], list(given))
    assert seen == []
    same = [model.kept[0], model.history[1], model.settings.inner, model.slots, extra["y"]]
    assert all(a is b for a, b in zip(objects, same, strict=True)), "objects stay the user's own"
    controller.detach()
    assert_equal(told(model), before)


def test_a_run_at_the_full_budget_is_the_run_without_a_controller() -> None:
    """Bit for bit: weights, buffers, hidden state, generators."""
    ends = []
    for attached in (False, True):
        Restless.made, Restless.cache = 0, {}
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = Restless()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
        controller = None
        if attached:
            controller = cp.attach(
                model,
                optimizer,
                budget=cp.Budget(flops=1.0),
                example_inputs=(torch.zeros(4, 8),),
                total_steps=24,
            )
        for _ in range(24):
            x = torch.randn(16, 8)
            loss = F.cross_entropy(model(x), x.argmax(1) % 4)
            loss.backward()
            optimizer.step()
            if controller is not None:
                controller.step(loss)
            optimizer.zero_grad()
        if controller is not None:
            controller.finalize()
        ends.append((told(model), list(drawn())))
    assert_equal(ends[0], ends[1])


def test_what_raises_inside_leaves_no_trace_either() -> None:
    model = Restless()
    before = told(model)
    with pytest.raises(IndexError), untouched(model):
        model(torch.randn(3, 8)).index_select(0, torch.tensor(9))
    assert_equal(told(model), before)


def test_values_that_were_given_other_memory_come_back() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weight, before = model[0].weight, copy.deepcopy(model.state_dict())
    with untouched(model):
        model[0].weight.data = torch.zeros(5, 3)
        model[1].running_mean = torch.ones(7)
        model[0].weight = nn.Parameter(torch.zeros(1))
        model.add_module("more", nn.Linear(1, 1))
    assert model[0].weight is weight
    assert_equal(dict(model.state_dict()), dict(before))
    assert len(model) == 2


def test_contents_come_back_in_their_order() -> None:
    model = nn.Identity()
    model.names = {"a": 1, "b": 2}  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    with untouched(model):
        model.names["a"] = model.names.pop("a")
    assert list(model.names) == ["a", "b"]


def test_what_refers_to_itself_or_to_a_great_many_is_no_trap() -> None:
    model: Any = nn.Linear(2, 2)
    model.me = [model]
    model.me.append(model.me)
    model.many = list(range(300_000))
    model.endless = itertools.count()
    with untouched(model):
        model.many.append(1)
        model.me.clear()
    assert len(model.many) == 300_000
    assert len(model.me) == 2


def test_seeds_are_for_the_block_only() -> None:
    model, before = nn.Linear(1, 1), torch.get_rng_state()
    with seeded(3):
        first = torch.rand(2)
    with seeded(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), before)
    with untouched(model):
        seed_all(3)
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_devices_are_left_alone() -> None:
    torch.cuda.init()
    before = torch.cuda.get_rng_state_all()
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 4)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"budget": cp.Budget(flops=0.5), "total_steps": 10}
    controller = cp.attach(model, optimizer, example_inputs=(torch.zeros(2, 8).cuda(),), **options)
    controller.load_state_dict(controller.state_dict())
    assert_equal(torch.cuda.get_rng_state_all(), before)
