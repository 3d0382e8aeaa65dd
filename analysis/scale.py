"""On paper: a controlled run of a hundred billion parameters on a thousand ranks: its cost, when it pays.

    python -m analysis.scale

Nothing here is measured but the two figures named so. With P parameters, U units, R ranks, n steps per
update, b tokens a step, bandwidth β (bytes/s per rank), latency per hop α:

    step       6 P b / (R · FLOP/s)                           dense, FSDP2's own traffic hidden behind it
    update     all-reduce of 8 (9 + 2 n) + 4 U k bytes        k observations of U float32 sums over ranks
               + decision                                     c U log₂ U, c as measured (analysis/decision.py)
    shrink     (1 + s + 1) P gathered once, at w bytes each   weights, s states, gradient: one tensor after
               + the same of what is cut, + P                 the other, so a whole one is held, no more; from
                                                              a cut layout, made dense first (counted on a
                                                              pretended rank: analysis/many_ranks.py)
    checkpoint (1 + s) P w / R written per rank at δ bytes/s  and what is parked, gathered to the host
    pays       after  shrink / (1 − C) / step  steps          if a step at a fraction C takes C of the time

    all-reduce T(B) = 2 α log₂ R + 2 (R − 1)/R · B/β          all-gather T(B) = α log₂ R + (R − 1)/R · B/β
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Cluster", "Model", "Plan", "Shrink", "plan", "schedule"]

DECIDED = 0.158 / (200_000 * math.log2(200_000))  # s per U log₂ U: 200 groups of 1,000 units, one CPU thread


@dataclass(frozen=True)
class Cluster:
    """Assumed, not measured: H100s at their usual efficiency."""

    ranks: int = 1024
    hop: float = 10e-6  # α, s
    bandwidth: float = 25e9  # β, bytes/s per rank
    flops: float = 400e12  # achieved per rank
    disk: float = 1e9  # δ, bytes/s per rank

    def all_reduce(self, size: float) -> float:
        spread = (self.ranks - 1) / self.ranks * size / self.bandwidth
        return 2 * (math.log2(max(2, self.ranks)) * self.hop + spread)

    def all_gather(self, size: float) -> float:
        return self.all_reduce(size) / 2


@dataclass(frozen=True)
class Model:
    """A transformer under AdamW: `states` beside each weight, `bytes` a number."""

    parameters: float = 100e9
    units: float = 96 * (4 * 12288 + 96)
    tensors: int = 96 * 12
    largest: float = 4 * 12288**2  # elements of one tensor
    tokens: float = 4e6  # a step
    states: int = 2
    bytes: int = 4


@dataclass(frozen=True)
class Plan:
    """Seconds and bytes."""

    step: float
    update: float
    update_bytes: float
    shrink: float
    shrink_bytes: float  # received per rank
    extra_bytes: float  # more than a rank holds, at the worst
    checkpoint: float
    pays_after: float  # steps
    share: float  # of the run's time, that the controller takes
    saved: float  # of the run's time


def _step(cluster: Cluster, model: Model) -> float:
    """Seconds of a dense one."""
    return 6 * model.parameters * model.tokens / cluster.ranks / cluster.flops


def plan(
    cluster: Cluster,
    model: Model,
    fraction: float = 0.5,
    steps: int = 100_000,
    every: int = 200,
    observed: int = 4,
    shrinks: int = 4,
    at: float = 0.15,
) -> Plan:
    """A run of `steps` that shrinks `shrinks` times and is at `fraction` from `at` of the run on."""
    step = _step(cluster, model)
    size = 8 * (9 + 2 * every) + 4 * model.units * observed
    decision = DECIDED * model.units * math.log2(model.units)
    update = cluster.all_reduce(size) + decision
    moved = ((2 + model.states) * (1 + fraction) + 1) * model.parameters * model.bytes
    shrink = (
        cluster.all_gather(moved)
        + (2 + model.states) * model.tensors * math.log2(cluster.ranks) * cluster.hop
    )
    saved = (1 - fraction) * step
    spent = update * steps / every + shrink * shrinks
    whole = steps * step
    return Plan(
        step, update, size, shrink, moved, 2 * model.largest * model.bytes,
        (1 + model.states) * model.parameters * model.bytes / cluster.ranks / cluster.disk,
        shrink / saved, spent / whole, ((1 - at) * steps * saved - spent) / whole,
    )  # fmt: skip


@dataclass(frozen=True)
class Shrink:
    """One of the few of a run: to which fraction of the work, what it takes, what is saved from it on."""

    at: int  # step
    fraction: float
    received: float  # bytes per rank
    seconds: float
    saved: float  # seconds, of all steps that come


def schedule(
    cluster: Cluster,
    model: Model,
    fraction: float = 0.5,
    steps: int = 100_000,
    shrinks: int = 4,
    over: float = 0.3,
) -> list[Shrink]:
    """Even cuts of the work to `fraction`, the last one at `over` of the run."""
    step = _step(cluster, model)
    whole, before, found = (2 + model.states) * model.parameters * model.bytes, 1.0, list[Shrink]()
    for k in range(1, shrinks + 1):
        then, at = 1.0 - (1.0 - fraction) * k / shrinks, round(over * steps * k / shrinks)
        again = 0.0 if k == 1 else whole * before + model.parameters * model.bytes
        seconds = cluster.all_gather(whole + again)
        found.append(Shrink(at, then, whole + again, seconds, (before - then) * step * (steps - at)))
        before = then
    return found


def main() -> None:
    print("| parameters | ranks | step s | update s | shrink s | GB received | GB extra | checkpoint s | "
          "pays after steps | controller | saved |")  # fmt: skip
    print("|" + "---|" * 11)
    for billions, ranks in ((7, 8), (7, 64), (70, 256), (100, 1024)):
        scale = billions / 100
        model = Model(parameters=billions * 1e9, units=Model.units * scale**0.5,
                      largest=Model.largest * scale ** (2 / 3))  # fmt: skip
        p = plan(Cluster(ranks=ranks), model)
        print(
            f"| {billions} B | {ranks} | {p.step:.1f} | {p.update:.2f} | {p.shrink:.0f} | "
            f"{p.shrink_bytes / 1e9:.0f} | {p.extra_bytes / 1e9:.1f} | {p.checkpoint:.1f} | "
            f"{p.pays_after:.0f} | {p.share:.3%} | {p.saved:.1%} |"
        )
    print("\n| step | to a fraction of | GB received | takes s | saves h |\n" + "|---" * 5 + "|")
    for one in schedule(Cluster(), Model()):
        print(
            f"| {one.at:,} | {one.fraction:.3f} | {one.received / 1e9:,.0f} | {one.seconds:.0f} | "
            f"{one.saved / 3600:.1f} |"
        )


if __name__ == "__main__":
    main()
