"""Recorded runs: the same seed gives the same masks as when they were written down, update by update.

Small runs in float64, where another order of a sum is far from every choice between units. A change of
behaviour on purpose renews them, says so in its message, and its diff shows in which update what differs:

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python tests/pipeline/test_recorded_runs.py

`recorded/NAME.json`: the sizes of the groups, then one row per update that changed something: the step, the
units of each group that are off, and the widths of the tensors. Integers only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import QUICK, Residual, batch, mlp
from torch import Tensor, nn

import controlprune as cp

FOLDER = Path(__file__).parent / "recorded"
STEPS = 120


class Attention(nn.Module):
    """One layer of a transformer over four positions of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 12)
        self.layer = nn.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.up(x)).mean(1))


@dataclass(frozen=True)
class Case:
    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    budget: cp.Budget | cp.Price
    policy: cp.Control = QUICK
    shrink_at: int = 0  # these nets are too small for it to pay


CASES = {
    "mlp": Case(mlp, (8,), cp.Budget(flops=0.5), shrink_at=60),
    "convolutions": Case(Residual, (1, 4, 4), cp.Budget(flops=0.4, params=0.5), cp.Control()),
    "transformer": Case(Attention, (4, 2), cp.Budget(flops=0.6)),
    "price": Case(mlp, (8,), cp.Budget(flops=0.5), replace(QUICK, invert=False)),
}


def recorded(case: Case) -> dict[str, Any]:
    """The run of today."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = case.net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = cp.attach(
        model,
        optimizer,
        budget=case.budget,
        example_inputs=(torch.zeros(2, *case.shape),),
        total_steps=STEPS,
        policy=case.policy,
    )
    names = list(controller.masks)
    rows: list[dict[str, Any]] = []

    def note(now: cp.Controller) -> None:
        off = {name: torch.nonzero(~mask).flatten().tolist() for name, mask in now.masks.items()}
        row = {"off": {name: units for name, units in off.items() if units}}
        row |= {"widths": list(now.history[-1].widths)}
        if not rows or row != {key: rows[-1][key] for key in row}:
            rows.append({"step": now.steps} | row)

    controller.on_update(note)
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)  # for dropout
        x, y = batch(step, case.shape)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
        if step == case.shrink_at:
            controller.shrink()
    controller.finalize()
    sizes = {group.name: group.size for group in controller.groups}
    assert list(sizes) == names
    return {"sizes": sizes, "updates": rows}


def difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The first one, in words; empty where there is none."""
    if then["sizes"] != now["sizes"]:
        return f"the groups were {then['sizes']}, and are {now['sizes']}"
    for old, new in zip(then["updates"], now["updates"], strict=False):
        if old["step"] != new["step"]:
            return f"the next change was at step {old['step']}, and is at step {new['step']}"
        for name in then["sizes"]:
            was, off = old["off"].get(name, []), new["off"].get(name, [])
            if was != off:
                return f"step {old['step']}, group {name}: units {was} were off, and {off} are"
        if old["widths"] != new["widths"]:
            return f"step {old['step']}: the tensors were {old['widths']} wide, and are {new['widths']}"
    changes = len(then["updates"]), len(now["updates"])
    return "" if changes[0] == changes[1] else "there were {} changes, and there are {}".format(*changes)


@pytest.mark.parametrize("name", CASES)
def test_the_same_masks_as_when_they_were_written_down(name: str) -> None:
    then = json.loads((FOLDER / f"{name}.json").read_text())
    assert len(then["updates"]) > 2
    found = difference(then, recorded(CASES[name]))
    assert not found, f"{name}: {found}"


def test_a_difference_says_where_it_is() -> None:
    then = {"sizes": {"a": 4}, "updates": [{"step": 2, "off": {"a": [1]}, "widths": [4]}]}
    other = {"step": 2, "off": {"a": [3]}, "widths": [4]}
    assert difference(then, then) == ""
    assert "step 2, group a: units [1] were off, and [3] are" in difference(then, then | {"updates": [other]})
    assert "2 are" not in difference(then, then | {"updates": []})
    assert difference(then, then | {"updates": []}) == "there were 1 changes, and there are 0"
    wider = then | {"updates": [other | {"off": {"a": [1]}, "widths": [3]}]}
    assert difference(then, wider) == "step 2: the tensors were [4] wide, and are [3]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for chosen, case in CASES.items():
        run = recorded(case)
        lines = ",\n".join(f"  {json.dumps(row)}" for row in run["updates"])
        text = f'{{"sizes": {json.dumps(run["sizes"])}, "updates": [\n{lines}\n]}}\n'
        (FOLDER / f"{chosen}.json").write_text(text)
        print(f"{chosen}: {len(run['updates'])} changes")
