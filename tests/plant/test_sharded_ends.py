"""A rank that dies amid a re-layout: no half-shrunk model goes on, and the last checkpoint is whole.

The peak of a shrink is measured too: beside what a rank holds, one whole tensor, never the model.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharded import by_layer
from test_sharded_shrink import Run, everything, load, save
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workers import ranks

from controlprune.plant import sharded


@ranks(2)
def _dies(rank: int, folder: Any) -> None:
    """Rank 1 is killed when the third tensor of a shrink is laid out anew."""
    run = Run(by_layer)
    run.masks(3)
    run.train(2)
    save(run, folder)
    relay, done = sharded.relay, []

    def killing(kept: Any, whole: Tensor) -> None:
        if len(done) == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(kept)
        relay(kept, whole)

    sharded.relay = killing
    try:
        run.controller.shrink()
    except BaseException:
        Path(f"{folder} told").touch()
        raise
    Path(f"{folder} went on").touch()


@ranks(2)
def _again(rank: int, folder: Any) -> None:
    """From the checkpoint, as if nothing had been."""
    run, other = Run(by_layer), Run(by_layer)
    load(run, folder)
    other.masks(3)
    other.train(2)
    for one in (run, other):
        one.controller.shrink()
        one.train(2)
    expected, found = everything(other), everything(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_rank_that_dies_in_a_shrink(tmp_path: Any) -> None:
    with pytest.raises(AssertionError):
        _dies(folder=tmp_path / "a")
    assert Path(f"{tmp_path / 'a'} told").exists()  # the other one got an error of the collective
    assert not Path(f"{tmp_path / 'a'} went on").exists()
    _again(folder=tmp_path / "a")


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


@ranks(2)
def test_no_rank_ever_holds_more_than_one_whole_tensor(rank: int) -> None:
    run = Run(by_layer)
    run.train(1)
    run.masks(3)
    largest = max(p.numel() for p in run.model.parameters())
    assert sum(p.numel() for p in run.model.parameters()) > 2 * largest
    for turn in (run.controller.shrink, run.controller.expand):
        with Largest() as made:
            turn()
        padded = largest + largest // 2  # what a collective of uneven parts gathers
        assert largest <= made.elements <= padded


def held(run: Run) -> tuple[int, int]:
    """Bytes on this rank of weights and AdamW's state: those at work, and those that are parked."""
    states = run.optimizer.state
    working = [x for p in run.model.parameters() for x in (p, *states[p].values()) if x.ndim]
    spots = run.controller.plant.spots
    parked = [x for s in spots for x in (s.home, *s.state_home.values()) if x is not None]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in working]
    return sum(x.nbytes for x in local), sum(x.nbytes for x in parked)


@ranks(2)
def test_dense_shards_stay_beside_the_small_ones_until_finalize(rank: int) -> None:
    run = Run(by_layer)
    run.train(2)
    dense, nothing = held(run)
    run.masks(2)
    run.controller.shrink()
    run.train(2)
    small, parked = held(run)
    assert nothing == 0
    assert small < 0.6 * dense
    assert 0.9 * dense < parked <= dense
    run.controller.finalize()
    assert held(run) == (small, 0)
