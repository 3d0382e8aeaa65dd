"""A controller's state through torch's two ways of saving: bit for bit the run that did not stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rig import QUICK, Rig, assert_same_bits, bits, rig, timeless
from test_checkpoint import still
from test_replicas import STEPS, Run, state_of
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from workers import ranks

import controlprune as cp


def halfway(layout: str) -> Rig:
    run = rig("residual", policy=QUICK, total_steps=60)
    run.train(0, 30)
    assert any(not m.all() for m in run.controller.masks.values())
    if layout == "compact":
        run.controller.shrink()
    return run


def assert_same_end(run: Rig, again: Rig) -> None:
    for one in (run, again):
        one.train(30, 60)
    assert_same_bits(bits(run.model, run.optimizer), bits(again.model, again.optimizer))
    assert timeless(list(run.controller.history)) == timeless(list(again.controller.history))
    assert_same_bits(bits(run.controller.finalize()), bits(again.controller.finalize()))


@pytest.mark.parametrize("layout", ["masked", "compact"])
def test_through_torch_save_without_pickle(layout: str, tmp_path: Path) -> None:
    run, again = halfway(layout), rig("residual", policy=QUICK, total_steps=60, seed=1)
    torch.save([x.state_dict() for x in (run.controller, run.model, run.optimizer)], tmp_path / "a")
    states = torch.load(tmp_path / "a", weights_only=True)
    for part, state in zip((again.controller, again.model, again.optimizer), states, strict=True):
        part.load_state_dict(state)
    assert_same_end(run, again)


def store(run: Any, path: Path) -> None:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    parts = {"controller": cp.Packed(run.controller), "model": model, "optimizer": optimizer}
    dcp.save(parts, checkpoint_id=path)


def fetch(run: Any, path: Path) -> None:
    dcp.load({"controller": cp.Packed(run.controller)}, checkpoint_id=path)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("layout", ["masked", "compact"])
def test_through_distributed_checkpoint(layout: str, tmp_path: Path) -> None:
    run, again = halfway(layout), rig("residual", policy=QUICK, total_steps=60, seed=1)
    store(run, tmp_path / "a")
    fetch(again, tmp_path / "a")
    assert_same_end(run, again)


@ranks(2)
def test_through_distributed_checkpoint_on_2_ranks(rank: int, tmp_path: Any) -> None:
    run = Run(rank)
    run.train(30)
    run.controller.shrink()
    run.train(3)
    run.controller.sync()
    store(run, tmp_path / "a")
    dist.barrier()
    again = Run(rank)
    fetch(again, tmp_path / "a")
    again.step = again.controller.steps
    for one in (run, again):
        one.train(STEPS - one.step)
    assert state_of(again) == state_of(run)
    assert again.controller._run.replicas.repairs == 0


def test_what_is_not_packed_is_refused() -> None:
    run = halfway("masked")
    before, packed = still(run.controller), cp.Packed(run.controller)
    whole = packed.state_dict()["packed"]
    wrong: list[tuple[Any, str]] = [
        ({}, "not what Packed"),
        (None, "not what Packed"),
        ({"packed": 3}, "not what Packed"),
        ({"packed": whole[:-300]}, "corrupt, torch cannot read it"),
        ({"packed": b""}, "corrupt, torch cannot read it"),
    ]
    for state, message in wrong:
        with pytest.raises(ValueError, match=f"state_dict: .*{message}"):
            packed.load_state_dict(state)
    assert still(run.controller) == before
