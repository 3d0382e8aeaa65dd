"""Is the budget met? What was asked against what is realised, each resource on real runs.

    exact      flops, params, memory at 0.2 … 0.8 of dense, alone and together    (target: within 1 point)
    latency    at 25, 50, 75 % of the feasible range, measured apart afterwards   (target: -8 % … +5 %)
    totals     train_flops, train_time, train_energy of the whole run             (target: 1 %, 5 %, 5 %)

    python analysis/budgets.py exact [--nets mlp cnn gpt] [--steps 200]

Nets: those of speed.py, an MLP and a residual CNN on scikit-learn's digits, enlarged, a GPT on the text of
Python's own argparse.

- latency: the finalized model and a dense twin take turns on the same inputs, on the clock that was steered
  by (`--clock process` where other work runs beside).
- train_time: the controlled run and a dense one take turns step by step, each on its own lap clock. Told:
  the sum over dense steps as they were when the run began, which is what was asked; apart: over what the
  dense run took (a machine that slows down shows there).
- train_energy: a simulated meter whose counter is late, coarse, noisy, drifting, wraps and is sometimes
  missing; apart: the energy that was truly drawn, 40 W + 60 W × share of the FLOPs, over steps of
  0.15 + 0.85 × share seconds, with 5 % of jitter.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nets import WORKLOADS
from simulated_meter import SimulatedMeter
from torch import Tensor, nn
from torch.nn import functional as F

import controlprune as cp
from controlprune.app.tasks import load
from controlprune.cost.clock import measure_interleaved
from controlprune.cost.flops import flops
from controlprune.cost.params import parameters
from controlprune.structure import analyse

Clock = Callable[[], float]
CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "process": time.process_time}


@dataclass(frozen=True)
class Net:
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    example: Tensor

    def loss(self, model: nn.Module, step: int) -> Tensor:
        x, y = self.batch(step)
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def digits(name: str) -> Net:
    """The 8×8 images, enlarged to what the network takes."""
    work = WORKLOADS[name]
    images, labels = load("digits").train
    like = work.batch()[0]
    side = like.shape[-1] if like.ndim == 4 else round(like.shape[-1] ** 0.5)
    x = F.interpolate(images, size=(side, side), mode="bilinear")
    x = x.expand(-1, 3, -1, -1).contiguous() if like.ndim == 4 else x.flatten(1)
    count = len(like)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (count,), generator=torch.Generator().manual_seed(step))
        return x[chosen], labels[chosen]

    return Net(lambda: work.build(work.dense), batch, x[:count])


def text() -> Net:
    """Next character; 65 that occur most, all others as one of them."""
    source = inspect.getsource(argparse)
    common = sorted(set(source), key=source.count, reverse=True)[:65]
    codes = {c: k for k, c in enumerate(common)}
    data = torch.tensor([codes.get(c, 0) for c in source])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - 65, (8,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([data[s : s + 65] for s in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    gpt = WORKLOADS["gpt"]
    return Net(lambda: gpt.build(gpt.dense), batch, batch(0)[0])


NETS: Mapping[str, Callable[[], Net]] = {
    "mlp": lambda: digits("mlp"),
    "cnn": lambda: digits("cnn"),
    "gpt": text,
}


@dataclass
class Run:
    """One net in training under a controller, or plainly."""

    net: Net
    model: nn.Module
    optimizer: torch.optim.Optimizer
    controller: cp.Controller | None = None
    steps: int = 0

    def step(self) -> None:
        self.steps += 1
        loss = self.net.loss(self.model, self.steps)
        loss.backward()
        self.optimizer.step()
        if self.controller is not None:
            self.controller.step(loss)
        self.optimizer.zero_grad()


def start(
    net: Net, budget: cp.Budget | None, steps: int, instruments: cp.Instruments | None = None, seed: int = 0
) -> Run:
    torch.manual_seed(seed)
    model = net.build()
    run = Run(net, model, torch.optim.Adam(model.parameters(), 1e-3))
    if budget is not None:
        run.controller = cp.attach(
            model,
            run.optimizer,
            budget=budget,
            example_inputs=(net.example,),
            total_steps=steps,
            seed=seed,
            instruments=instruments,
        )
    return run


# --- counted ---------------------------------------------------------------------------------------


def exact(options: argparse.Namespace) -> None:
    print(f"{'net':5s} {'asked':38s} {'realised of dense':38s} {'counted apart':24s} worst gap, points")
    for name in options.nets:
        net = NETS[name]()
        alone = [{k: r} for k in ("flops", "params", "memory") for r in np.arange(0.2, 0.85, 0.1).round(2)]
        for asked in [*alone, {"flops": 0.5, "params": 0.6}, {"flops": 0.5, "params": 0.5, "memory": 0.6}]:
            _exact(name, net, {k: float(r) for k, r in asked.items()}, options.steps)


def _exact(name: str, net: Net, asked: dict[str, Any], steps: int) -> None:
    try:
        run = start(net, cp.Budget(**asked), steps)
    except cp.InfeasibleBudget as error:
        print(f"{name:5s} {_shown(asked):38s} infeasible: {str(error)[:90]}", flush=True)
        return
    assert run.controller is not None
    structure = analyse(net.build(), (net.example,))
    for _ in range(steps):
        run.step()
    run.controller.finalize()
    realised = {k: run.controller.history[-1].realised[k] for k in asked}
    small = analyse(run.model, (net.example,))
    apart = {
        "flops": flops(small).value(small.sizes) / flops(structure).value(structure.sizes),
        "params": parameters(small).value(small.sizes) / parameters(structure).value(structure.sizes),
    }
    gap = min(asked[k] - realised[k] for k in asked)  # of the binding one; negative: above its limit
    counted = {k: v for k, v in apart.items() if k in asked}
    print(
        f"{name:5s} {_shown(asked):38s} {_shown(realised):38s} {_shown(counted):24s} {100 * gap:.2f}",
        flush=True,
    )


def _shown(values: Mapping[str, float]) -> str:
    return " ".join(f"{k} {v:.4g}" for k, v in values.items())


# --- measured --------------------------------------------------------------------------------------


def latency(options: argparse.Namespace) -> None:
    clock = CLOCKS[options.clock]
    print(f"clock: {options.clock}; measured apart: median over interleaved forwards, live / dense twin")
    print(f"{'net':5s} {'dense ms':>8s} {'feasible':>14s} {'asked':>6s} {'apart':>6s} {'off':>7s}  told")
    for name in options.nets:
        net = NETS[name]()
        least = _least(net, clock)
        for share in (0.25, 0.5, 0.75):
            asked = least + share * (1.0 - least)
            run = start(net, cp.Budget(latency=asked), options.steps, cp.Instruments(clock=clock))
            assert run.controller is not None
            dense = copy.deepcopy(run.model)
            for _ in range(options.steps):
                run.step()
            run.controller.finalize()
            found, whole = _apart(run.model, dense, net.example, clock)
            told = run.controller.history[-1].realised["latency"]
            off = found / asked - 1.0
            print(
                f"{name:5s} {1e3 * whole:8.2f} {least:6.3f} … 1.00 {asked:6.3f} {found:6.3f} {off:+7.1%}"
                f"  {told:.3f}",
                flush=True,
            )


def _least(net: Net, clock: Clock) -> float:
    """The measured fraction of dense at the smallest widths that can be reached."""
    run = start(net, cp.Budget(flops=1.0), 10)
    assert run.controller is not None
    dense = copy.deepcopy(run.model)
    steps = run.controller._run.problem.floors
    masks = {
        g.name: torch.arange(g.size) < floor for g, floor in zip(run.controller.groups, steps, strict=True)
    }
    run.controller.set_masks(masks)
    run.controller.shrink()
    return _apart(run.model, dense, net.example, clock)[0]


def _apart(small: nn.Module, dense: nn.Module, x: Tensor, clock: Clock) -> tuple[float, float]:
    """The ratio of medians, and seconds of the dense one."""
    small.eval()
    dense.eval()
    with torch.no_grad():
        forwards = [lambda: small(x), lambda: dense(x)]
        times = measure_interleaved(forwards, clock=clock, seconds=4.0)
    small.train()
    return times[0].median / times[1].median, times[1].median


# --- of the whole run ------------------------------------------------------------------------------


class Lap:
    """A clock that runs only between `go` and `rest`."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.sum, self.began = clock, 0.0, 0.0
        self.running = False

    def __call__(self) -> float:
        return self.sum + (self.clock() - self.began if self.running else 0.0)

    def go(self) -> None:
        self.began, self.running = self.clock(), True

    def rest(self) -> None:
        self.sum, self.running = self(), False


