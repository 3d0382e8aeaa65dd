"""A rank that dies amid a re-layout: no half-shrunk model goes on, and the last checkpoint is whole.

The peak of a shrink is measured too: beside what a rank holds, one whole tensor, never the model.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import test_sharded_shrink
import torch
from test_sharded import by_layer
from test_sharded_shrink import Run, everything, load, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from workers import ranks

from controlprune.plant import layout, sharded


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


class Host:
    """A pretend host, where what is parked lies: only `parked` and `fetched` go between it and the rest."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []  # so that no memory is given out again
        for module in (sharded, layout):
            module.parked, module.fetched = self.parked, self.fetched  # type: ignore[attr-defined]

    def parked(self, tensor: Tensor, device: torch.device | None) -> Tensor:
        if device is None:
            return tensor
        self.kept.append(tensor.clone())
        return self.kept[-1]

    def fetched(self, home: Tensor, live: Tensor) -> Tensor:
        with _disable_current_modes():
            return home.to(live.dtype, copy=True)


class Apart(TorchDispatchMode):
    """No operator on tensors of the host and others, but copies; what is made of the host's alone is its."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host, self.mixed = host, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = {tensor.untyped_storage().data_ptr() for tensor in self.host.kept}
        where = {x.untyped_storage().data_ptr() in there for x in plain((args, kwargs)) if x.numel()}
        out = func(*args, **(kwargs or {}))
        if where == {True}:
            self.host.kept += plain(out)
        elif len(where) == 2 and func not in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.mixed.add(str(func))
        return out


def plain(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if type(x) in (Tensor, nn.Parameter)]


TURNS: dict[str, Callable[[Run], Any]] = {
    "masked": lambda run: run.masks(3),
    "shrunk": lambda run: run.controller.shrink(),
    "other units": lambda run: run.masks(2),
    "saved": lambda run: run.controller.load_state_dict(run.controller.state_dict()),
    "expanded": lambda run: run.controller.expand(),
    "shrunk again": lambda run: run.controller.shrink(),
}


@ranks(2)
def test_parked_on_the_host_as_beside_the_live_shards(rank: int) -> None:
    beside = Run(by_layer)
    host = Host()
    run = Run(by_layer, park_on="cpu")
    for one in (beside, run):
        one.train(2)
    shards = [StorageWeakRef(x.untyped_storage()) for x in lying(run)[0][:12]]  # of two layers
    apart = Apart(host)
    for where, turn in TURNS.items():
        with nullcontext() if where == "saved" else apart:  # packed where the masks are
            for one in (beside, run):
                turn(one)
                one.train(1)
                one.controller.plant.weight_norms()
        expected, found = everything(beside), everything(run)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), where
    assert not apart.mixed, apart.mixed
    assert all(shard.expired() for shard in shards), "the dense shards are gone from where they were"
    there = {tensor.untyped_storage().data_ptr() for tensor in host.kept}
    parked = lying(run)[1]
    assert len(parked) > 12
    assert all(x.untyped_storage().data_ptr() in there for x in parked if x.numel())


class Peak(TorchDispatchMode):
    """Bytes alive at once: of `before`, as long as they are, and of what is made within."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count(before)
        self.bytes = self.now

    @property
    def now(self) -> int:
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        return sum(size for _, size in self.alive.values())

    def _count(self, tensors: Sequence[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in plain((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self._count([x for x in plain(out) if x.untyped_storage()._cdata not in known])
        self.bytes = max(self.bytes, self.now)
        return out


def deep() -> nn.Module:
    """Seven layers, most of 33 kB."""
    torch.manual_seed(0)
    inner = [module for _ in range(6) for module in (nn.ReLU(), nn.Linear(64, 64))]
    return nn.Sequential(nn.Linear(8, 64), *inner, nn.ReLU(), nn.Linear(64, 4)).double()


@ranks(2)
def test_a_shrink_takes_less_than_a_layer_and_its_state_at_its_peak(rank: int) -> None:
    """Beside what is there before and after, what is parked included."""
    test_sharded_shrink.net = deep
    layer = 3 * 8 * sum(p.numel() for p in nn.Linear(64, 64).parameters())  # weights and AdamW's two
    model = 3 * 8 * sum(p.numel() for p in deep().parameters()) // 2  # a rank's part
    for masked in (False, True):
        run = Run(by_layer)
        run.train(2)
        masks = [torch.arange(g.size) % 2 > 0 for g in run.controller.groups]
        if masked:
            run.controller.plant.apply(masks, compact=False)
        with Peak([x for of in lying(run) for x in of]) as peak:
            before = peak.now
            run.controller.plant.apply(masks, compact=True)
        lasting = max(before, sum(x.nbytes for of in lying(run) for x in of))
        assert before == pytest.approx((1 + masked) * model, rel=0.01)
        assert peak.bytes - lasting < layer < model / 3


def lying(run: Run) -> tuple[list[Tensor], list[Tensor]]:
    """What is on this rank of weights and AdamW's state: at work, and parked."""
    states = run.optimizer.state
    working = [x for p in run.model.parameters() for x in (p, *states[p].values()) if x.ndim]
    spots = run.controller.plant.spots
    parked = [x for s in spots for x in (s.home, *s.state_home.values()) if x is not None]
    return [x.to_local() if isinstance(x, DTensor) else x for x in working], parked


def held(run: Run) -> tuple[int, int]:
    """Bytes of it."""
    working, parked = lying(run)
    return sum(x.nbytes for x in working), sum(x.nbytes for x in parked)


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
