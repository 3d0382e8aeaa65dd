"""What deciding costs for large models: time of an update and its growth, and of a trace on the meta device.

    python -m analysis.decision updates            G groups of N units: seconds of an update that cuts
    python -m analysis.decision traces 7 70 400    Llamas of so many billion parameters, without their memory

Process CPU seconds on one thread; the exponent is that of the least squares line through (log units, log
seconds). An update is `decide` of the default policy in the middle of its cut, from made-up gradients.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

import controlprune as cp
from controlprune.cost.problem import pose
from controlprune.cost.survey import exact_costs
from controlprune.policies.base import Observation

LLAMA = {  # hidden, layers, heads, key/value heads, feed-forward
    7: (4096, 32, 32, 32, 11008),
    70: (8192, 80, 64, 8, 28672),
    400: (16384, 126, 128, 8, 53248),
}
SIZES = [(50, 1000), (200, 1000), (1000, 1000), (200, 2500), (200, 10_000)]
HORIZON = 6000


def layers(groups: int, units: int) -> nn.Module:
    """A chain of linear layers on the meta device."""
    found: list[nn.Module] = [nn.Linear(8, units)]
    for _ in range(groups - 1):
        found += [nn.ReLU(), nn.Linear(units, units)]
    return nn.Sequential(*found, nn.ReLU(), nn.Linear(units, 8))


def update(groups: int, units: int) -> tuple[float, float]:
    """Seconds of one that cuts, MB that the policy keeps."""
    with torch.device("meta"):
        traced = cp.trace(layers(groups, units), (torch.zeros(1, 8, device="meta"),))
    structure = traced.structure
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
    kept = sum(
        x.numel() * x.element_size() for x in (*vars(policy.units.moments).values(), policy.units.window)
    )
    return float(np.median(found)), kept / 1e6


def traced(billions: int) -> tuple[float, float, int]:
    """Seconds of a trace, MB of resident memory that it added at its peak, units."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, count, heads, shared, inner = LLAMA[billions]
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=count, num_attention_heads=heads,
                         num_key_value_heads=shared, intermediate_size=inner, use_cache=False)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with torch.device("meta"):
        tokens, mask = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 1, 16, 16)
    structure = cp.trace(model, {"input_ids": tokens, "attention_mask": mask}).structure
    spent = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  {parameters / 1e9:.1f} billion parameters, {len(structure.groups)} groups")
    return spent, (peak - before) / 1024, sum(structure.sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["updates", "traces"])
    parser.add_argument("billions", nargs="*", type=int, default=[7, 70, 400])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.what == "traces":
        for billions in args.billions:
            spent, peak, units = traced(billions)
            print(f"{billions} B: {spent:.1f} s, {peak:.0f} MB, {units} units", flush=True)
        return
    rows = []
    for groups, units in SIZES:
        seconds, kept = update(groups, units)
        rows.append((groups * units, seconds))
        print(f"{groups} groups x {units} units: {seconds:.2f} s per update, {kept:.0f} MB kept", flush=True)
    x, y = np.log(np.array(rows)).T
    print(f"exponent over all: {np.polyfit(x, y, 1)[0]:.2f}")


if __name__ == "__main__":
    main()
