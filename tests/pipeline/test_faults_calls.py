"""Calls at odd moments and files that claim odd things: refused by name, or as good as any."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import QUICK, batch, mlp, rig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import controlprune as cp
from controlprune.cost.cache import read_cache, write_cache
from controlprune.loop.export import signed
from controlprune.loop.history import History

OPTIONS: dict[str, Any] = {
    "budget": cp.Budget(flops=0.5),
    "example_inputs": (torch.zeros(2, 8),),
    "total_steps": 20,
}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_part_of_an_attached_model_or_what_holds_one_is_refused() -> None:
    inner = mlp()
    outer = Around(inner)
    for first, second in ((inner, outer), (outer, inner)):
        controller = cp.attach(first, adam(first), **OPTIONS)
        with pytest.raises(RuntimeError, match=r"a controller is attached to a .* that shares parameters"):
            cp.attach(second, adam(second), **OPTIONS)
        controller.detach()


@pytest.mark.parametrize("start", [0.8, "budget"])
def test_a_start_below_dense_under_a_run_total_alone(start: Any) -> None:
    run = rig(budget=cp.Budget(train_flops=0.7), policy=cp.Control(start=start), total_steps=60)
    run.train(0, 60)
    assert (run.controller.history[0].step == 0) == (start != "budget"), "a total alone is no place to begin"
    run.controller.finalize()


def test_finalized_in_inference_mode_it_can_be_trained_on() -> None:
    run = rig()
    run.train(0, 60)
    run.controller.expand()
    with torch.inference_mode():
        small = run.controller.finalize()
    x, y = batch(0, (8,))
    F.cross_entropy(small(x), y).backward()
    run.optimizer.step()


def test_lazy_modules_and_empty_batches_are_refused_by_name() -> None:
    lazy = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"model: its parameter '0\.weight' has no shape yet .*one forward"):
        cp.attach(lazy, torch.optim.SGD(lazy[2].parameters(), lr=0.1), **OPTIONS)
    model = mlp()
    with pytest.raises(ValueError, match="example_inputs: the batch is empty"):
        cp.attach(model, adam(model), **{**OPTIONS, "example_inputs": (torch.zeros(0, 8),)})


def test_a_layer_pruned_by_others_is_named() -> None:
    run = rig()
    run.train(0, 6)
    nn.utils.parametrizations.weight_norm(run.model[3])  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"model: its tensor '3\.weight' is gone: .* by others since"):
        run.controller.finalize()


def test_names_with_slashes_are_told_apart() -> None:
    class Slashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 32)
            self.register_parameter("w", nn.Parameter(torch.randn(16, 32) / 6))
            self.register_parameter("w/x", nn.Parameter(torch.randn(4, 16) / 4))

        def forward(self, x: Tensor) -> Tensor:
            own = dict(self.named_parameters(recurse=False))
            return F.linear(F.relu(F.linear(F.relu(self.first(x)), own["w"])), own["w/x"])

    model = Slashed()
    optimizer = adam(model)
    controller = cp.attach(model, optimizer, **{**OPTIONS, "total_steps": 40}, policy=QUICK)
    for step in range(30):
        x, y = batch(step, (8,))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert any(not mask.all() for mask in controller.masks.values())
    before = {name: p.clone() for name, p in model.named_parameters()}
    controller.load_state_dict(controller.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("change", ["swapped", "added"])
def test_a_model_that_was_changed_after_the_end_is_not_saved(change: str, tmp_path: Path) -> None:
    run = rig()
    run.train(0, 60)
    small: Any = run.controller.finalize()
    if change == "swapped":
        small[5] = nn.Linear(small[5].in_features, 10)
    else:
        small.append(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="controller: its model was changed since: "):
        cp.save(run.controller, tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


# --- the record of a run --------------------------------------------------------------------------------


def test_a_stream_goes_on_from_where_the_run_does(tmp_path: Path) -> None:
    """After load_state_dict: no row lost, none doubled, in order."""
    run = rig(total_steps=80)
    path = run.controller.history.stream(tmp_path / "run.jsonl")
    run.train(0, 30)
    parts = (run.controller, run.model, run.optimizer)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    run.train(30, 50)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    run.train(30, 80)
    assert [row.step for row in History.read(path)] == [row.step for row in run.controller.history]


HOSTILE: dict[str, Any] = {
    "deep": lambda header, row: [header, "[" * 100_000],
    "deep header": lambda header, row: ["[" * 100_000],
    "stride 0": lambda header, row: [header | {"stride": 0}, row],
    "huge number": lambda header, row: [header, json.dumps(row)[:-1] + ',"seconds":' + "9" * 5000 + "}"],
    "a word for the loss": lambda header, row: [header, row | {"loss": "\x1b[2J"}],
    "names that are none": lambda header, row: [header | {"names": [[]] * len(header["names"])}, row],
    "a price that is none": lambda header, row: [header, row | {"price": {"flops": [1]}}],
    "half a unit": lambda header, row: [header, row | {"active": [0.5] * len(row["active"])}],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_refused(name: str, tmp_path: Path) -> None:
    run = rig()
    run.train(0, 12)
    lines = run.controller.history.write(tmp_path / "good.jsonl").read_text().splitlines()
    found = HOSTILE[name](json.loads(lines[0]), json.loads(lines[1]))
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in [*found, *found[1:]]))
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        History.read(path)


# --- what a model is, gives and is given ------------------------------------------------------------------


@dataclass
class Answer:
    logits: Tensor


class Answers(nn.Module):
    """Its output is a dataclass; `logits` is called past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.inner(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("how", ["forward", "method"])
@pytest.mark.parametrize("shrink", [False, True])
def test_dataclasses_and_methods_are_no_compiled_model(how: str, shrink: bool) -> None:
    """The same run as that of the plain module inside, whose masks and layouts are not limited."""
    ends = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model: Any = Answers() if wrapped else mlp()
        optimizer = adam(model)
        controller = cp.attach(model, optimizer, **{**OPTIONS, "total_steps": 60, "policy": QUICK})
        for step in range(60):
            torch.manual_seed(step)
            x, y = batch(step, (8,))
            out = model(x) if not wrapped else model(x).logits if how == "forward" else model.logits(x)
            F.cross_entropy(out, y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            if shrink and step == 30:
                controller.shrink()
        assert "torch.compile" not in controller.report()
        ends.append([row.active for row in controller.history])
        controller.finalize()
    assert ends[0] == ends[1]


class Named(torch.Tensor):
    """A tensor by another name, as torchvision's images are."""


def test_example_inputs_of_a_subclass_for_its_name() -> None:
    x = torch.randn(2, 8)
    plain, named = (cp.find_groups(mlp(), (inputs,)) for inputs in (x, x.as_subclass(Named)))
    assert [group.name for group in named] == [group.name for group in plain]


def test_a_model_without_values_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match=r"model: its parameter '0\.weight' is on the meta device"):
        cp.attach(model, adam(model), **OPTIONS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused_by_name() -> None:
    model = torch.jit.script(mlp())
    with pytest.raises(ValueError, match=r"model: torch\.jit\.script made it; attach to the plain module"):
        cp.attach(model, adam(model), **OPTIONS)


@pytest.mark.parametrize("compact", [False, True])
def test_another_default_number_type(compact: bool) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = mlp()
        optimizer = adam(model)
        options = {**OPTIONS, "example_inputs": (torch.zeros(2, 8),), "total_steps": 40, "policy": QUICK}
        controller = cp.attach(model, optimizer, **options)
        for step in range(40):
            x, y = batch(step, (8,))
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            if compact and step == 20:
                controller.shrink()
        controller.load_state_dict(controller.state_dict())
        small = controller.finalize()
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert controller.cost()["flops"].fraction <= 0.5


def test_what_is_written_on_dormant_columns_is_not_saved(tmp_path: Path) -> None:
    run = rig(policy=replace(QUICK, shrink=False))
    run.train(0, 60)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(torch.randn_like(p))
    saved = copy.deepcopy(run.model.state_dict())
    cp.save(run.controller, tmp_path / "small.safetensors")
    small = cp.load(tmp_path / "small.safetensors", mlp()).eval()
    x, _ = batch(0, (8,))
    torch.testing.assert_close(small(x), run.model.eval()(x))
    assert not saved["3.weight"][:, ~run.controller.masks["0"]].any()


# --- files that claim a great deal ----------------------------------------------------------------------


@pytest.mark.parametrize("units", [10**15, 2**62])
def test_a_file_that_claims_many_units_makes_nothing(units: int, tmp_path: Path) -> None:
    """Refused as another model's, before a mask of that length is."""
    run = rig()
    run.train(0, 60)
    run.controller.finalize()
    path = tmp_path / "small.safetensors"
    cp.save(run.controller, path)
    with safe_open(str(path), framework="pt") as file:
        text = file.metadata()["controlprune"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header = json.loads(re.sub(r"\b32\b", str(units), text))
    save_file(tensors, str(path), metadata=signed(header, tensors))
    with pytest.raises(ValueError, match=r"small\.safetensors"):
        cp.load(path, mlp())


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "[1]", "\x00", '{"a": ' + "9" * 5000 + "}"]
)
def test_a_hostile_cache_is_as_good_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(text)
    assert read_cache("latency", tmp_path) == {}
    write_cache("latency", "key", 1.0, tmp_path)
    assert read_cache("latency", tmp_path) == {"key": 1.0}