def totals(options: argparse.Namespace) -> None:
    print(f"{'net':5s} {'asked':20s} {'told':>8s} {'off':>7s} {'apart':>8s} {'off':>7s}")
    for name in options.nets:
        net = NETS[name]()
        for asked in (0.4, 0.6, 0.8):
            for resource in options.resources:
                try:
                    found = TOTALS[resource](net, asked, options)
                except cp.InfeasibleBudget as error:
                    print(f"{name:5s} {resource} {asked:<7g} infeasible: {str(error)[:90]}", flush=True)
                    continue
                told, apart = found
                offs = f"{told:8.4f} {told / asked - 1.0:+7.2%} {apart:8.4f} {apart / asked - 1.0:+7.2%}"
                print(f"{name:5s} {resource + f' {asked:g}':20s} {offs}", flush=True)


def _flops(net: Net, asked: float, options: argparse.Namespace) -> tuple[float, float]:
    run = start(net, cp.Budget(train_flops=asked), options.steps)
    assert run.controller is not None
    for _ in range(options.steps):
        run.step()
    counted = run.controller.cost()["train_flops"].fraction
    return counted, counted


def _time(net: Net, asked: float, options: argparse.Namespace) -> tuple[float, float]:
    lap, other = Lap(CLOCKS[options.clock]), Lap(CLOCKS[options.clock])
    run = start(net, cp.Budget(train_time=asked), options.steps, cp.Instruments(clock=lap))
    dense = start(net, None, options.steps)
    for _ in range(options.steps):
        for side, watch in ((run, lap), (dense, other)):
            watch.go()
            side.step()
            watch.rest()
    assert run.controller is not None
    return run.controller.cost()["train_time"].fraction, lap() / other()


