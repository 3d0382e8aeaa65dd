"""What replicas cost each other beyond DDP: bytes per update and share of the step, against world size.

    python analysis/sync.py --ranks 1 2 4 --layers 12 --width 768

Gloo processes on this machine train the same transformer by SGD on made-up text, each on its own sequences.
Printed per world size: collectives of the controller and their bytes per update (as counted where they are
made), their wall-clock share of the run (waiting for slower ranks included, so on few cores an upper bound),
the controller's share of CPU time, beside the bytes that DDP itself reduces.

On paper, with U units, P parameters, n steps per update, world size N (bytes, seconds):

    update       8 (11 + 2 n)                     losses, verdicts, four words of digest and their squares
    DDP          4 P n                            gradients in float32, for comparison
    all-reduce   T(B) = 2 log2(N) α + 2 (N − 1)/N · B / β        latency α per hop, bandwidth β per rank
    digest       h U / η                          h ≈ 24 bytes of state per unit, hashed at η

`extrapolated` puts numbers in: 1,024 ranks, 100 billion parameters.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from nets import _GPT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import controlprune as cp

UPDATE_EVERY = 4


@dataclass(frozen=True)
class Cluster:
    """A machine on paper. Figures assumed, not measured: an H100 cluster at its usual efficiency."""

    ranks: int = 1024
    hop: float = 10e-6  # α, s
    bandwidth: float = 25e9  # β, bytes/s per rank
    flops: float = 400e12  # achieved, per rank
    hashing: float = 1e9  # η, bytes/s

    def all_reduce(self, size: float) -> float:
        """Seconds."""
        spread = 2 * (self.ranks - 1) / self.ranks * size / self.bandwidth
        return 2 * math.log2(self.ranks) * self.hop + spread


def extrapolated(
    cluster: Cluster,
    parameters: float = 100e9,
    units: float = 96 * (4 * 12288 + 96),
    tokens: float = 4e6,
    n: int = 200,
) -> dict[str, float]:
    """Of an update of n steps, each of `tokens` tokens (6 FLOPs per parameter and token)."""
    step = 6 * parameters * tokens / cluster.ranks / cluster.flops
    exchange = cluster.all_reduce(8 * (11 + 2 * n))
    digest = 24 * units / cluster.hashing
    return {
        "seconds per step": step,
        "bytes per update": 8 * (11 + 2 * n),
        "seconds of exchange per update": exchange,
        "share of the steps": exchange / (n * step),
        "share with the digest": (exchange + digest) / (n * step),
        "DDP bytes per update": 4 * parameters * n,
    }


def worker(rank: int, world: int, folder: str, args: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = _GPT((args.width // 32, 4 * args.width) * args.layers, args.width, args.vocabulary)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ddp = DistributedDataParallel(model)
    x = torch.randint(0, args.vocabulary, (args.batch, args.length))
    policy = cp.Control(observe_every=1, update_every=UPDATE_EVERY, shrink=False)
    controller = cp.attach(
        ddp, optimizer, budget=cp.Budget(flops=0.7), example_inputs=(x,), total_steps=10 * args.steps,
        policy=policy, round_to=8,
    )  # fmt: skip
    replicas = controller._run.replicas
    before, wall, cpu = (0, 0, 0.0, 0.0), 0.0, 0.0
    for step in range(args.steps + 1):
        if step == 1:  # the first warms up
            before = (replicas.exchanges, replicas.bytes, replicas.seconds, controller.overhead_seconds)
            wall, cpu = time.perf_counter(), time.process_time()
        torch.manual_seed(1000 * step + rank)
        x = torch.randint(0, args.vocabulary, (args.batch, args.length))
        loss = nn.functional.cross_entropy(ddp(x).flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    exchanges, size, seconds, overhead = (
        now - then
        for now, then in zip(
            (replicas.exchanges, replicas.bytes, replicas.seconds, controller.overhead_seconds),
            before,
            strict=True,
        )
    )
    updates = args.steps / UPDATE_EVERY
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        units = sum(group.size for group in controller.groups)
        results.put(
            f"{world} ranks, {parameters / 1e6:.1f} M parameters, {units} units: {exchanges / updates:.1f} "
            f"exchanges, {size / updates:.0f} bytes per update (DDP: {4 * parameters * UPDATE_EVERY:.3g}), "
            f"{seconds / wall:.3%} of the wall clock, controller {overhead / cpu:.2%} of the CPU time, "
            f"{wall / args.steps:.2f} s per step; {replicas.repairs} repairs"
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            results = context.SimpleQueue()
            processes = [
                context.Process(target=worker, args=(rank, world, folder, args, results))
                for rank in range(world)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            if any(process.exitcode for process in processes):
                raise SystemExit(f"a rank failed: {[process.exitcode for process in processes]}")
            print(results.get(), flush=True)
    for name, value in extrapolated(Cluster()).items():
        print(f"  on paper, 1,024 ranks, 100 billion parameters: {name} {value:.3g}")


if __name__ == "__main__":
    main()
