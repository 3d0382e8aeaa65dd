"""A run of FSDP2 on hundreds of ranks, simulated: what one of them sends for, and its own time.

    python -m analysis.many_ranks 8 64 1024

The last rank of a pretend process group (torch's own "fake" backend: every collective returns at once, with
nothing in it) goes through what a run does: an update, a shrink from dense, another from there. Bytes are
those that its collectives bring, counted where they are called; beside them what the plan on paper says
(analysis/scale.py). Seconds are process CPU time of that rank on one thread, waiting excepted: what grows
with the number of ranks is ours, or torch's own way of laying out a shard.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import controlprune as cp

__all__ = ["Found", "main", "simulated"]

EVERY, OBSERVE = 40, 10  # steps from update to update, and from observation to observation
COLLECTIVES = ("all_gather_into_tensor", "allgather_", "allreduce_")


@dataclass(frozen=True)
class Found:
    """Bytes that the rank received, on paper and as counted, and its CPU seconds."""

    what: str
    expected: int
    received: int
    seconds: float


class Received(TorchDispatchMode):
    """Bytes that collectives bring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.rpartition("::")[2] in COLLECTIVES:
            tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Inside, this process is the last of so many."""
    dist.init_process_group("fake", rank=ranks - 1, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulated(ranks: int, width: int, layers: int = 2) -> list[Found]:
    """Of blocks of `width` and four times that, under AdamW; half of all units off, then other two thirds."""
    with pretended(ranks):
        model = nn.Sequential(*(_block(width) for _ in range(layers)))
        traced = cp.trace(model, (torch.zeros(1, width),))
        mesh = init_device_mesh("cpu", (ranks,))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        policy = cp.Control(observe_every=OBSERVE, update_every=EVERY)
        controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=traced,
                               total_steps=100 * EVERY, policy=policy)  # fmt: skip

        def until_an_update() -> None:
            for _ in range(EVERY):
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                controller.step(0.0)

        def shrunk(divisor: int) -> None:
            controller.set_masks({g.name: torch.arange(g.size) % divisor > 0 for g in controller.groups})
            controller.shrink()

        def here() -> int:
            """Bytes of the model, its gradients and states, as it is laid out now."""
            return 4 * 4 * sum(p.numel() for p in model.parameters())

        whole, units = here(), sum(g.size for g in controller.groups)
        found = [_counted("an update", _update(units), until_an_update)]
        found += [_counted("a shrink", whole, lambda: shrunk(2))]
        found += [_counted("another", whole + here() + whole // 4, lambda: shrunk(3))]
        controller.detach()
        return found


def _update(units: int) -> int:
    return 8 * (9 + 2 * EVERY) + 4 * units * EVERY // OBSERVE


def _block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))


def _counted(what: str, expected: int, call: Callable[[], None]) -> Found:
    with Received() as received:
        began = time.process_time()
        call()
        seconds = time.process_time() - began
    return Found(what, expected, received.bytes, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("ranks", nargs="+", type=int)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| ranks | | MB on paper | MB received | s of the rank |")
    print("|" + "---|" * 5)
    for ranks in options.ranks:
        for found in simulated(ranks, options.width):
            cells = [found.what, *(f"{n / 1e6:.3f}" for n in (found.expected, found.received))]
            print(f"| {ranks:,} | {' | '.join(cells)} | {found.seconds:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
