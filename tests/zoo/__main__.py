"""The zoo as a table: `python -m tests.zoo [table or model …] [--train] [--granularity weight] [--out FILE]`.

With `--train` every model goes through a whole training run under a budget (train.py), by any granularity,
else through the contract of masked and shrunk outputs (check.py), by channel.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from .check import Result, run
from .tables import tables
from .train import Trained, train

CHECKED = f"{'model':34s} {'status':8s} groups refused  FLOPs    error    CPU s attach passes  first note"
TRAINED = f"{'model':34s} {'status':8s} budget   used updates reloaded  CPU s  note"


def _row(name: str, result: Result) -> str:
    gap = f"{result.max_error:8.1e}" if result.groups else " " * 8
    note = result.failure or "; ".join(
        part
        for part in (
            "" if result.restored else "NOT RESTORED",
            "" if result.trains else "shrunk model does not train",
            ""
            if result.max_error_float64 is None or result.exact
            else f"float64 {result.max_error_float64:.1e}",
            next((f"{r.name}: {r.reason}" for r in result.refused), ""),
        )
        if part
    )
    counts = f"{result.groups:6d} {len(result.refused):7d} {result.flop_ratio:6.2f}"
    time = f"{result.seconds:6.1f} {result.attach:6.1f} {result.forwards:6d}"
    return f"{name:34s} {result.status:8s} {counts} {gap} {time}  {note[:150]}"


def _trained_row(name: str, result: Trained) -> str:
    use = f"{result.budget:6.3f} {result.used:6.3f} {result.observed:7d} {result.different:8.1e}"
    return f"{name:34s} {result.status:8s} {use} {result.seconds:6.1f}  {result.failure[:400]}"


def _trained_summary(results: dict[str, Trained]) -> str:
    counts = Counter(result.status for result in results.values())
    runs = len(results) - counts["refused"]
    lines = [f"{runs} models trained: " + ", ".join(f"{status} {n}" for status, n in counts.most_common())]
    return "\n".join([*lines, f"ended small and inside the budget: {counts['small'] / max(runs, 1):.1%}"])


def _summary(results: dict[str, Result]) -> str:
    counts = Counter(result.status for result in results.values())
    total = len(results)
    refusals = [refusal.reason for result in results.values() for refusal in result.refused]
    reasons = Counter(reason.split(" (in ")[0] for reason in refusals)
    lines = [f"{total} models: " + ", ".join(f"{status} {n}" for status, n in counts.most_common())]
    lines.append(f"fully handled: {counts['full'] / max(total, 1):.1%}; silently wrong: {counts['WRONG']}")
    passes = sorted(result.forwards for result in results.values() if not result.failure)
    if passes:
        lines.append(f"passes of the traced model: median {passes[len(passes) // 2]}, most {passes[-1]}")
    slowest = sorted(results.items(), key=lambda item: -item[1].attach)[:10]
    lines += [f"{result.attach:5.1f} s to attach, {result.forwards} passes: {n}" for n, result in slowest]
    lines += [f"{n:5d} groups refused: {reason[:160]}" for reason, n in reasons.most_common(25)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.zoo")
    parser.add_argument("names", nargs="*", help="tables or models; everything when empty")
    parser.add_argument("--train", action="store_true", help="a training run under a budget for each")
    parser.add_argument("--granularity", default="channel", help="of the training run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = {
        name: factory
        for table, factories in tables().items()
        for name, factory in factories.items()
        if not options.names or {table, name} & set(options.names)
    }
    checked: dict[str, Result] = {}
    trained: dict[str, Trained] = {}
    print(TRAINED if options.train else CHECKED)
    for name, factory in chosen.items():
        if options.train:
            trained[name] = train(factory, options.seed, options.seconds, options.granularity)
            print(_trained_row(name, trained[name]), flush=True)
        else:
            checked[name] = run(factory, options.seed, options.seconds)
            print(_row(name, checked[name]), flush=True)
        if options.out:
            rows = {n: asdict(r) | {"status": r.status} for n, r in (trained or checked).items()}
            options.out.write_text(json.dumps(rows, indent=1))
    print(_trained_summary(trained) if options.train else _summary(checked))


if __name__ == "__main__":
    main()