def _energy(net: Net, asked: float, options: argparse.Namespace) -> tuple[float, float]:
    now, share = [0.0], [1.0]
    noise = np.random.default_rng(0)
    meter = SimulatedMeter(
        lambda: 40.0 + 60.0 * share[0],
        lambda: now[0],
        period=0.1,
        delay=0.2,
        drift=1e-4,
        noise=0.5,
        wraps_at=5000.0,
        missing=0.02,
    )
    run = start(
        net, cp.Budget(train_energy=asked), options.steps, cp.Instruments(lambda: now[0], energy=meter)
    )
    assert run.controller is not None
    began = meter.true
    for _ in range(options.steps):
        now[0] += (0.15 + 0.85 * share[0]) * (1.0 + 0.05 * noise.standard_normal())
        _ = meter.true  # drawn at the power of this layout
        run.step()
        share[0] = run.controller._run.metering.use
    told = run.controller.cost()["train_energy"].fraction
    return told, (meter.true - began) / (100.0 * options.steps)


TOTALS: Mapping[str, Callable[[Net, float, argparse.Namespace], tuple[float, float]]] = {
    "train_flops": _flops,
    "train_time": _time,
    "train_energy": _energy,
}
STUDIES: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "exact": exact,
    "latency": latency,
    "totals": totals,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS))
    parser.add_argument("--resources", nargs="*", choices=TOTALS, default=list(TOTALS), help="of totals")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(1)
    STUDIES[options.study](options)


if __name__ == "__main__":
    main()
