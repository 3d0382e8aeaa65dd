"""Mutated files and states: a clear error that changes nothing, or what still works. Never a crash.

Bits flipped, bytes cut out, spliced in and doubled, lengths made huge, JSON edited with and without the right
checksum, tensors swapped, of other shapes and types; the same for a controller's state dict. A few hundred by
default, all 10,000 with `pytest -m slow tests/state/test_fuzz.py`.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import NETS, Rig, assert_same_bits, batch, bits, rig
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint import flat, still
from torch import Tensor, nn

import controlprune as cp
from controlprune.loop.export import signed
from controlprune.state import resume

FEW, MANY = 200, 5000  # of each kind: files, states
Content = tuple[dict[str, Any], dict[str, Tensor]]


@lru_cache
def saved(folder: Path, net: str) -> tuple[bytes, str, str]:
    """A good file: its bytes, its header and its checksum."""
    run = rig(net, total_steps=40)
    run.train(0, 24)
    path = folder / f"{net}.safetensors"
    cp.save(run.controller, path)
    with safe_open(str(path), framework="pt") as file:
        return path.read_bytes(), file.metadata()["controlprune"], file.metadata()["checksum"]


# --- bytes ----------------------------------------------------------------------------------------


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 1, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def flip_early(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(200)] ^= 1 << draw.randrange(8)


def cut_short(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def cut_out(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 8, 100, 4096))]


def splice(data: bytearray, draw: random.Random) -> None:
    start, source = draw.randrange(len(data)), draw.randrange(len(data))
    piece = data[source : source + draw.choice((1, 8, 100, 4096))]
    data[start : start + draw.choice((0, len(piece)))] = piece


def lengthen(data: bytearray, draw: random.Random) -> None:
    """The length of the header, in the first eight bytes."""
    value = draw.choice((0, 1, 7, len(data), 2**31, 2**63 - 1, 2**64 - 1, draw.randrange(2**64)))
    data[:8] = value.to_bytes(8, "little")


def noise(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start : start + 64] = draw.randbytes(64)


BYTES = (flip, flip, flip_early, cut_short, cut_out, splice, lengthen, noise)

# --- JSON, and tensors ----------------------------------------------------------------------------

WORDS = (
    None,
    True,
    -1,
    0,
    1,
    7,
    31,
    10**30,
    0.5,
    -0.5,
    math.nan,
    math.inf,
    "",
    "0.weight",
    [],
    {},
    [1],
    [[]],
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every entry of a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, entry in items:
        found += places(entry, (*path, key))
    return found


def edit(value: Any, draw: random.Random, words: tuple[Any, ...] = WORDS) -> str:
    """One entry is taken out, doubled, exchanged with another or given another value."""
    ways = places(value)
    path = draw.choice(ways)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    kind = draw.choice(("word", "word", "word", "drop", "swap", "nudge"))
    if kind == "drop":
        del parent[path[-1]]
    elif kind == "swap":
        other = value
        for key in draw.choice(ways):
            other = other[key]
        parent[path[-1]] = copy.deepcopy(other)
    elif kind == "nudge" and type(parent[path[-1]]) in (int, float):
        parent[path[-1]] += draw.choice((-1, 1, 8))
    else:
        parent[path[-1]] = copy.deepcopy(draw.choice(words))
    return f"{kind} at {path}"


def bend(tensors: dict[str, Tensor], draw: random.Random) -> str:
    """One tensor is gone, another's, of another shape or type."""
    name, other = draw.choice(list(tensors)), draw.choice(list(tensors))
    tensor = tensors[name]
    kind = draw.choice(("drop", "swap", "longer", "shorter", "flat", "type", "rename", "value"))
    if kind == "drop":
        del tensors[name]
    elif kind == "swap":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "rename":
        tensors[f"{name}x"] = tensors.pop(name)
    elif kind == "value" and tensor.numel():
        tensor.view(-1)[draw.randrange(tensor.numel())] = (
            draw.choice((0.0, -1.0, 3.0)) if tensor.is_floating_point() else 1
        )
    elif kind == "type":
        tensors[name] = tensor.to(draw.choice((torch.int64, torch.float64, torch.bool, torch.float16)))
    elif kind == "flat":
        tensors[name] = tensor.flatten()
    elif tensor.dim():
        tensors[name] = torch.cat([tensor, tensor]) if kind == "longer" else tensor[:-1].clone()
    return f"{kind} {name} {other}"


def mutated(folder: Path, net: str, draw: random.Random) -> tuple[Path, str]:
    data, text, checksum = saved(folder, net)
    path = folder / "mutated.safetensors"
    kind = draw.choice(("bytes", "bytes", "json", "json", "signed", "tensors", "signed tensors"))
    if kind == "bytes":
        content, change = bytearray(data), draw.choice(BYTES)
        change(content, draw)
        path.write_bytes(content)
        return path, change.__name__
    path.write_bytes(data)
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    header = json.loads(text)
    what = edit(header, draw) if kind in ("json", "signed") else bend(tensors, draw)
    metadata = {"controlprune": json.dumps(header), "checksum": checksum}
    save_file(tensors, str(path), metadata=signed(header, tensors) if "signed" in kind else metadata)
    return path, f"{kind}: {what}"


def works(model: nn.Module, shape: tuple[int, ...]) -> None:
    """A training step of a model that was accepted."""
    x, y = batch(0, shape)
    nn.functional.cross_entropy(model(x), y).backward()
    torch.optim.Adam(model.parameters()).step()


