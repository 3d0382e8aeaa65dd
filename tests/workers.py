"""Tests with many processes: `@ranks(2)` runs a test's body on every rank of a gloo group, on this machine.

The processes are forked from a server that has imported torch already, so a test takes a second. A body that
raises on any rank fails the test with the tracebacks, and the other ranks are ended.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import inspect
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 120.0  # seconds for a test; for a collective a quarter of it

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])


def ranks(world: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test on `world` ranks; its first parameter is the rank."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            run(body, world, arguments)

        signature = inspect.signature(body)
        parameters = list(signature.parameters.values())[1:]
        test.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return test

    return decorate


def run(body: Callable[..., None], world: int, arguments: dict[str, Any]) -> None:
    """The body on every rank; raises what the failing ranks raised, the first first."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start(body, world, folder, arguments)
        try:
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        failed = sorted(Path(folder).glob("failed *"), key=lambda path: path.stat().st_mtime_ns)
        if failed:
            raise AssertionError("\n".join(f"{path.name}\n{path.read_text()}" for path in failed))
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world, f"exit codes {codes}"


def start(body: Callable[..., None], world: int, folder: str, arguments: dict[str, Any]) -> list[Any]:
    """The processes, begun; they meet in the folder, and write there why they failed."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # the server's
    where = (body.__module__, body.__qualname__)
    processes = [
        _context.Process(target=_work, args=(rank, world, folder, where, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def _wait(processes: list[Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode not in (0, None) for p in processes):
            for process in processes:
                process.join(2.0)
            return
        for process in processes:
            process.join(0.05)


def _work(rank: int, world: int, folder: str, where: tuple[str, str], arguments: dict[str, Any]) -> None:
    import random
    import warnings

    import torch
    import torch.distributed as dist

    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "analysis")]
    warnings.simplefilter("error")
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    try:
        module = importlib.import_module(where[0])
        body = getattr(module, where[1]).__wrapped__
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT / 4),
        )
        body(rank, **arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failed on rank {rank}").write_text(traceback.format_exc())
        os.kill(os.getpid(), signal.SIGKILL)  # gloo's threads may wait for others for long
