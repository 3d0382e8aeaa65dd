"""What modules keep beside tensors is in the file, as data: never a pickle, never believed unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import QUICK, batch, mlp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import controlprune as cp
from controlprune.loop.export import signed


class Counts(nn.Module):
    """Two parts of it keep what is no tensor of theirs."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.net, self.log = mlp(), Log()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        self.log.seen.append(len(x))
        return self.net(x)

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


class Log(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def get_extra_state(self) -> Any:
        return {"seen": tuple(self.seen)}

    def set_extra_state(self, state: Any) -> None:
        self.seen = list(state["seen"])


KEPT: Any = {
    "calls": 3,
    2: [None, True, -1.5, float("inf")],
    "scale": torch.tensor([1.5, 2.5], dtype=torch.float64),
    "deep": {"raw": b"\x00\xff", "pair": (1, [torch.arange(3)])},
}


def trained(model: nn.Module) -> cp.Controller:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),), total_steps=24,
        policy=QUICK,
    )  # fmt: skip
    for step in range(24):
        x, y = batch(step, (8,))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    controller.finalize()
    return controller


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_it_comes_back(tmp_path: Path) -> None:
    model = Counts(KEPT)
    controller = trained(model)
    cp.save(controller, tmp_path / "small.safetensors")
    loaded = Counts()
    cp.load(tmp_path / "small.safetensors", loaded)
    assert same(loaded.kept, KEPT)
    assert loaded.log.seen == model.log.seen
    x, _ = batch(0, (8,))
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


def test_what_has_no_plain_form_is_said_and_left_out(tmp_path: Path) -> None:
    controller = trained(Counts({"object": object()}))
    with pytest.warns(UserWarning, match="the extra state of module '' is not saved: it holds a object"):
        cp.save(controller, tmp_path / "small.safetensors")
    loaded = Counts("as made")
    cp.load(tmp_path / "small.safetensors", loaded)
    assert loaded.kept == "as made"
    assert len(loaded.log.seen) == 24


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "another module": lambda extra: {"net.0": 1},
    "no mapping": lambda extra: [1],
    "no kind": lambda extra: {"": {"set": [1]}},
    "two kinds": lambda extra: {"": {"list": [], "tuple": []}},
    "a tensor that is not there": lambda extra: {"": {"tensor": "net.0.weight"}},
    "no base64": lambda extra: {"": {"bytes": "?"}},
    "an unhashable key": lambda extra: {"": {"dict": [[{"list": []}, 1]]}},
    "deep": lambda extra: {"": nested(400)},
}


def nested(depth: int) -> Any:
    return {"list": [nested(depth - 1)]} if depth else 1


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_one_is_refused_before_anything_is_changed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    cp.save(trained(Counts(1)), path)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["controlprune"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header["extra"] = HOSTILE[name](header["extra"])
    save_file(tensors, str(path), metadata=signed(header, tensors))
    model = Counts("as made")
    before = {k: v.clone() for k, v in model.named_parameters()}
    if name == "deep":  # data like any other, as deep as it is
        cp.load(path, model)
        return
    with pytest.raises(ValueError, match=r"path=.*small\.safetensors.*extra state"):
        cp.load(path, model)
    assert model.kept == "as made"
    assert all(torch.equal(before[k], v) for k, v in model.named_parameters())


def test_a_file_without_any_is_read_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    cp.save(trained(Counts(1)), path)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["controlprune"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del header["extra"]
    save_file(tensors, str(path), metadata=signed(header, tensors))
    model = Counts("as made")
    cp.load(path, model)
    assert model.kept == "as made"
