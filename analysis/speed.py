"""Savings on the clock, as ratios of CPU time between sides that take turns.

    native    shrunk model / model built natively at the same widths, one training step   (target <= 1.03)
    overhead  attached but unpruned / plain training, everything amortised                (target <= 1.02)
    shrink    one shrink of a ResNet-50-sized model with its Adam state                   (target <  1 s)
    widths    speed-up of the shrunk model against its share of the FLOPs, masks-only beside it

    python -m analysis.speed native --threads 1 --pairs 100

On a shared machine a clock says little, so sides A and B run a chunk of steps each in turn, in alternating
order, and process CPU time is taken. With t_A(i), t_B(i) of round i and a bootstrap over rounds,

    typical   median_i t_A(i) / median_i t_B(i)        for steps that are all alike
    amortised Σ_i t_A(i) / Σ_i t_B(i)                  where work comes at some steps only (updates)

A second plain side gives A/A, the resolution of the measurement: a ratio inside it says nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

import controlprune as cp
from controlprune.cost.clock import Clock
from controlprune.cost.flops import flops
from controlprune.plant.plant import Plant
from controlprune.structure import analyse
from controlprune.structure.groups import Structure

from .nets import WORKLOADS, Workload, resnet50

Times = NDArray[np.float64]
Chunk = Callable[[], None]


@dataclass(frozen=True)
class Ratio:
    """t_A / t_B with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def typical(times: Times) -> Times:
    return np.median(times, axis=-1)


def amortised(times: Times) -> Times:
    return np.sum(times, axis=-1)


def take_turns(sides: Mapping[str, Chunk], rounds: int, clock: Clock = time.process_time) -> dict[str, Times]:
    """Seconds of every side in every round; the order is reversed every other round."""
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            began = clock()
            sides[name]()
            found[name].append(clock() - began)
    return {name: np.array(seconds) for name, seconds in found.items()}


def ratio(a: Times, b: Times, summary: Callable[[Times], Times], draws: int = 4000) -> Ratio:
    """summary(a) / summary(b), rounds drawn together for both."""
    chosen = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
    low, high = np.quantile(summary(a[chosen]) / summary(b[chosen]), [0.025, 0.975])
    return Ratio(float(summary(a) / summary(b)), float(low), float(high))


def size_in_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(
        t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in tensors}.values()
    )


def extra_bytes(controller: cp.Controller) -> int:
    """All tensors that can be reached from the controller and are not the user's."""
    model, optimizer = controller.plant.model, controller.plant.optimizer
    seen: set[int] = {id(model), id(optimizer)}
    found: list[Tensor] = []
    waiting: list[object] = [controller]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        else:
            waiting += gc.get_referents(thing)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    return size_in_bytes([t for t in found if t.untyped_storage().data_ptr() not in own])


