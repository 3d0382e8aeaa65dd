"""How many physical shapes a run may take: a compiled model is compiled anew for each.

torch.compile keeps one compiled form per set of shapes and per mode (training, evaluation), and past its
`recompile_limit` of 8 it falls back to eager without a word. With at most `COMPILED` sets of widths, the
dense ones included, both modes together stay at 2 · COMPILED <= 8. On the way from dense (p = 0) to the
budget (p = 1), p = (1 − C(n)) / (1 − r), new widths are taken only

    if they pay for their compilation (policies/pace.py), and
    at the budget, p >= 1,  or when they are 1 / (COMPILED − 2) of the way further than the last,

so the budget can be reached and room for one revision is left. Widths known already, and other units
at the same widths, are free. Masks alone change no shape.

A compiled forward goes past the hooks that are set after it was compiled: that is how it is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COMPILED", "Layouts"]

COMPILED = 4

Widths = tuple[int, ...]


@dataclass
class Layouts:
    """The sets of widths that the tensors of a run have had, and whether another one may follow."""

    seen: dict[Widths, float] = field(default_factory=dict)  # widths -> progress p when they came
    looked: bool = False  # was a hook set, to tell whether the model is compiled?
    compiled: bool = False  # and did the forward go past it?

    def admits(self, widths: Widths, progress: float, pays: bool = True) -> bool:
        if not self.compiled or widths in self.seen:
            return True
        if not pays or len(self.seen) >= COMPILED:
            return False
        stride = 1.0 / (COMPILED - 2)
        return progress >= 1.0 - 1e-9 or progress - max(self.seen.values(), default=0.0) >= stride - 1e-9

    def take(self, widths: Widths, progress: float) -> None:
        self.seen.setdefault(widths, progress)

    def __str__(self) -> str:
        limit = f", at most {COMPILED} under torch.compile (no calibration, no probes)"
        return f"{len(self.seen)} sets of widths so far{limit if self.compiled else ''}"

    def state_dict(self) -> dict[str, Any]:
        seen = [[list(widths), progress] for widths, progress in self.seen.items()]
        return {"seen": seen, "looked": self.looked, "compiled": self.compiled}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Layouts:
        seen = {tuple(map(int, widths)): float(progress) for widths, progress in state["seen"]}
        return Layouts(seen, bool(state["looked"]), bool(state["compiled"]))