def fuzz_files(folder: Path, count: int, seed: int) -> Counter[str]:
    draw, seen = random.Random(seed), Counter[str]()
    for number in range(count):
        net = draw.choice(list(NETS))
        make, shape = NETS[net]
        path, what = mutated(folder, net, draw)
        model = make()
        before = bits(model)
        error = raised(lambda path=path, model=model: cp.load(path, model))
        if error is not None:
            assert isinstance(error, ValueError), f"{number} {net} {what}: {error!r}"
            assert "mutated.safetensors" in str(error), f"{number} {net} {what}: {error}"
            assert_same_bits(before, bits(model))
            seen["refused"] += 1
            continue
        if not what.startswith("signed"):  # then it says what it said before
            assert_same_bits(bits(model), intact(folder, net))
        error = raised(lambda model=model, shape=shape: works(model, shape))
        assert error is None, f"{number} {net} {what}: accepted, then {error!r}"
        seen["accepted, " + what.split(":")[0]] += 1
    return seen


def raised(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


def intact(folder: Path, net: str) -> dict[str, Any]:
    path = folder / "intact.safetensors"
    path.write_bytes(saved(folder, net)[0])
    return bits(cp.load(path, NETS[net][0]()))


def test_mutated_files(tmp_path: Path) -> None:
    seen = fuzz_files(tmp_path, FEW, seed=0)
    assert seen["refused"] > 0.8 * FEW


@pytest.mark.slow
def test_5000_mutated_files(tmp_path: Path) -> None:
    print(fuzz_files(tmp_path, MANY, seed=1))


# --- states ---------------------------------------------------------------------------------------

NUMBERS = (*WORDS, torch.zeros(3), torch.zeros(0), torch.tensor(math.nan), torch.ones(32).bool())
STEPS = 60


@lru_cache
def saved_state(net: str, layout: str) -> tuple[dict[str, Any], bytes]:
    """A good state, and the file that torch.save makes of it."""
    run = rig(net, total_steps=STEPS)
    run.train(0, 25)
    if layout == "compact":
        run.controller.shrink()
        run.train(25, 27)
    state = run.controller.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    return state, file.getvalue()


def tensors_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    return [way for way in places(value) if isinstance(at(value, way), Tensor)]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def bend_state(state: dict[str, Any], draw: random.Random) -> str:
    """A tensor of a nested state is swapped, cut, cast, or has another number in it."""
    ways = tensors_in(state)
    path, other = draw.choice(ways), draw.choice(ways)
    tensors = {"this": at(state, path), "other": at(state, other).clone()}
    what = bend(tensors, draw)
    at(state, path[:-1])[path[-1]] = tensors.get("this", torch.zeros(1))
    return f"{what} at {path}"


def mutated_state(net: str, layout: str, draw: random.Random) -> tuple[dict[str, Any] | None, str]:
    """None: torch refuses the file."""
    good, data = saved_state(net, layout)
    kind = draw.choice(("bytes", "values", "tensors", "signed values", "signed values", "signed tensors"))
    if kind == "bytes":
        content, change = bytearray(data), draw.choice(BYTES)
        change(content, draw)
        try:
            return torch.load(io.BytesIO(content), weights_only=True), change.__name__
        except Exception:
            return None, change.__name__
    state = copy.deepcopy(good)
    what = edit(state, draw, NUMBERS) if "values" in kind else bend_state(state, draw)
    return resume.signed(state) if "signed" in kind else state, f"{kind}: {what}"


def goes_on(run: Rig) -> None:
    run.train(run.controller.steps, min(STEPS, run.controller.steps + 9))
    run.controller.state_dict()
    run.controller.report()
    run.controller.finalize()


def fuzz_states(count: int, seed: int) -> Counter[str]:
    draw, seen = random.Random(seed), Counter[str]()
    runs: dict[str, Rig] = {}
    for number in range(count):
        net, layout = draw.choice(list(NETS)), draw.choice(("masked", "compact"))
        state, what = mutated_state(net, layout, draw)
        if state is None:
            seen["refused by torch"] += 1
            continue
        where = f"{number} {net} {layout} {what}"
        if net not in runs:
            runs[net] = rig(net, total_steps=STEPS, seed=1)
            runs[net].train(0, 2)
        run = runs[net]
        before, own = bits(run.model, run.optimizer), still(run.controller)
        error = raised(lambda run=run, state=state: run.controller.load_state_dict(state))
        if error is not None:
            assert isinstance(error, ValueError), f"{where}: {error!r}"
            assert str(error).startswith("state_dict: "), f"{where}: {error}"
            assert_same_bits(before, bits(run.model, run.optimizer))
            assert own == still(run.controller), where
            seen["refused"] += 1
            continue
        if not what.startswith("signed"):
            expected = dict(saved_state(net, layout)[0])
            assert pickle.dumps(flat(state)) == pickle.dumps(flat(expected)), where
        error = raised(lambda run=run: goes_on(run))
        assert error is None, f"{where}: accepted, then {error!r}"
        del runs[net]
        seen["accepted, " + what.split(":")[0]] += 1
    return seen


def test_mutated_states() -> None:
    seen = fuzz_states(FEW, seed=0)
    assert seen["refused"] > 0.4 * FEW


@pytest.mark.slow
def test_5000_mutated_states() -> None:
    print(fuzz_states(MANY, seed=1))
