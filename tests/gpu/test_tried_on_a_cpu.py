"""The tests that wait for a card, their bodies gone through on a CPU: a first run finds no slip of ours."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import test_gpu
import torch
import torch.distributed as dist
from torch import Tensor
from workers import ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_gpu, "DEVICE", CPU)


@pytest.mark.parametrize("name", test_gpu.SMALL)
@pytest.mark.parametrize("park_on", [None, "cpu"])
def test_the_contract(name: str, park_on: str | None) -> None:
    test_gpu.test_masked_equals_shrunk_and_comes_back(name, park_on)


@pytest.mark.parametrize("options", test_gpu.WHOLE, ids=str)
def test_whole_runs(options: dict[str, Any]) -> None:
    if options.get("optimizer_options") == {"capturable": True}:
        with pytest.raises(AssertionError, match="capturable=True"):  # torch: not on a CPU
            test_gpu.test_whole_runs(dict(options))
    else:
        test_gpu.test_whole_runs(dict(options))


def test_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    test_gpu.test_between_updates_nothing_waits()
    assert modes.count("error") > 40


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compiled(model, backend="aot_eager"))
    torch._dynamo.reset()
    test_gpu.test_compiled("reduce-overhead")


def test_what_only_a_card_has_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_gpu, "replay_seconds", lambda model, x: 1.0)
    with pytest.raises(ValueError, match="has no CUDA graphs"):
        test_gpu.test_latency_of_a_graph_under_budget()


@ranks(1)
def test_one_rank(rank: int) -> None:
    test_gpu.DEVICE, group = CPU, dist.new_group
    dist.new_group = lambda backend: group(backend="gloo")
    inspect.unwrap(test_gpu.test_nccl_with_one_rank)(rank)


@ranks(1)
def test_shards(rank: int, tmp_path: Path) -> None:
    test_gpu.DEVICE, begin = CPU, dist.init_process_group
    dist.init_process_group = lambda backend, **named: begin("gloo", **named)
    Tensor.is_pinned = lambda self: True  # type: ignore[assignment, method-assign]
    inspect.unwrap(test_gpu.test_shards_wait_in_page_locked_memory)(rank, tmp_path)
