"""A sharded run for torchrun: masks at step 4, a shrink at 7, saved every third step; goes on from the last.

torchrun elastic.py FOLDER [dies | lags | falls]     rank 1: in its first shrink, falls: after a save
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_sharded import by_layer
from test_sharded_shrink import Run, everything, load, save
from torch import Tensor

from controlprune.plant import sharded

STEPS, MASKED, SHRUNK, EVERY, FALL = 12, 4, 7, 3, 8
LAG = 1.0  # seconds, of each of three tensors


def train(run: Run, step: int) -> None:
    """One step of the plan."""
    if step == MASKED:
        run.masks(3)
    if step == SHRUNK:
        run.controller.shrink()
    run.train(1)


def die(folder: Path) -> None:
    """Once only: a restart finds that it has died."""
    (folder / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def troubled(folder: Path, trouble: str) -> None:
    """From here on the third tensor that rank 1 lays out is its last, or the first three take long."""
    relay, done = sharded.relay, []

    def slowly(kept: Any, whole: Tensor) -> None:
        done.append(kept)
        if trouble == "dies" and len(done) == 3:
            die(folder)
        if trouble == "lags" and len(done) <= 3:
            time.sleep(LAG)
        relay(kept, whole)

    sharded.relay = slowly


def main(folder: Path, trouble: str = "") -> None:
    dist.init_process_group("gloo")
    run = Run(by_layer)
    saved = sorted(folder.glob("step *"), key=lambda path: int(path.name.split()[1]))
    if saved:
        load(run, saved[-1])
    here = dist.get_rank() == 1 and not (folder / "died").exists()
    if here and trouble:
        troubled(folder, trouble)
    while run.controller.steps < STEPS:
        if here and trouble == "falls" and run.controller.steps == FALL:
            die(folder)
        train(run, run.controller.steps)
        if run.controller.steps % EVERY == 0:
            save(run, folder / "part")
            dist.barrier()
            if dist.get_rank() == 0:
                (folder / "part").rename(folder / f"step {run.controller.steps}")
            dist.barrier()
    found = everything(run)
    if dist.get_rank() == 0:
        torch.save(found, folder / "end.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
