"""On a GPU (`pytest -m gpu`; skipped where there is none): what a CPU cannot show of the same promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rig import QUICK, Residual, mlp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from workers import ranks

import controlprune as cp
from controlprune.cost.clock import device_clock, measure_latency
from controlprune.cost.latency import measure_widths
from controlprune.structure import analyse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings(
        "default"
    ),  # torch warns of a card's features (TF32, few SMs): no fault of ours
]
STEPS = 60
DEVICE = torch.device("cuda")  # test_tried_on_a_cpu.py puts another one here


def wide() -> nn.Module:
    """So wide that its forward is more than the launching of its kernels (of 256 MB of weights at least)."""
    return nn.Sequential(nn.Linear(8, 8192), nn.ReLU(), nn.Linear(8192, 8192), nn.ReLU(), nn.Linear(8192, 4))


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (mlp, (8,)), "residual": (Residual, (1, 4, 4)), "wide": (wide, (8,)),
}  # fmt: skip
SMALL = ("mlp", "residual")
WHOLE: list[dict[str, Any]] = [
    {"amp": True},
    {"name": "residual", "channels_last": True},
    {"optimizer_options": {"fused": True}},
    {"optimizer_options": {"fused": True}, "amp": True},
    {"optimizer_options": {"foreach": True}},
    {"optimizer_options": {"capturable": True}},
]


def batch(step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(step))
    y = x.flatten(1)[:, :8].view(16, 4, 2).sum(2).argmax(1)
    return x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)


class Run:
    def __init__(self, name: str = "mlp", budget: cp.Budget | None = None, **options: Any) -> None:
        make, self.shape = NETS[name]
        self.model = make().to(DEVICE)
        if options.pop("channels_last", False):
            self.model = self.model.to(memory_format=torch.channels_last)
        kind = options.pop("optimizer", torch.optim.AdamW)
        self.optimizer = kind(self.model.parameters(), lr=0.01, **options.pop("optimizer_options", {}))
        self.scaler = torch.amp.GradScaler(DEVICE.type) if options.pop("amp", False) else None
        options.setdefault("policy", QUICK)
        self.controller = cp.attach(
            self.model, self.optimizer, budget=budget or cp.Budget(flops=0.5),
            example_inputs=(batch(0, self.shape)[0],), total_steps=STEPS, round_to=1,
            **options,
        )  # fmt: skip
        self.forward: Any = self.model

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x, y = batch(self.controller.steps, self.shape)
            with torch.autocast(DEVICE.type, torch.float16, enabled=self.scaler is not None):
                loss = nn.functional.cross_entropy(self.forward(x), y)
            if self.scaler is None:
                loss.backward()
                self.optimizer.step()
            else:
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.controller.step(loss)
            self.optimizer.zero_grad()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("park_on", [None, "cpu"])
def test_masked_equals_shrunk_and_comes_back(name: str, park_on: str | None) -> None:
    run = Run(name, park_on=park_on)
    run.train(3)
    run.model.eval()
    before = copy.deepcopy(run.model.state_dict())
    run.controller.set_masks({g.name: torch.arange(g.size) % 3 > 0 for g in run.controller.groups})
    x = batch(0, run.shape)[0]
    with torch.no_grad():
        masked = run.model(x)
        run.controller.shrink()
        torch.testing.assert_close(run.model(x), masked, rtol=1e-4, atol=1e-5)
    run.controller.detach()
    assert all(torch.equal(run.model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_whole_runs(options: dict[str, Any]) -> None:
    run = Run(**options)
    run.train(STEPS)
    small: Any = run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5
    assert next(small.parameters()).device.type == DEVICE.type
    if options.get("channels_last"):
        assert small.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_between_updates_nothing_waits() -> None:
    policy = cp.Control(observe_every=1, update_every=4, looks=1.0)
    run = Run(policy=policy)
    for step in range(1, STEPS):
        x, y = batch(step, run.shape)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step % 4 else "default")
        try:
            nn.functional.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
            run.controller.step(torch.zeros((), device=DEVICE))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run.optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    run = Run()
    run.forward = torch.compile(run.model, mode=mode)
    run.train(STEPS)
    run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5


def test_latency_and_memory_under_budget() -> None:
    run = Run("wide", budget=cp.Budget(latency=0.9, memory=0.8))
    run.train(STEPS)
    torch.cuda.reset_peak_memory_stats()
    run.controller.finalize()
    assert run.controller.cost()["memory"].fraction <= 0.8


def replay_seconds(model: nn.Module, x: Tensor) -> float:
    """Of a graph of its own, captured as torch's manual does it."""
    graph, side, clock = torch.cuda.CUDAGraph(), torch.cuda.Stream(), device_clock(x.device)
    with torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            model(x)
    return measure_latency(graph.replay, clock=clock).median


def test_latency_of_a_graph_under_budget() -> None:
    """And the run goes on beside it: other streams, other graphs, the user's memory."""
    x = batch(0, (8,))[0]
    dense = replay_seconds(wide().to(DEVICE).eval(), x)
    run = Run("wide", budget=cp.Budget(latency=0.7), instruments=cp.Instruments(cuda_graph=True))
    run.train(STEPS)
    small = run.controller.finalize().eval()
    assert replay_seconds(small, x) < 0.8 * dense


class Reads(nn.Module):
    """A number that the host needs, and a linear layer on each side of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) * (2.0 if float(x.sum()) > 1e9 else 1.0)


def test_a_forward_that_waits_cannot_be_captured() -> None:
    model, x = Reads().to(DEVICE), batch(0, (8,))[0]
    with pytest.raises(ValueError, match="cannot be captured as a CUDA graph"):
        measure_widths(analyse(model, (x,)), model, (x,), [(32,)], cuda_graph=True)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    model(x).sum().backward()
    assert torch.isfinite(model.first.weight.grad).all()  # type: ignore[union-attr]


def test_energy_under_budget() -> None:
    run = Run("wide", budget=cp.Budget(energy=0.9))
    run.train(STEPS)
    run.controller.finalize()


@ranks(1)
def test_nccl_with_one_rank(rank: int) -> None:
    group = dist.new_group(backend="nccl")
    run = Run()
    ddp = nn.parallel.DistributedDataParallel(run.model, process_group=group)
    run.controller.replicate(ddp)
    run.forward = ddp
    run.train(STEPS)
    run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5


@ranks(1)
def test_shards_wait_in_page_locked_memory(rank: int, tmp_path: Any) -> None:
    dist.destroy_process_group()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    model = mlp()
    traced = cp.trace(model, (torch.zeros(16, 8),))
    fully_shard(model.to(DEVICE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=traced,
                           total_steps=STEPS, round_to=1, policy=QUICK, park_on="cpu")  # fmt: skip
    model(batch(0, (8,))[0]).square().mean().backward()
    optimizer.step()
    before = [p.full_tensor().clone() for p in model.parameters() if isinstance(p, DTensor)]
    controller.set_masks({g.name: torch.arange(g.size) % 3 > 0 for g in controller.groups})
    controller.shrink()
    homes = [x for s in controller.plant.spots for x in (s.home, *s.state_home.values()) if x is not None]
    assert len(homes) > 2
    assert all(home.is_pinned() for home in homes)
    controller.detach()
    after = [p.full_tensor() for p in model.parameters() if isinstance(p, DTensor)]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
