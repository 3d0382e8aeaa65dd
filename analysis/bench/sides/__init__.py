"""The sides, by name. `SIDES` are in every table; `LEVERS` are tried on a task to see whether they help."""

from __future__ import annotations

from collections.abc import Callable

from .by_hand import ByHand, Scratch, cubic, even
from .gates import Gates
from .ours import Ours, Taught
from .side import Run, Side
from .torch_pruning import TorchPruning

__all__ = ["FOUND", "LEVERS", "SIDES", "Run", "Side", "make"]

Make = Callable[[], Side]

SIDES: dict[str, Make] = {
    "dense": Side,
    "ours": Ours,
    "ours + teacher": Taught,
    "small from scratch": Scratch,
    "small from scratch, widths of ours": lambda: Scratch(found=True),
    "static mask": lambda: ByHand("random", even(0.0)),
    "norm at step 0": lambda: ByHand("norm", even(0.0)),
    "first order at 10 %": lambda: ByHand("first", even(0.1)),
    "norm at two thirds": lambda: ByHand("norm", even(2 / 3)),
    "cubic, global magnitude": lambda: ByHand("magnitude", cubic(0.1, 0.5), "global"),
    "learned gates, Lagrangian": Gates,
    "Torch-Pruning": TorchPruning,
    "norm, 3 cuts, uniform": lambda: ByHand("norm", even(0.1, 0.2, 0.3)),
    "movement, 3 cuts": lambda: ByHand("movement", even(0.1, 0.2, 0.3)),
    "Fisher, 3 cuts, uniform": lambda: ByHand("fisher", even(0.1, 0.2, 0.3)),
    "Fisher per FLOP, 3 cuts": lambda: ByHand("fisher", even(0.1, 0.2, 0.3), "per cost"),
}

LEVERS: dict[str, Make] = {
    "Fisher per FLOP, 1 cut": lambda: ByHand("fisher", even(0.1), "per cost"),
    "Fisher per FLOP, 3 cuts, windows": lambda: ByHand(
        "fisher", even(0.1, 0.2, 0.3), "per cost", window=True
    ),
    "Fisher per FLOP, 3 early cuts": lambda: ByHand("fisher", even(0.04, 0.07, 0.1), "per cost"),
    "Fisher per FLOP, cubic": lambda: ByHand("fisher", cubic(0.05, 0.3), "per cost"),
    "ours without dwell, revisions and looks": lambda: Ours(dwell=0, revise_every=0, looks=0.0),
    "ours without hysteresis": lambda: Ours(hysteresis=0.0),
    "ours with the gate network": lambda: Ours(learned=True),
    "ours, the price steers": lambda: Ours(invert=False),
}

FOUND = ("small from scratch, widths of ours",)  # they need a row of ours at the same budget and seed


def make(name: str) -> Side:
    table = SIDES | LEVERS
    if name not in table:
        raise ValueError(f"side {name!r}: give one of {', '.join(table)}")
    return table[name]()