def trainer(
    work: Workload, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    """One training step of the user's, and its loss."""

    def step() -> Tensor:
        loss = work.loss(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def repeated(step: Callable[[], object], count: int) -> Chunk:
    def chunk() -> None:
        for _ in range(count):
            step()

    return chunk


def plain_side(work: Workload, widths: tuple[int, ...], x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = work.build(widths)
    return trainer(work, model, torch.optim.Adam(model.parameters(), 1e-4), x, y)


def random_masks(structure: Structure, widths: tuple[int, ...]) -> list[Tensor]:
    masks = []
    for size, width in zip(structure.sizes, widths, strict=True):
        mask = torch.zeros(size, dtype=torch.bool, device="cpu")
        mask[torch.randperm(size, device="cpu")[:width]] = True
        masks.append(mask)
    return masks


def pruned_side(
    work: Workload, widths: tuple[int, ...], x: Tensor, y: Tensor, *, compact: bool
) -> Callable[[], Tensor]:
    """The dense model, trained two steps, then cut to `widths` by random masks."""
    torch.manual_seed(0)
    model = work.build(work.dense)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    step = trainer(work, model, optimizer, x, y)
    structure = analyse(model, (x,), ignored_layers=work.ignored)
    plant = Plant(model, optimizer, structure)
    step()
    step()
    plant.apply(random_masks(structure, widths), compact=compact)
    return step


def halved(work: Workload, share: float) -> tuple[int, ...]:
    """`share` of every width, in multiples of 8 where there are that many."""
    step = [8 if n >= 16 else 1 for n in work.dense]
    return tuple(max(s, round(n * share / s) * s) for n, s in zip(work.dense, step, strict=True))


def native(arguments: argparse.Namespace) -> None:
    print("shrunk over native at the same widths, one training step with Adam")
    print(f"{'net':6s} {'widths':28s} {'shrunk/native':24s} {'native/native (A/A)':24s}")
    for work in chosen(arguments):
        x, y = work.batch()
        for share in (0.5, 0.75):
            widths = halved(work, share)
            steps = {
                "shrunk": pruned_side(work, widths, x, y, compact=True),
                "native": plain_side(work, widths, x, y),
                "again": plain_side(work, widths, x, y),
            }
            times = take_turns({k: repeated(s, arguments.chunk) for k, s in steps.items()}, arguments.pairs)
            found = [ratio(times[k], times["native"], typical) for k in ("shrunk", "again")]
            print(f"{work.name:6s} {shown(widths):28s} {found[0]!s:24s} {found[1]!s:24s}", flush=True)


def attached_side(
    work: Workload, x: Tensor, y: Tensor, horizon: int
) -> tuple[Callable[[], Tensor], cp.Controller]:
    """The same training under a controller that has nothing to cut: budget 1, everything else at work."""
    torch.manual_seed(0)
    model = work.build(work.dense)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=1.0), example_inputs=(x,), total_steps=horizon
    )

    def step() -> Tensor:
        loss = work.loss(model, x, y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
        return loss

    return step, controller


def overhead(arguments: argparse.Namespace) -> None:
    print(f"attached but unpruned over plain training; total_steps {arguments.horizon}, before masks freeze")
    print("counted: CPU time inside the controller's own calls; memory: tensors it holds / parameters")
    print(
        f"{'net':6s} {'attached/plain':22s} {'plain/plain (A/A)':22s} {'counted':>8s} {'memory':>8s}  steps"
    )
    for work in chosen(arguments, "cnn", "gpt"):
        x, y = work.batch()
        attached, controller = attached_side(work, x, y, arguments.horizon)
        sides = {
            "attached": repeated(attached, arguments.chunk),
            "plain": repeated(plain_side(work, work.dense, x, y), arguments.chunk),
            "again": repeated(plain_side(work, work.dense, x, y), arguments.chunk),
        }
        take_turns(sides, 1)
        before = controller.overhead_seconds
        times = take_turns(sides, arguments.pairs)
        spent = controller.overhead_seconds - before
        counted = spent / (times["attached"].sum() - spent)
        found = [ratio(times[k], times["plain"], amortised) for k in ("attached", "again")]
        memory = extra_bytes(controller) / size_in_bytes(list(controller.model.parameters()))
        print(
            f"{work.name:6s} {found[0]!s:22s} {found[1]!s:22s} {counted:8.2%} {memory:8.2%}"
            f"  {arguments.pairs} x {arguments.chunk}",
            flush=True,
        )


def shrink(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = resnet50()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    structure = analyse(model, (torch.randn(1, 3, 64, 64),), check=False)
    plant = Plant(model, optimizer, structure)
    everything = [torch.ones(n, dtype=torch.bool) for n in structure.sizes]
    found: dict[str, list[tuple[float, float]]] = {"shrink": [], "expand": []}
    for _ in range(arguments.pairs):
        half = random_masks(structure, tuple(max(1, n // 2) for n in structure.sizes))
        for name, masks in (("shrink", half), ("expand", everything)):
            began, clock = time.process_time(), time.perf_counter()
            plant.apply(masks, compact=True)
            found[name].append((time.process_time() - began, time.perf_counter() - clock))
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f} million parameters, {len(structure.groups)} groups, Adam: half of the units")
    for name, seconds in found.items():
        cpu, wall = np.median(np.array(seconds), axis=0)
        print(f"  {name}: {cpu:.3f} s CPU, {wall:.3f} s by the clock (median of {arguments.pairs})")


def widths(arguments: argparse.Namespace) -> None:
    print("realised speed-up of a training step over the FLOP ratio; efficiency = speed-up x share of FLOPs")
    print(f"{'net':6s} {'widths':28s} {'FLOPs':>6s} {'speed-up':24s} {'efficiency':>10s} {'masks only':>10s}")
    for work in chosen(arguments):
        x, y = work.batch()
        model = work.build(work.dense)
        cost = flops(analyse(model, (x,), ignored_layers=work.ignored))
        dense = plain_side(work, work.dense, x, y)
        for share in (0.9, 0.75, 0.6, 0.45, 0.25):
            at = tuple(max(1, round(n * share)) for n in work.dense)
            if arguments.rounded:
                at = halved(work, share)
            sides = {
                "dense": repeated(dense, arguments.chunk),
                "shrunk": repeated(pruned_side(work, at, x, y, compact=True), arguments.chunk),
                "masked": repeated(pruned_side(work, at, x, y, compact=False), arguments.chunk),
            }
            times = take_turns(sides, arguments.pairs)
            faster = ratio(times["dense"], times["shrunk"], typical)
            masked = ratio(times["dense"], times["masked"], typical)
            fraction = cost.value(at) / cost.value(work.dense)
            print(
                f"{work.name:6s} {shown(at):28s} {fraction:6.3f} {faster!s:24s} "
                f"{faster.value * fraction:10.2f} {masked.value:10.2f}",
                flush=True,
            )


def chosen(arguments: argparse.Namespace, *names: str) -> list[Workload]:
    return [WORKLOADS[name] for name in (arguments.nets or names or WORKLOADS)]


def shown(widths: tuple[int, ...]) -> str:
    return "-".join(map(str, widths[:4])) + ("-…" if len(widths) > 4 else "")


STUDIES: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "native": native,
    "overhead": overhead,
    "shrink": shrink,
    "widths": widths,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=100, help="rounds in which every side takes its turn")
    parser.add_argument("--chunk", type=int, default=1, help="training steps of one turn")
    parser.add_argument("--horizon", type=int, default=5000, help="overhead: total_steps of the run")
    parser.add_argument("--nets", nargs="*", choices=WORKLOADS, help="default: all that the study is about")
    parser.add_argument("--rounded", action="store_true", help="widths: in multiples of 8")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {arguments.threads} threads, process CPU time")
    STUDIES[arguments.study](arguments)


if __name__ == "__main__":
    main()
