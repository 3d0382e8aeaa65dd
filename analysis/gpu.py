"""Everything that only a GPU can say of the package, in one go: at most 20 minutes on one card, resumable.

    python -m analysis.gpu                       all sections; figures go to gpu.jsonl, one line each
    python -m analysis.gpu native --minutes 5    some of them
    python -m analysis.gpu --device cpu --quick  the same code at toy sizes: that it runs, not how fast

    native     shrunk model / model built natively at the same widths, a training step; native twice: A/A
    overhead   attached but unpruned / plain training, everything amortised
    widths     share of the FLOPs -> speed-up of a training step
    whole      whole runs in bf16, with and without torch.compile: seconds and loss beside the dense run
    budgets    latency, energy, memory asked, as the controller says it ended, and as measured after it;
               latency of a CUDA graph too (`cp.Instruments(cuda_graph=True)`), beside that of the eager net
    n_m        2:4 weights on the card's sparse kernels, a linear layer's forward
    layers     whole residual branches dropped: share of the FLOPs -> forward

Sides take turns and the clock is read when the device is done (analysis/speed.py): ratios with bootstrap
intervals. A piece that is in the file is not run again; after `--minutes` the next piece is not begun. One
that raises is a row too, with its error and traceback; the others go on, and it is run again the next time.

Whole runs count all of theirs, compilation too: each begins with nothing compiled (neither dynamo's code,
whose limit of recompilations they would share, nor inductor's caches), on a device that is awake.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import controlprune as cp
from controlprune.cost.clock import device_clock, measure_interleaved
from controlprune.cost.flops import flops
from controlprune.cost.replay import forward_on
from controlprune.structure import analyse

from .measure import Results, machine
from .nets import _GPT, WORKLOADS, Workload
from .speed import (
    amortised,
    attached_side,
    halved,
    plain_side,
    pruned_side,
    ratio,
    repeated,
    take_turns,
    typical,
)  # fmt: skip

Piece = tuple[str, Callable[[], Mapping[str, Any]]]  # its name, what it finds


SMALL = {"mlp": (64, 64), "cnn": (16, 16, 32, 32), "gpt": (2, 64) * 2}
LARGE = {"mlp": (8192, 8192), "cnn": (128, 128, 256, 256), "gpt": (16, 2048) * 12}
WIDTH, TIMES, FEW = 512, 16, 4  # of the large GPT; batches in one, where large; examples, where small


def _sized(work: Workload, *, quick: bool) -> Workload:
    """At sizes that fill a card (38 million parameters in the GPT, 2 in the CNN), or at toy ones."""
    if quick:
        return replace(work, dense=SMALL[work.name], batch=lambda: _first(work.batch(), FEW))
    build = partial(_GPT, width=WIDTH) if work.name == "gpt" else work.build
    return replace(work, dense=LARGE[work.name], build=build, batch=lambda: _tiled(work.batch(), TIMES))


def _first(batch: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    return batch[0][:count], batch[1][:count]


def _tiled(batch: tuple[Tensor, Tensor], times: int) -> tuple[Tensor, Tensor]:
    x, y = batch
    return x.repeat(times, *([1] * (x.ndim - 1))), y.repeat(times, *([1] * (y.ndim - 1)))


@dataclass(frozen=True)
class Card:
    """The device, and how much of everything."""

    device: torch.device
    quick: bool

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 40

    @property
    def chunk(self) -> int:
        return 1 if self.quick else 10

    def works(self, *names: str) -> list[Workload]:
        return [_sized(WORKLOADS[n], quick=self.quick) for n in names]

    def turns(self, sides: Mapping[str, Callable[[], object]], chunk: int | None = None) -> Any:
        chunks = {name: repeated(step, chunk or self.chunk) for name, step in sides.items()}
        clock = device_clock(self.device)
        take_turns(chunks, 1, clock)  # warm
        return take_turns(chunks, self.rounds, clock)

    def here(self) -> AbstractContextManager[Any]:
        """What is made inside is made on the device."""
        return self.device

    def forward(self, *nets: Callable[[], object]) -> list[float]:
        """Seconds of each."""
        with torch.no_grad():
            found = measure_interleaved(
                nets, clock=device_clock(self.device), seconds=0.05 if self.quick else 2
            )
        return [one.median for one in found]


# --- the clock ------------------------------------------------------------------------------------


def native(card: Card) -> Iterator[Piece]:
    for work in card.works("mlp", "cnn", "gpt"):
        for share in (0.5, 0.75):

            def find(work: Workload = work, share: float = share) -> Mapping[str, Any]:
                widths = halved(work, share)
                with card.here():
                    x, y = work.batch()
                    sides = {
                        "shrunk": pruned_side(work, widths, x, y, compact=True),
                        "native": plain_side(work, widths, x, y),
                        "again": plain_side(work, widths, x, y),
                    }
                times = card.turns(sides)
                return {k: asdict(ratio(times[k], times["native"], typical)) for k in ("shrunk", "again")}

            yield f"{work.name} {share}", find


def overhead(card: Card) -> Iterator[Piece]:
    for work in card.works("cnn", "gpt"):

        def find(work: Workload = work) -> Mapping[str, Any]:
            with card.here():
                x, y = work.batch()
                attached, controller = attached_side(work, x, y, 5000)
                plain, again = (plain_side(work, work.dense, x, y) for _ in range(2))
            before = controller.overhead_seconds
            times = card.turns({"attached": attached, "plain": plain, "again": again})
            steps = card.chunk * (card.rounds + 1)
            own = 1e3 * (controller.overhead_seconds - before) / steps
            found = {k: asdict(ratio(times[k], times["plain"], amortised)) for k in ("attached", "again")}
            return found | {"own_ms_per_step": own}

        yield work.name, find


def widths(card: Card) -> Iterator[Piece]:
    for work in card.works("mlp", "cnn", "gpt"):
        for share in (0.9, 0.75, 0.5, 0.25):

            def find(work: Workload = work, share: float = share) -> Mapping[str, Any]:
                at = halved(work, share)
                with card.here():
                    x, y = work.batch()
                    cost = flops(analyse(work.build(work.dense), (x[:2],), ignored_layers=work.ignored))
                    sides = {
                        "dense": plain_side(work, work.dense, x, y),
                        "shrunk": pruned_side(work, at, x, y, compact=True),
                        "masked": pruned_side(work, at, x, y, compact=False),
                    }
                times = card.turns(sides)
                faster = {k: asdict(ratio(times["dense"], times[k], typical)) for k in ("shrunk", "masked")}
                return {"flops": cost.value(at) / cost.value(work.dense)} | faster

            yield f"{work.name} {share}", find


# --- whole runs -----------------------------------------------------------------------------------


@dataclass
class Trained:
    """A run on labels that can be learnt: seconds of all its steps, the loss of the last tenth."""

    seconds: float
    loss: float
    controller: cp.Controller | None
    model: nn.Module
    x: Tensor


def train(
    card: Card,
    work: Workload,
    budget: cp.Budget | None,
    *,
    steps: int,
    compiled: str = "",
    instruments: cp.Instruments | None = None,
) -> Trained:
    torch.manual_seed(0)
    with card.here():
        model, (x, y) = work.build(work.dense), work.batch()
        y = x if work.name == "gpt" else x.flatten(1)[:, :10].argmax(1)  # to be copied, or to be found
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    controller = None
    if budget is not None:
        controller = cp.attach(model, optimizer, budget=budget, example_inputs=(x,), total_steps=steps,
                               instruments=instruments)  # fmt: skip
    if compiled:
        torch.compiler.reset()
    forward = torch.compile(model, backend=compiled) if compiled else model
    now, losses = device_clock(card.device), []
    began = now()
    for _ in range(steps):
        with torch.autocast(card.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(x).flatten(0, -2).float(), y.flatten())
        loss.backward()
        optimizer.step()
        if controller is not None:
            controller.step(loss)
        optimizer.zero_grad()
        losses.append(loss.detach())
    seconds = now() - began
    return Trained(seconds, float(torch.stack(losses[-max(1, steps // 10) :]).mean()), controller, model, x)


def whole(card: Card) -> Iterator[Piece]:
    steps = 60 if card.quick else 1500
    for work in card.works("cnn", "gpt"):
        for compiled in ("", "eager" if card.quick else "inductor"):

            def find(work: Workload = work, compiled: str = compiled) -> Mapping[str, Any]:
                dense = train(card, work, None, steps=steps, compiled=compiled)
                ours = train(card, work, cp.Budget(flops=0.5), steps=steps, compiled=compiled)
                assert ours.controller is not None
                ours.controller.finalize()
                return {
                    "seconds": ours.seconds, "dense_seconds": dense.seconds, "loss": ours.loss,
                    "dense_loss": dense.loss, "flops": ours.controller.cost()["flops"].fraction,
                    "shrinks": sum("shrink" in row.event for row in ours.controller.history),
                }  # fmt: skip

            yield f"{work.name} bf16 {compiled or 'plain'}", find


def budgets(card: Card) -> Iterator[Piece]:
    steps, share = 60 if card.quick else 800, 0.7
    latency, memory, energy = cp.Budget(latency=share), cp.Budget(memory=share), cp.Budget(energy=share)
    asked = {"latency": latency, "memory": memory, "energy": energy}
    for work in card.works("cnn", "gpt"):
        for name, budget in asked.items():
            yield f"{work.name} {name}", partial(_asked, card, work, name, budget, steps, cp.Instruments())
        few = replace(work, batch=lambda work=work: _first(work.batch(), FEW))  # launches are most of it
        graph = cp.Instruments(cuda_graph=True)
        yield f"{work.name} graph", partial(_asked, card, few, "latency", latency, steps, graph)


def _asked(
    card: Card, work: Workload, name: str, budget: cp.Budget, steps: int, instruments: cp.Instruments
) -> Mapping[str, Any]:
    share = budget.targets()[name].value
    try:
        run = train(card, work, budget, steps=steps, instruments=instruments)
    except (ValueError, RuntimeError) as error:  # no meter, no graphs, out of reach: that is the finding
        return {"asked": share, "refused": str(error)[:300]}
    assert run.controller is not None
    small = run.controller.finalize().eval()
    with card.here():
        torch.manual_seed(0)
        dense = work.build(work.dense).eval()
    found: dict[str, Any] = {"asked": share, "said": run.controller.cost()[name].fraction}
    for key in ("forward", "replay")[: 1 + instruments.cuda_graph]:
        forward = forward_on(card.device, cuda_graph=key == "replay")
        live, before = card.forward(*(forward(net, (run.x,)) for net in (small, dense)))
        found |= {key: live / before, f"{key}_ms": 1e3 * before}
    if card.device.type == "cuda":
        peaks = [_peak(net, run.x) for net in (small, dense)]
        found["peak"] = peaks[0] / peaks[1]
    return found


def _peak(model: nn.Module, x: Tensor) -> float:
    """Bytes of one training step with AdamW, as the allocator counts them."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 0.0)
    for _ in range(2):  # the first one makes the optimizer's state
        torch.cuda.reset_peak_memory_stats()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(torch.cuda.max_memory_allocated())


