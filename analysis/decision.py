"""What a large model costs its controller: seconds of an update and their growth, of a trace, of an attach.

    python -m analysis.decision updates               G groups of N units: an update that cuts
    python -m analysis.decision traces 7 70 400       Llamas of so many billion parameters, no memory taken
    python -m analysis.decision attaches 0.1 1 3      with it, in bfloat16, and SGD
    python -m analysis.decision tables --into docs/gpu.md

Process CPU seconds on one thread, MB of resident memory that the call added at its peak; every case in a
process of its own, a line of JSON each. An update is `decide` of the default policy in the middle of its cut,
from made-up gradients; `kept`: what the policy remembers. The exponents p are those of the least squares
lines through (log units, log seconds) along a row or a column of the table; n log n has p = 1.1 here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import controlprune as cp
from controlprune.cost.problem import pose
from controlprune.cost.survey import exact_costs
from controlprune.policies.base import Observation

from .bench.run import provenance
from .bench.tables import placed
from .measure import Results

__all__ = ["main", "tables"]

RESULTS = Path(__file__).parent / "results" / "decision.jsonl"
LLAMA = {  # hidden, layers, heads, key/value heads, feed-forward
    0.1: (768, 12, 12, 12, 2048),
    1.0: (2048, 16, 32, 8, 8192),
    3.0: (3072, 28, 24, 8, 8192),
    7.0: (4096, 32, 32, 32, 11008),
    70.0: (8192, 80, 64, 8, 28672),
    400.0: (16384, 126, 128, 8, 53248),
}
GROUPS, UNITS = (10, 30, 100, 200, 1000), (100, 1000, 10_000)
HORIZON = 6000
Row = dict[str, Any]


def layers(groups: int, units: int) -> nn.Module:
    """A chain of linear layers on the meta device."""
    found: list[nn.Module] = [nn.Linear(8, units)]
    for _ in range(groups - 1):
        found += [nn.ReLU(), nn.Linear(units, units)]
    return nn.Sequential(*found, nn.ReLU(), nn.Linear(units, 8))


def update(groups: int, units: int) -> Row:
    """The median of those that cut."""
    with torch.device("meta"):
        structure = cp.trace(layers(groups, units), (torch.zeros(1, 8, device="meta"),)).structure
    costs = exact_costs(["flops"], structure)
    problem = pose(structure, cp.Budget(flops=0.5), costs, total_steps=HORIZON, round_to=8, batch=1, seed=0)
    policy = cp.Control().begin(problem)
    masks = tuple(torch.ones(units, dtype=torch.bool) for _ in range(groups))
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(100, HORIZON // 2 + 1, 100):
        gradients = torch.randn(groups * units, generator=generator).exp() * 1e-3
        policy.sees(Observation(step, 1.0, gradients))
        seen = Observation(step, 1.0, weigh=gradients.square, masks=masks)
        started = time.process_time()
        decision = policy.decide(seen)
        spent = time.process_time() - started
        if decision is not None and any(
            not torch.equal(a, b) for a, b in zip(masks, decision.masks, strict=True)
        ):
            found.append(spent)
            masks = decision.masks
    own = (*vars(policy.units.moments).values(), policy.units.window, policy.units.first, policy.units.age)
    kept = sum(x.numel() * x.element_size() for x in own)
    return {"kind": "update", "groups": groups, "units": units, "seconds": float(np.median(found)),
            "updates": len(found), "kept": kept / 1e6}  # fmt: skip


def llama(billions: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, count, heads, shared, inner = LLAMA[billions]
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=count, num_attention_heads=heads,
                         num_key_value_heads=shared, intermediate_size=inner, use_cache=False,
                         tie_word_embeddings=billions < 7, dtype=torch.bfloat16)  # fmt: skip
    return LlamaForCausalLM(config)


def traced(billions: float) -> Row:
    with torch.device("meta"):
        model = llama(billions)
        inputs = {
            "input_ids": torch.zeros(1, 16, dtype=torch.int64),
            "attention_mask": torch.zeros(1, 1, 16, 16),
        }
    return _observed("trace", model, lambda: cp.trace(model, inputs).structure)


def attached(billions: float) -> Row:
    torch.set_default_dtype(torch.bfloat16)
    model = llama(billions)
    torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.int64)}

    def attach() -> Any:
        controller = cp.attach(
            model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=inputs, total_steps=HORIZON
        )
        return controller.plant.structure

    return _observed("attach", model, attach)


def _observed(kind: str, model: nn.Module, call: Callable[[], Any]) -> Row:
    """What the call takes, and the structure that it finds."""
    held, before = _resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    structure = call()
    spent = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"kind": kind, "parameters": sum(p.numel() for p in model.parameters()),
            "groups": len(structure.groups), "units": sum(structure.sizes), "seconds": spent,
            "peak": max(0, peak - before) / 1024, "left": _resident() - held, "model": held}  # fmt: skip


def _resident() -> float:
    """MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def alone(call: Callable[..., Row], *arguments: Any) -> tuple[Row, Row]:
    """In a process of its own, so that its peak is its own; and where that was."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_one_thread, call, *arguments).result()


def _one_thread(call: Callable[..., Row], *arguments: Any) -> tuple[Row, Row]:
    torch.set_num_threads(1)
    return call(*arguments), provenance()


def main(arguments: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("command", choices=("updates", "traces", "attaches", "tables"))
    parser.add_argument("billions", nargs="*", type=float, help=f"of {[*LLAMA]}")
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.command in ("traces", "attaches") and not (
        options.billions and all(b in LLAMA for b in options.billions)
    ):
        parser.error(f"billions={options.billions}: give some of {[*LLAMA]}")
    results = Results(options.results)
    if options.command == "tables":
        made = tables(results.rows())
        if options.into is None:
            print("\n\n".join(made.values()))
        else:
            options.into.write_text(placed(options.into.read_text(encoding="utf-8"), made), encoding="utf-8")
        return 0
    call, cases = {
        "updates": (update, [(g, n) for g in GROUPS for n in UNITS]),
        "traces": (traced, [(b,) for b in options.billions]),
        "attaches": (attached, [(b,) for b in options.billions]),
    }[options.command]
    for case in cases:
        row, origin = alone(call, *case)
        print(row, flush=True)
        results.append([row | origin])
    return 0


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Of the last run of every case."""
    updates = {(r["groups"], r["units"]): r for r in rows if r["kind"] == "update"}
    whole = {(r["kind"], r["parameters"]): r for r in rows if r["kind"] != "update"}
    lines = ["| groups | " + " | ".join(f"{n:,} units" for n in UNITS) + " | p |", "|---" * 5 + "|"]
    for g in GROUPS:
        row = [updates[g, n] for n in UNITS]
        cells = [f"{r['seconds']:.3g} s, {r['kept']:.3g} MB" for r in row]
        lines.append(f"| {g:,} | " + " | ".join([*cells, f"{exponent(row):.2f}"]) + " |")
    column = [f"{exponent([updates[g, n] for g in GROUPS]):.2f}" for n in UNITS]
    lines.append("| p | " + " | ".join([*column, f"{exponent([*updates.values()]):.2f} of all"]) + " |")
    models = ["| | parameters | groups | units | seconds | MB at peak | MB left |", "|---" * 7 + "|"]
    for (kind, count), r in sorted(whole.items()):
        models.append(
            f"| {kind} | {count / 1e9:.2f} B | {r['groups']} | {r['units']:,} | {r['seconds']:.1f} "
            f"| {r['peak']:,.0f} | {r['left']:,.0f} |"
        )
    return {"updates": "\n".join(lines), "models": "\n".join(models)}


def exponent(rows: Sequence[Row]) -> float:
    x, y = np.log([(r["groups"] * r["units"], r["seconds"]) for r in rows]).T
    return float(np.polyfit(x, y, 1)[0])


if __name__ == "__main__":
    sys.exit(main())
