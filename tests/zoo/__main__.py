"""The zoo as a table: `python -m tests.zoo [table or model …] [--seed 0] [--seconds 120] [--out FILE]`."""

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
    return f"{name:34s} {result.status:8s} {counts} {gap} {result.seconds:6.1f}  {note[:150]}"


def _summary(results: dict[str, Result]) -> str:
    counts = Counter(result.status for result in results.values())
    total = len(results)
    refusals = [refusal.reason for result in results.values() for refusal in result.refused]
    reasons = Counter(reason.split(" (in ")[0] for reason in refusals)
    lines = [f"{total} models: " + ", ".join(f"{status} {n}" for status, n in counts.most_common())]
    lines.append(f"fully handled: {counts['full'] / max(total, 1):.1%}; silently wrong: {counts['WRONG']}")
    lines += [f"{n:5d} groups refused: {reason[:160]}" for reason, n in reasons.most_common(25)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.zoo")
    parser.add_argument("names", nargs="*", help="tables or models; everything when empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Result] = {}
    print(f"{'model':34s} {'status':8s} groups refused  FLOPs    error    CPU s  first note")
    for table, factories in tables().items():
        for name, factory in factories.items():
            if options.names and not {table, name} & set(options.names):
                continue
            results[name] = run(factory, options.seed, options.seconds)
            print(_row(name, results[name]), flush=True)
            if options.out:
                rows = {n: asdict(r) | {"status": r.status} for n, r in results.items()}
                options.out.write_text(json.dumps(rows, indent=1))
    print(_summary(results))


if __name__ == "__main__":
    main()
