"""The zoo as a table: `python -m tests.zoo [table or model …] [--train] [--granularity weight] [--out FILE]`.

With `--train` every model goes through a whole training run under a budget (train.py), by any granularity,
else through the contract of masked and shrunk outputs (check.py), by channel. `--out FILE` keeps what each
model showed; a later call with the same settings goes on where that one stopped.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from controlprune.state.files import replacing
from controlprune.structure.groups import Refusal

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


def _kept(path: Path | None, kind: type[Any], settings: str) -> dict[str, Any]:
    """What an earlier call with these settings wrote to `path`."""
    rows = json.loads(path.read_text()) if path is not None and path.exists() else {}
    found = {name: row for name, row in rows.items() if row["settings"] == settings}
    return {name: _result(kind, row) for name, row in found.items()}


def _result(kind: type[Any], row: dict[str, Any]) -> Any:
    values = {field.name: row[field.name] for field in fields(kind)}
    if "refused" in values:
        values["refused"] = tuple(Refusal(**refusal) for refusal in values["refused"])
    return kind(**values)


def _keep(path: Path, results: dict[str, Any], settings: str) -> None:
    rows = {n: asdict(r) | {"status": r.status, "settings": settings} for n, r in results.items()}
    with replacing(path) as part:
        part.write_text(json.dumps(rows, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tests.zoo")
    parser.add_argument("names", nargs="*", help="tables or models; everything when empty")
    parser.add_argument("--train", action="store_true", help="a training run under a budget for each")
    parser.add_argument("--granularity", default="channel", help="of the training run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    settings = f"train {options.granularity}" if options.train else "check"
    settings += f", seed {options.seed}"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = {
        name: factory
        for table, factories in tables().items()
        for name, factory in factories.items()
        if not options.names or {table, name} & set(options.names)
    }
    print(TRAINED if options.train else CHECKED)
    results = _kept(options.out, Trained if options.train else Result, settings)
    for name, factory in chosen.items():
        if name not in results:
            if options.train:
                results[name] = train(factory, options.seed, options.seconds, options.granularity)
            else:
                results[name] = run(factory, options.seed, options.seconds)
            if options.out:
                _keep(options.out, results, settings)
        print(_trained_row(name, results[name]) if options.train else _row(name, results[name]), flush=True)
    shown = {name: results[name] for name in chosen}
    print(_trained_summary(shown) if options.train else _summary(shown))


if __name__ == "__main__":
    main()
