"""How many physical shapes a run may take: a compiled model is compiled anew for each.

torch.compile keeps one compiled form per set of shapes and per mode (training, evaluation), and past its
`recompile_limit` of 8 it falls back to eager without a word. With at most `COMPILED` sets of widths, the
dense ones included, both modes together stay at 2 · COMPILED <= 8. On the way from dense (p = 0) to the
budget (p = 1), p = (1 − C(n)) / (1 − r), new widths are taken only

    at the budget, p >= 1,  or when they are 1 / (COMPILED − 2) of the way further than the last,

so the budget is always reached and room for one revision is left. Widths known already, and other units
at the same widths, are free. Masks alone change no shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["COMPILED", "Layouts"]

COMPILED = 4

Widths = tuple[int, ...]


@dataclass
class Layouts:
    """The sets of widths that the tensors of a run have had, and whether another one may follow."""

    seen: dict[Widths, float] = field(default_factory=dict)  # widths -> progress p when they came

    def admits(self, widths: Widths, progress: float, limit: int | None) -> bool:
        if limit is None or widths in self.seen:
            return True
        if len(self.seen) >= limit:
            return False
        stride = 1.0 / max(1, limit - 2)
        return progress >= 1.0 - 1e-9 or progress - max(self.seen.values(), default=0.0) >= stride - 1e-9

    def take(self, widths: Widths, progress: float) -> None:
        self.seen.setdefault(widths, progress)
