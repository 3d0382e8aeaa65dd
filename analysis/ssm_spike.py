"""The loss after a truncation: Adam's moments carried, sliced, or reset.

    python analysis/ssm_spike.py --seeds 10          # about two core-minutes

scikit-learn's digits pixel by pixel (64 steps), one block with an LRU of 128 states, cut to 24 after 300
steps of Adam. From there every side trains on the same batches: `carried` (moments.py), `sliced` (the first
24 entries of every moment, as in the published code), `reset` (state of the cut parameters dropped), `uncut`.
The loss is that of the held-out digits after every step; the spike is the largest of the first 50 over the
one before the cut.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Results, bootstrap, machine
from ssm_smnist import Classifier
from torch import Tensor
from torch.nn.functional import cross_entropy

from controlprune import ssm
from controlprune.app.tasks import load

FULL, SMALL, BEFORE, AFTER, BATCH = 128, 24, 300, 60, 50
SIDES = ("carried", "sliced", "reset", "uncut")
Split = tuple[Tensor, Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=Path("analysis/results/ssm_spike.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/ssm-spike.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.out)
    for seed in range(options.seeds):
        if not results.has(seed=seed, rate=options.rate):
            results.append(piece(seed, options.rate))
    rows = [row for row in results.rows() if row["rate"] == options.rate]
    print(summary(rows))
    picture(rows, options.picture)
    return 0


def piece(seed: int, rate: float, before: int = BEFORE, after: int = AFTER) -> list[dict[str, Any]]:
    """All sides from one trained layer."""
    task = load("digits")
    train, held = ((x.flatten(1)[..., None] * 2 - 1, y) for x, y in (task.train, task.test))
    torch.manual_seed(seed)
    model = Classifier(FULL)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    order = torch.Generator().manual_seed(1000 + seed)
    batches = torch.randint(len(train[0]), (before + after, BATCH), generator=order)
    for chosen in batches[:before]:
        step(model, optimizer, train, chosen)
    start = held_out(model, held)
    rows = []
    for side in SIDES:
        mine, its = branch(model, optimizer)
        bound = cut(mine, its, side)
        torch.manual_seed(seed)
        losses = [held_out(mine, held)]
        for chosen in batches[before:]:
            step(mine, its, train, chosen)
            losses.append(held_out(mine, held))
        told = {"side": side, "seed": seed, "rate": rate, "start": start, "losses": losses, "bound": bound}
        rows.append({**told, **machine()})
    return rows


def branch(model: Classifier, optimizer: torch.optim.Adam) -> tuple[Classifier, torch.optim.Adam]:
    """A copy of both that goes its own way."""
    mine = copy.deepcopy(model)
    its = torch.optim.Adam(mine.parameters(), lr=optimizer.param_groups[0]["lr"])
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return mine, its


def cut(model: Classifier, optimizer: torch.optim.Adam, side: str) -> float:
    """To SMALL states, with the moments treated as the side says; the bound."""
    if side == "uncut":
        return 0.0
    ((_, layer),) = ssm.state_space_layers(model)
    old = {n: dict(optimizer.state[p]) for n, p in layer.named_parameters() if n != "D"}
    bound = ssm.truncate(layer, SMALL, optimizer if side == "carried" else None).bound
    for name, entries in old.items():
        parameter = layer.get_parameter(name)
        if side == "reset":
            del optimizer.state[parameter]
        if side == "sliced":
            along = 1 if name == "C" else 0
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][key] = entries[key].narrow(along, 0, SMALL).clone()
    return bound


def step(model: Classifier, optimizer: torch.optim.Adam, split: Split, chosen: Tensor) -> None:
    loss = cross_entropy(model(split[0][chosen]), split[1][chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def held_out(model: Classifier, split: Split) -> float:
    model.eval()
    loss = cross_entropy(model(split[0]), split[1]).item()
    model.train()
    return loss


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Spikes, what is lost over the first 50 steps, and the end, means with intervals over seeds."""
    lines = [f"{'side':<10}{'cut itself':>22}{'spike':>22}{'mean of 50':>22}{'after ' + str(AFTER):>22}"]
    for side in SIDES:
        curves = np.array([np.array(r["losses"]) - r["start"] for r in rows if r["side"] == side])
        figures = (curves[:, 0], curves[:, :51].max(1), curves[:, 1:51].mean(1), curves[:, -10:].mean(1))
        lines.append(f"{side:<10}" + "".join(f"{bootstrap(list(f))!s:>22}" for f in figures))
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The mean loss over seeds after the cut, with the interval of the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    for side in SIDES:
        curves = np.array([r["losses"] for r in rows if r["side"] == side])
        steps = np.arange(curves.shape[1])
        spread = 1.96 * curves.std(0, ddof=1) / np.sqrt(len(curves))
        axes.plot(steps, curves.mean(0), label=side)
        axes.fill_between(steps, curves.mean(0) - spread, curves.mean(0) + spread, alpha=0.15)
    axes.axhline(
        float(np.mean([r["start"] for r in rows])), color="grey", lw=0.8, ls=":", label="before the cut"
    )
    axes.set_xlabel(f"steps after the cut from {FULL} to {SMALL} states")
    axes.set_ylabel("held-out loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
