"""Saved small, loaded small from the dense class; whatever else is refused before the model is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import NETS, Rig, assert_same_bits, batch, bits, hooks, mlp, rig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import controlprune as cp
from controlprune.loop.export import signed


def cut(net: str = "residual", layout: str = "masked") -> Rig:
    run = rig(net, total_steps=40)
    run.train(0, 24)
    assert any(not m.all() for m in run.controller.masks.values())
    if layout == "compact":
        run.controller.shrink()
    if layout == "finalized":
        run.controller.finalize()
    return run


def fresh(net: str) -> nn.Module:
    torch.manual_seed(77)
    return NETS[net][0]()


@pytest.mark.parametrize("layout", ["masked", "compact", "finalized"])
@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_there_and_back(net: str, layout: str, tmp_path: Path) -> None:
    run = cut(net, layout)
    before = bits(run.model, run.optimizer)
    cp.save(run.controller, tmp_path / "small.safetensors")
    assert_same_bits(before, bits(run.model, run.optimizer))
    dense = fresh(net)
    keys = list(dense.state_dict())
    model = cp.load(tmp_path / "small.safetensors", dense)
    assert model is dense
    assert list(model.state_dict()) == keys
    if layout != "finalized":
        run.controller.shrink()
    x = batch(0, run.shape)[0]
    for mode in (False, True):
        torch.manual_seed(0)
        expected = run.model.train(mode)(x)
        torch.manual_seed(0)
        assert torch.equal(model.train(mode)(x), expected)
    optimizer = torch.optim.Adam(model.parameters())
    assert hooks(model, optimizer) == 0
    nn.functional.cross_entropy(model(x), batch(0, run.shape)[1]).backward()
    optimizer.step()
    again = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.8), example_inputs=(x,), total_steps=10
    )  # and it can be pruned further
    again.finalize()


def test_the_file_is_as_small_as_the_model(tmp_path: Path) -> None:
    run = cut("mlp")
    cp.save(run.controller, tmp_path / "small.safetensors")
    run.controller.finalize()
    with safe_open(str(tmp_path / "small.safetensors"), framework="pt") as file:
        saved = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert saved.keys() == run.model.state_dict().keys()
    assert sum(torch.Size(s).numel() for s in saved.values()) < sum(p.numel() for p in mlp().parameters())


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """Changed, with the right checksum of what it says now."""
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["controlprune"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    other = path.with_name("other.safetensors")
    save_file(tensors, str(other), metadata=signed(header, tensors))
    return other


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "newer": (lambda h, t: h.update(format=9), "newer controlprune"),
    "no format": (lambda h, t: h.pop("format"), "header"),
    "no structure": (lambda h, t: h.pop("structure"), "header"),
    "no masks": (lambda h, t: h["masks"].clear(), "header"),
    "a unit too many": (lambda h, t: h["masks"].update({"0": [99]}), "header"),
    "no unit": (lambda h, t: h["masks"].update({"0": []}), "header"),
    "a tensor short": (lambda h, t: t.pop("3.bias"), r"'3\.bias' does not fit"),
    "a tensor more": (lambda h, t: t.update(extra=torch.zeros(2)), "'extra' does not fit"),
    "a tensor of another shape": (
        lambda h, t: t.update({"5.bias": torch.zeros(9)}),
        r"'5\.bias' does not fit",
    ),
    "other masks": (lambda h, t: h["masks"].update({"0": [0, 1]}), "does not fit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name: str, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    cp.save(cut("mlp").controller, tmp_path / "small.safetensors")
    path = rewritten(tmp_path / "small.safetensors", change)
    model = fresh("mlp")
    before = bits(model)
    with pytest.raises(ValueError, match=rf"path=.*other\.safetensors.*{message}"):
        cp.load(path, model)
    assert_same_bits(before, bits(model))
    cp.load(tmp_path / "small.safetensors", model)


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    model = fresh("mlp")
    before = bits(model)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, str(foreign))
    with pytest.raises(ValueError, match=r"foreign\.safetensors.*not one that controlprune\.save wrote"):
        cp.load(foreign, model)
    cut_short = tmp_path / "short.safetensors"
    cp.save(cut("mlp").controller, cut_short)
    cut_short.write_bytes(cut_short.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"short\.safetensors.*not a whole safetensors file"):
        cp.load(cut_short, model)
    with pytest.raises(FileNotFoundError):
        cp.load(tmp_path / "none.safetensors", model)
    assert_same_bits(before, bits(model))


def test_models_that_are_not_the_saved_ones(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    cp.save(cut("mlp").controller, path)
    with pytest.raises(ValueError, match=r"model: it has no tensor '0\.weight'"):
        cp.load(path, fresh("residual"))
    wider = nn.Sequential(
        nn.Linear(8, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 4)
    )
    before = bits(wider)
    with pytest.raises(ValueError, match=r"model: '0\.weight' has shape \(40, 8\).*\(32, 8\)"):
        cp.load(path, wider)
    assert_same_bits(before, bits(wider))
    attached = rig("mlp")
    with pytest.raises(RuntimeError, match="model: a controller is attached"):
        cp.load(path, attached.model)
    with pytest.raises(TypeError, match="controller=Sequential: give"):
        cp.save(wider, path)  # type: ignore[arg-type]
