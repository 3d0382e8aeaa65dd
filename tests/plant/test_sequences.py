"""Whatever is done in whatever order, nothing of a dormant unit changes, and it returns as it left.

Random sequences of training steps, masks by hand, shrinks, expansions and checkpoints (everything saved,
loaded into a fresh model, optimizer and controller in any order) through the public surface. A ledger keeps
the dense truth of every parameter, buffer and optimizer state: live entries are read after training, dormant
ones never. After every operation what is live, and what is parked, must be the ledger's bit for bit.

`CONTROLPRUNE_EXAMPLES=1000 pytest tests/plant/test_sequences.py` for the long run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import rig
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_contract import ONLY_COMPACT, OPTIMIZERS
from torch import Tensor

import controlprune as cp
from controlprune.structure import analyse
from controlprune.structure.extents import groups_in, keep

EXAMPLES = int(os.environ.get("CONTROLPRUNE_EXAMPLES", "25"))
QUIET = cp.Control(update_every=10**6, observe_every=1)  # observes, decides nothing

Masks = tuple[tuple[bool, ...], ...]
Operation = tuple[str, Any]  # ("train", steps), ("masks", Masks), ("shrink", None), ("reload", order), …


@lru_cache
def sizes(net: str) -> tuple[int, ...]:
    make, shape = rig.NETS[net]
    return analyse(make(), (torch.zeros(2, *shape),)).sizes


def start(net: str, optimizer: str) -> rig.Rig:
    make, shape = rig.NETS[net]
    torch.manual_seed(0)
    model = make()
    made = OPTIMIZERS[optimizer]([{"params": list(model.parameters())}])
    controller = cp.attach(
        model,
        made,
        budget=cp.Budget(flops=0.5),
        example_inputs=(torch.zeros(2, *shape),),
        total_steps=1000,
        policy=QUIET,
    )
    return rig.Rig(model, made, controller, shape)


def entries(run: rig.Rig) -> dict[tuple[str, str], Tensor]:
    """Tensors that units stand in, by (name, state key): those of the model have the key ''."""
    tensors, optimizer = run.controller.plant.tensors(), run.optimizer
    names = [spot.name for spot in run.controller.plant.spots]
    found = {(name, ""): tensors[name].detach() for name in names}
    for name in names:
        for key, value in optimizer.state.get(tensors[name], {}).items():
            if isinstance(value, Tensor) and value.shape == tensors[name].shape:
                found[name, key] = value
    return found


@dataclass
class Ledger:
    """The dense truth, kept by index arithmetic of its own."""

    run: rig.Rig
    truth: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def live(self, name: str) -> Tensor:
        """Bool, dense: the entries that stand for live units only, at the present masks."""
        plant = self.run.controller.plant
        return self._where(name, plant.masks, lambda dim, extent: True)

    def _where(self, name: str, masks: Sequence[Tensor], use: Callable[[int, Any], bool]) -> Tensor:
        extents = self.run.controller.plant.structure.tensors[name]
        out = torch.ones([], dtype=torch.bool)
        for dim, extent in enumerate(extents):
            row = keep(extent, masks)
            row = row if use(dim, extent) else torch.ones_like(row)
            out = out[..., None] & row
        return out

    def shown(self, name: str, tensor: Tensor) -> Tensor:
        """The live entries of a tensor as it lies now, in row-major order."""
        return (tensor if self.run.controller.plant.compact else tensor[self.live(name)]).flatten()

    def record(self) -> None:
        """After training: what is live has moved; statistics of what only computes, too (masked layout)."""
        plant = self.run.controller.plant
        for (name, key), tensor in entries(self.run).items():
            live = self.live(name)
            if (name, key) not in self.truth:
                self.truth[name, key] = torch.zeros(live.shape, dtype=tensor.dtype)
            self.truth[name, key][live] = self.shown(name, tensor)
            if not plant.compact and name not in plant.structure.parameters:
                self.truth[name, key] = tensor.clone()

    def check(self) -> None:
        plant = self.run.controller.plant
        parked = plant.state_dict()
        for (name, key), tensor in entries(self.run).items():
            truth, live = self.truth[name, key], self.live(name)
            assert torch.equal(self.shown(name, tensor), truth[live]), f"live {name} {key}"
            waiting = parked.get(f"parked/{name}/{key}")
            if waiting is None:
                still = name not in plant.structure.parameters and not plant.compact
                late = key and not truth[~live].any()  # it appeared while they were away
                assert live.all() or still or late, f"nothing is parked of {name} {key}"
            else:
                assert torch.equal(waiting, truth[~live]), f"parked {name} {key}"


@st.composite
def sequences(draw: st.DrawFn) -> tuple[str, str, list[Operation]]:
    net = draw(st.sampled_from(sorted(rig.NETS)))
    optimizer = draw(st.sampled_from(sorted(set(OPTIMIZERS) - ONLY_COMPACT)))
    masks = st.tuples(*(st.tuples(*[st.booleans()] * n).filter(any) for n in sizes(net)))
    operation = st.one_of(
        st.tuples(st.just("train"), st.integers(1, 2)),
        st.tuples(st.just("masks"), masks),
        st.tuples(st.sampled_from(["shrink", "expand"]), st.none()),
        st.tuples(st.just("reload"), st.permutations(["model", "optimizer", "controller"])),
    )
    return net, optimizer, draw(st.lists(operation, min_size=3, max_size=10))


def carry_out(run: rig.Rig, optimizer: str, net: str, operation: Operation) -> rig.Rig:
    what, how = operation
    if what == "train":
        run.train(run.controller.steps, run.controller.steps + how)
    elif what == "masks":
        names = [group.name for group in run.controller.groups]
        run.controller.set_masks({n: torch.tensor(m) for n, m in zip(names, how, strict=True)})
    elif what == "reload":
        saved = {part: getattr(run, part).state_dict() for part in how}
        run = start(net, optimizer)
        for part in how:
            getattr(run, part).load_state_dict(saved[part])
    else:
        getattr(run.controller, what)()
    return run


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(sequences())
def test_nothing_is_lost(case: tuple[str, str, list[Operation]]) -> None:
    net, optimizer, operations = case
    torch.set_num_threads(1)
    run = start(net, optimizer)
    ledger = Ledger(run)
    ledger.record()
    for operation in operations:
        run = ledger.run = carry_out(run, optimizer, net, operation)
        if operation[0] == "train":
            ledger.record()
        ledger.check()
    run.controller.detach()
    tensors = dict(run.model.state_dict(keep_vars=True))
    for (name, key), truth in ledger.truth.items():
        found = run.optimizer.state[tensors[name]][key] if key else tensors[name].detach()
        assert torch.equal(found, truth), f"{name} {key} at the end"


def test_the_ledger_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """One parked entry that moves by one unit in the last place is seen."""
    run = start("mlp", "adam")
    ledger = Ledger(run)
    run.train(0, 2)
    ledger.record()
    run.controller.set_masks({run.controller.groups[0].name: torch.arange(32) > 0})
    run.controller.shrink()
    ledger.check()
    spot = next(s for s in run.controller.plant.spots if s.home is not None and groups_in(s.extents[0]))
    assert spot.home is not None
    spot.home[0] = torch.nextafter(spot.home[0], torch.tensor(9.0))
    with pytest.raises(AssertionError, match="parked"):
        ledger.check()