# --- what the hardware must have kernels for --------------------------------------------------------


def n_m(card: Card) -> Iterator[Piece]:
    for width in (256,) if card.quick else (2048, 4096, 8192):

        def find(width: int = width) -> Mapping[str, Any]:
            if card.device.type != "cuda":
                return {"refused": "2:4 kernels are a GPU's"}
            weight = torch.randn(width, width, device=card.device, dtype=torch.float16)
            weak = weight.abs().view(width, -1, 4).argsort(-1)[..., :2]
            weight.view(width, -1, 4).scatter_(-1, weak, 0.0)
            sparse = torch.sparse.to_sparse_semi_structured(weight)
            x = torch.randn(4096, width, device=card.device, dtype=torch.float16)
            a, b = card.forward(
                lambda: nn.functional.linear(x, weight), lambda: nn.functional.linear(x, sparse)
            )
            apart = (nn.functional.linear(x, sparse) - nn.functional.linear(x, weight)).abs().max()
            return {"speed_up": a / b, "apart": float(apart)}

        yield f"{width} fp16", find


def layers(card: Card) -> Iterator[Piece]:
    [work] = card.works("gpt")
    for share in (0.75, 0.5):

        def find(share: float = share) -> Mapping[str, Any]:
            torch.manual_seed(0)
            with card.here():
                (x, _), model, dense = work.batch(), work.build(work.dense), work.build(work.dense)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            controller = cp.attach(model, optimizer, budget=cp.Budget(flops=share), example_inputs=(x,),
                                   total_steps=10, granularity="layer")  # fmt: skip
            small = controller.finalize()
            live, before = card.forward(lambda: small(x), lambda: dense(x))
            return {"flops": controller.cost()["flops"].fraction, "forward": live / before}

        yield f"gpt {share}", find


