"""Latency by replay on a pretend card: what is captured where, what a replay takes, and a whole run by it.

The card's clock moves by a launch (on the host, 1 ms) and by the work of the widths; a replay has no launch.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import QUICK
from torch import Tensor, nn

import controlprune as cp
from controlprune.cost import replay
from controlprune.cost.flops import flops
from controlprune.cost.latency import latency
from controlprune.cost.replay import WARM, NotCaptured, forward_on
from controlprune.structure import analyse

CPU = torch.device("cpu")
LAUNCH, REPLAY, PER_FLOP = 1e-3, 1e-5, 1e-9


class Card:
    now = 0.0
    stream = "outside"
    capturing = False
    log: tuple[str, ...] = ()
    pools: tuple[int, ...] = ()  # of every capture

    @classmethod
    def clock(cls) -> float:
        return cls.now


class Net(nn.Module):
    """What it does to the card's clock, and to what it keeps of a forward."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(20, 64), nn.Linear(64, 48), nn.Linear(48, 5)
        self.refuses, self.table = refuses, None

    def forward(self, x: Tensor) -> Tensor:
        if self.refuses and Card.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        layers = (self.first, self.second, self.out)
        Card.now += LAUNCH + PER_FLOP * sum(2 * len(x) * layer.weight.numel() for layer in layers)
        Card.log += (f"forward on {Card.stream}",)
        self.table = torch.ones(3) if self.table is None else self.table
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))))


class Stream:
    def __init__(self, name: object) -> None:
        self.name = f"side of {name}"

    def wait_stream(self, other: Any) -> None:
        Card.log += (f"{self.name} waits for {other.name}",)


class Graph:
    work = 0.0

    def replay(self) -> None:
        Card.now += REPLAY + self.work


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    before, Card.stream = Card.stream, stream.name
    yield
    Card.stream = before


@contextmanager
def capture(graph: Graph, pool: int, stream: Stream, *, capture_error_mode: str) -> Iterator[None]:
    """Recorded and not run: the clock stands still."""
    assert (Card.stream, capture_error_mode) == (stream.name, "thread_local")
    assert not torch.is_grad_enabled()
    began, Card.capturing = Card.now, True
    Card.log, Card.pools = (*Card.log, "capture"), (*Card.pools, pool)
    try:
        yield
        graph.work = Card.now - began - LAUNCH
    finally:
        Card.now, Card.capturing = began, False


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = Stream("none")
    outside.name = "outside"
    monkeypatch.setattr(replay, "has_graphs", lambda device: True)
    handles = itertools.count()
    for name, pretended in {
        "Stream": Stream, "CUDAGraph": Graph, "stream": on, "graph": capture,
        "current_stream": lambda device: outside, "graph_pool_handle": lambda: next(handles),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, pretended)
    monkeypatch.setattr(Card, "now", 0.0)
    monkeypatch.setattr(Card, "log", ())
    monkeypatch.setattr(Card, "pools", ())


@torch.no_grad()
def test_warmed_and_captured_once_on_one_side_stream(card: None) -> None:
    run = forward_on(CPU, cuda_graph=True)(Net(), (torch.ones(2, 20),))
    assert Card.log == ()
    run()
    side = "side of cpu"
    forward = f"forward on {side}"
    begun = [f"{side} waits for outside", *[forward] * WARM, "capture", forward, f"outside waits for {side}"]
    assert list(Card.log) == begun
    before = Card.now
    run()
    assert len(Card.log) == len(begun)
    assert Card.now - before < LAUNCH


def test_the_replay_is_what_is_timed(card: None, tmp_path: Path) -> None:
    model, x = Net(), torch.randn(7, 20)
    structure = analyse(model, (x,))
    how = {"clock": Card.clock, "seconds": 0.2, "cache": tmp_path}
    eager = latency(structure, model, (x,), **how)
    replayed = latency(structure, model, (x,), **how, cuda_graph=True)  # the cache knows them apart
    assert latency(structure, model, (x,), **how, cuda_graph=True).timings == ()
    work = flops(structure)
    for found, start in ((eager, LAUNCH), (replayed, REPLAY)):
        for widths, timing in zip(found.points, found.timings, strict=True):
            assert timing.median == pytest.approx(start + PER_FLOP * work.value(widths))
    captures = Card.log.count("capture")
    assert captures == len(replayed.points), "each width is captured once"
    assert len(set(Card.pools)) == 1
    assert model.table is None


def test_a_limit_below_the_launches_is_met_where_it_is_deployed_as_a_graph(card: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    budget = cp.Budget(latency="0.25 ms")
    for cuda_graph in (False, True):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        instruments = cp.Instruments(clock=Card.clock, cuda_graph=cuda_graph)
        options: dict[str, Any] = {"example_inputs": (x,), "total_steps": 40, "instruments": instruments,
                                   "policy": QUICK, "round_to": 1, "budget": budget}  # fmt: skip
        if not cuda_graph:
            with pytest.raises(cp.InfeasibleBudget):
                cp.attach(model, optimizer, **options)
            continue
        controller = cp.attach(model, optimizer, **options)
        for _ in range(40):
            loss = nn.functional.cross_entropy(model(x), x[:, :5].argmax(1))
            loss.backward()
            optimizer.step()
            controller.step(loss)
            optimizer.zero_grad()
        controller.finalize()
        seconds = REPLAY + PER_FLOP * sum(
            2 * 64 * layer.weight.numel() for layer in (model.first, model.second, model.out)
        )
        assert 0.9 * 0.25e-3 < seconds <= 0.25e-3


def test_what_cannot_be_captured_is_an_error_that_says_so(card: None, tmp_path: Path) -> None:
    model, x = Net(refuses=True), torch.randn(7, 20)
    structure = analyse(model, (x,))
    with pytest.raises(NotCaptured, match=r"cannot be captured .* leave cuda_graph out"):
        latency(structure, model, (x,), clock=Card.clock, cache=tmp_path, cuda_graph=True)


def test_in_mid_run_it_is_given_up_and_training_goes_on(card: None) -> None:
    from controlprune.cost.forward_time import Gauge

    model, x = Net(), torch.randn(7, 20)
    gauge = Gauge(model, (x,), {"latency": True}, 1e-3, cp.Instruments(Card.clock, cuda_graph=True))
    for _ in range(2):
        reading = gauge.read(model)
        assert reading is not None
        assert reading.use["latency"] == pytest.approx(1.0)
    assert Card.pools == (0, 0, 1, 1), "memory of graphs that are gone is not captured into"
    model.refuses = True
    with pytest.warns(UserWarning, match="captured as a CUDA graph .* not measured during the run"):
        assert gauge.read(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gauge.read(model) is None


def test_a_device_without_graphs_is_told() -> None:
    model, x = Net(), torch.randn(7, 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"the model is on 'cpu', which has no CUDA graphs; move it"):
        cp.attach(model, optimizer, budget=cp.Budget(latency=0.5), example_inputs=(x,), total_steps=10,
                  instruments=cp.Instruments(cuda_graph=True))  # fmt: skip
