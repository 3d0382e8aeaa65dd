"""Every test starts from the same random state, on one thread, and leaves both as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from controlprune.cost import grid as rounding

STAIRS = {n: float(-(-n // 16)) for n in range(1, 65)}  # what a device that works in blocks of 16 shows


@pytest.fixture(autouse=True)
def same_device(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test depends on what was measured here, or writes to the user's cache."""
    monkeypatch.setattr(rounding, "_measure", lambda device, dtype: STAIRS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 — what third-party code under test may read
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
