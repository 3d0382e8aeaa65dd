"""torchrun through a shrink of sharded parameters: a rank that dies in it or after, one that lags, restarts.

Every rank sees the same batches, so that each of these runs ends where one process does, to the last bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import elastic
import pytest
import torch
from test_sharded import none
from test_sharded_shrink import Run, everything
from torch import Tensor

pytestmark = pytest.mark.slow
Done: TypeAlias = subprocess.CompletedProcess[str]


def torchrun(folder: Path, ranks: int, trouble: str = "", restarts: int = 0) -> Done:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               f"--max-restarts={restarts}", elastic.__file__, str(folder), *trouble.split()]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a restart finds the addresses of those that died
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    run = Run(none)
    for step in range(elastic.STEPS):
        elastic.train(run, step)
    assert run.controller.plant.compact
    found = everything(run)
    run.controller.detach()
    return found


def assert_ended_alike(folder: Path, expected: dict[str, Tensor]) -> None:
    found = torch.load(folder / "end.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_number_of_ranks_goes_on(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    assert torchrun(tmp_path, 2, "dies").returncode != 0
    assert sorted(path.name for path in tmp_path.glob("step *")) == ["step 3", "step 6"]
    done = torchrun(tmp_path, 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_ended_alike(tmp_path, expected)


@pytest.mark.parametrize("trouble", ["dies", "falls"])
def test_torchrun_restarts_it(trouble: str, tmp_path: Path, expected: dict[str, Tensor]) -> None:
    done = torchrun(tmp_path, 2, trouble, restarts=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "died").exists()
    assert "exitcode: -9" in done.stderr
    assert_ended_alike(tmp_path, expected)


def test_a_straggler_only_makes_the_others_wait(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    done = torchrun(tmp_path, 2, "lags")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_ended_alike(tmp_path, expected)