SECTIONS: Mapping[str, Callable[[Card], Iterator[Piece]]] = {
    section.__name__: section for section in (native, overhead, widths, whole, budgets, n_m, layers)
}


def found_by(find: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What it finds, or what it raised: one piece that fails costs no other."""
    try:
        return dict(find())
    except Exception as error:
        return {
            "error": f"{type(error).__name__}: {error}"[:2000],
            "traceback": traceback.format_exc()[-4000:],
        }


def wake(card: Card) -> None:
    """Context, libraries and clocks of the device, before anything is timed."""
    layer = nn.Linear(256, 256, device=card.device)
    for _ in range(20):
        layer(torch.ones(256, 256, device=card.device)).sum().backward()
    device_clock(card.device)()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes, two rounds")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --device cpu --quick tries the code")
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # read when inductor is first imported
    card = Card(torch.device(options.device), options.quick)
    wake(card)
    name = torch.cuda.get_device_name() if card.device.type == "cuda" else options.device
    results, until = Results(options.out), time.monotonic() + 60 * options.minutes
    for section in options.sections or SECTIONS:
        for piece, find in SECTIONS[section](card):
            key = {"section": section, "piece": piece, "device": name, "quick": options.quick}
            if any("error" not in row for row in results.having(**key)):
                continue
            if time.monotonic() > until:
                print(f"{options.minutes:g} minutes are over: run it again to go on", flush=True)
                return
            began = time.monotonic()
            row = key | found_by(find) | {"took": round(time.monotonic() - began, 1)} | machine()
            results.append([row])
            print({k: v for k, v in row.items() if k not in machine()}, flush=True)


if __name__ == "__main__":
    main()
