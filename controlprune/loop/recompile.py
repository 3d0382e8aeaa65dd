"""How many physical shapes a run may take: a compiled model is compiled anew for each.

torch.compile keeps one compiled form per set of shapes and per mode (training, evaluation), and past its
`recompile_limit` of 8 it falls back to eager without a word. With at most `COMPILED` sets of widths, the
dense ones included, both modes together stay at 2 · COMPILED <= 8. On the way from dense (p = 0) to the
budget (p = 1), p = (1 − C(n)) / (1 − r), new widths are taken only

    if they pay for their compilation (policies/feedback/pace.py), and
    at the budget, p >= 1,  or when they are 1 / (COMPILED − 2) of the way further than the last,

so the budget can be reached and room for one revision is left. Widths known already, and other units
at the same widths, are free. Masks alone change no shape, but norms that count live units are a second form
of the dense one (structure/standins.py): with them there is one set of widths less.

That a model is compiled is told by dynamo: it has compiled frames since the run began.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..cost.problem import Problem
from ..policies.feedback.pace import recompile_pays
from ..structure.groups import widths_of

__all__ = ["COMPILED", "Layouts", "compilations", "progress"]

COMPILED = 4

Widths = tuple[int, ...]


@dataclass
class Layouts:
    """The sets of widths that the tensors of a run have had, and whether another one may follow."""

    seen: dict[Widths, float] = field(default_factory=dict)  # widths -> progress p when they came
    compiled: bool = False

    def admits(self, widths: Widths, progress: float, pays: bool = True, most: int = COMPILED) -> bool:
        if not self.compiled or widths in self.seen:
            return True
        if not pays or len(self.seen) >= most:
            return False
        stride = 1.0 / (most - 2)
        return progress >= 1.0 - 1e-9 or progress - max(self.seen.values(), default=0.0) >= stride - 1e-9

    def choose(
        self,
        problem: Problem,
        masks: Sequence[Tensor],
        *,
        compact: bool,
        then: Widths,
        held: Widths,
        left: int,
    ) -> bool | None:
        """Compact or not, where `compact` is wanted and tensors of widths `held` have `left` steps to go.

        `then`: their widths if it is so.

        Where a compiled model may not take those shapes: masked, which changes none, if it is so now, else
        None: hold.
        """
        resource = next(iter(problem.costs))
        pays = recompile_pays(
            problem, problem.fraction(resource, held), problem.fraction(resource, then), left
        )
        most = COMPILED - bool(problem.structure.norms or problem.structure.routers)
        if self.admits(then, progress(problem, widths_of(masks)), pays, most):
            return compact
        return False if held == problem.structure.sizes else None

    def take(self, widths: Widths, progress: float) -> None:
        self.seen.setdefault(widths, progress)

    def __str__(self) -> str:
        limit = f", at most {COMPILED} under torch.compile"
        return f"{len(self.seen)} sets of widths so far{limit if self.compiled else ''}"

    def state_dict(self) -> dict[str, Any]:
        seen = [[list(widths), progress] for widths, progress in self.seen.items()]
        return {"seen": seen, "compiled": self.compiled}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Layouts:
        seen = {tuple(map(int, widths)): float(progress) for widths, progress in state["seen"]}
        return Layouts(seen, bool(state["compiled"]))


def progress(problem: Problem, widths: Widths) -> float:
    """How far from dense (0) to the budget (1), by the resource that is furthest behind."""
    target = {k: r for k, r in problem.budget.items() if r < 1.0}
    return min(((1.0 - problem.fraction(k, widths)) / (1.0 - r) for k, r in target.items()), default=0.0)


def compilations() -> int:
    """Frames that dynamo has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["frames"]["ok"])
