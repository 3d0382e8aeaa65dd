"""Made-up runs for the tests of what people see: no training, but the shapes of a real one."""

from __future__ import annotations

import math
import random

from controlprune.loop.history import History, Record


def made_up_run(groups: int = 7, updates: int = 120, steps: int = 600, budget: float = 0.4) -> History:
    """Widths fall to the budget with a little coming and going; two shrinks."""
    draw = random.Random(0)
    names = [f"layers.{i}.conv{1 + i % 2}" for i in range(groups)]
    sizes = [16 * 2 ** (i % 3) for i in range(groups)]
    history = History(names, sizes, {"flops": budget}, total_steps=steps)
    before, widths = tuple(sizes), tuple(sizes)
    for update in range(1, updates + 1):
        progress = update / updates
        reference = max(budget, 1 - (1 - budget) * min(1.0, progress / 0.6))
        shares = [min(1.0, reference ** (0.3 + (i % 4) / 3)) for i in range(groups)]
        active = tuple(
            max(1, min(n, round(n * share + draw.choice((-1, 0, 0, 1)))))
            for n, share in zip(sizes, shares, strict=True)
        )
        event = "shrink" if update in (updates // 2, 2 * updates // 3) else ""
        widths = active if event else tuple(max(w, a) for w, a in zip(widths, active, strict=True))
        history.append(
            Record(
                step=update * steps // updates,
                loss=2.3 * math.exp(-4 * progress) + 0.1 + 0.05 * draw.random(),
                active=active,
                widths=widths,
                price={"flops": 0.02 * math.exp(3 * progress)},
                reference={"flops": reference},
                realised={"flops": reference * (1 - 0.02 * draw.random())},
                off=tuple(max(0, b - a) for a, b in zip(active, before, strict=True)),
                on=tuple(max(0, a - b) for a, b in zip(active, before, strict=True)),
                event=event,
                seconds=update * 0.1,
                overhead_seconds=update * 0.002,
            )
        )
        before = active
    return history
