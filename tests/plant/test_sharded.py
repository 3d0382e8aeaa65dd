"""Sharded parameters: the masked run is that of one process, whatever the mesh; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rig import hooks
from test_replicas import data, everywhere
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from workers import ranks

import controlprune as cp
from controlprune.loop.replicas import digest

STEPS = 48
MASKS_ONLY = cp.Control(observe_every=1, update_every=4, revise_every=3, shrink=False)
WORLD = 4  # batches in all, whatever number of ranks they are spread over


def net() -> nn.Module:
    """Widths that ranks cannot share evenly (but the last, for tensor parallelism); a norm over a group."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 25), nn.LayerNorm(25), nn.ReLU(), nn.Linear(25, 16),
        nn.GELU(), nn.Linear(16, 4),
    ).double()  # fmt: skip


def batches(step: int, mine: range) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*(data(step, k) for k in mine), strict=True))
    return x.double(), y


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


Shard = Callable[[nn.Module], range]  # shards it in place; which batches this rank sees


def none(model: nn.Module) -> range:
    return range(WORLD)


def share() -> range:
    each = WORLD // dist.get_world_size()
    return range(each * dist.get_rank(), each * (dist.get_rank() + 1))


def by_layer(model: nn.Module) -> range:
    for module in list(model.children())[:-1]:
        if list(module.parameters()):
            fully_shard(module)
    fully_shard(model)
    return share()


def at_once(model: nn.Module) -> range:
    fully_shard(model, reshard_after_forward=False)
    return share()


def hybrid(model: nn.Module) -> range:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    fully_shard(model, mesh=mesh)
    return share()


def tensor_parallel(model: nn.Module) -> range:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"5": ColwiseParallel(), "7": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    return range(WORLD)


class Run:
    def __init__(self, shard: Shard, optimizer: str = "adamw", clip: bool = True, **options: Any) -> None:
        self.model, self.clip = net(), clip
        traced = cp.trace(self.model, (torch.zeros(2, 8).double(),))
        self.mine = shard(self.model)
        make = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        }[optimizer]
        self.optimizer = make(self.model.parameters())
        self.controller = cp.attach(
            self.model, self.optimizer, budget=cp.Budget(flops=0.5), example_inputs=traced, total_steps=STEPS,
            round_to=1, **({"policy": MASKS_ONLY} | options),
        )  # fmt: skip
        self.controller._run.layouts.compiled = True  # neither side looks at a batch twice
        self.losses: list[float] = []

    def train(self, steps: int, parts: int = 1) -> None:
        for _ in range(steps):
            loss = torch.zeros(())
            for part in range(parts):
                x, y = batches(parts * self.controller.steps + part, self.mine)
                loss = nn.functional.cross_entropy(self.model(x), y) / parts
                loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.controller.step(loss)
            self.optimizer.zero_grad()


def assert_close(one: Run, many: Run) -> None:
    for name, mask in one.controller.masks.items():
        assert torch.equal(mask, many.controller.masks[name]), name
    expected, found = whole(one.model), whole(many.model)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_as_one_process(shard: Shard, optimizer: str = "adamw", parts: int = 1, clip: bool = True) -> None:
    one, many = Run(none, optimizer, clip), Run(shard, optimizer, clip)
    for step in range(STEPS // 4):
        one.train(4, parts)
        many.train(4, parts)
        assert_close(one, many)
        if step == 5:
            for run in (one, many):  # an evaluation in between
                run.model.eval()
                with torch.no_grad():
                    run.model(torch.ones(2, 8).double())
                run.model.train()
    assert any(not mask.all() for mask in one.controller.masks.values())
    assert any(sum(row.on) for row in one.controller.history)
    ours, theirs = one.controller._run.policy, many.controller._run.policy
    torch.testing.assert_close(ours.units.moments.first, theirs.units.moments.first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.units.moments.second, theirs.units.moments.second, rtol=1e-5, atol=1e-6)
    states = everywhere(digest([dict(many.controller.masks), theirs.state_dict()]))
    assert all(state == states[0] for state in states)
    small, gathered = one.controller.finalize(), many.controller.finalize(into=net())
    assert many.controller.cost()["flops"].fraction <= 0.5
    for (name, p), q in zip(small.named_parameters(), gathered.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert hooks(gathered, torch.optim.SGD(gathered.parameters())) == 0
    many.model.eval()
    x = batches(0, range(WORLD))[0]
    torch.testing.assert_close(many.model(x), gathered(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shard", [by_layer, at_once])
@ranks(2)
def test_fsdp_on_2_ranks(rank: int, shard: Shard) -> None:
    same_as_one_process(shard)


@ranks(2)
def test_fsdp_with_accumulated_gradients(rank: int) -> None:
    same_as_one_process(by_layer, "sgd", parts=2)


@ranks(2)
def test_tensor_parallel_on_2_ranks(rank: int) -> None:
    same_as_one_process(tensor_parallel, clip=False)  # torch takes no norm over plain and sharded ones


@ranks(4)
def test_hybrid_sharding_on_4_ranks(rank: int) -> None:
    same_as_one_process(hybrid)


@ranks(2)
def test_saved_and_resumed(rank: int, tmp_path: Any) -> None:
    run = Run(by_layer)
    run.train(24)
    run.controller.sync()
    assert any(not mask.all() for mask in run.controller.masks.values())
    model, optimizer = get_state_dict(run.model, run.optimizer)
    parts = {"controller": cp.Packed(run.controller), "model": model, "optimizer": optimizer}
    dcp.save(parts, checkpoint_id=tmp_path / "a")
    again = Run(by_layer)
    again.train(2)
    dcp.load({"controller": cp.Packed(again.controller)}, checkpoint_id=tmp_path / "a")
    model, optimizer = get_state_dict(again.model, again.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path / "a")
    set_state_dict(again.model, again.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for one in (run, again):
        one.train(24)
    for (name, p), q in zip(whole(run.model).items(), whole(again.model).values(), strict=True):
        assert torch.equal(p, q), name


@ranks(2)
def test_what_is_refused(rank: int) -> None:
    run = Run(by_layer)
    run.controller.set_masks({run.controller.groups[0].name: torch.arange(33) > 3})
    with pytest.raises(ValueError, match="into: it has no tensor"):
        run.controller.finalize(into=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="controller: its parameters are sharded"):
        cp.save(run.controller, "nowhere")
    model = net()
    by_layer(model)
    sgd, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(2, 8).double()
    half = cp.Budget(flops=0.5)
    with pytest.raises(ValueError, match=r"example_inputs: .*controlprune\.trace"):
        cp.attach(model, sgd, budget=half, example_inputs=(x,), total_steps=9, policy=MASKS_ONLY)
    with pytest.raises(ValueError, match=r"seed"):
        Run(by_layer, seed=rank)


@ranks(2)
def test_traced_without_memory_and_computed_in_bfloat16(rank: int) -> None:
    """As large models are made: on the meta device, sharded, then filled; bfloat16 only to compute in."""
    with torch.device("meta"):
        model = net().float()
    traced = cp.trace(model, (torch.zeros(2, 8, device="meta"),))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), net().float().parameters(), strict=True):
            assert isinstance(parameter, DTensor)
            parameter.copy_(distribute_tensor(value.detach(), parameter.device_mesh, parameter.placements))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=traced,
                           total_steps=STEPS, policy=MASKS_ONLY, round_to=1)  # fmt: skip
    for step in range(STEPS):
        x, y = data(step, rank)
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    small = controller.finalize(into=net().float())
    assert controller.cost()["flops"].fraction <= 0.5
    assert controller.skipped == 0
    x, _ = data(0, rank)
    torch.testing.assert_close(small(x), model(x).float(), rtol=0.05, atol=0.05)


@ranks(2)
def test_ranks_that_do_not_agree_stop(rank: int) -> None:
    run = Run(by_layer)
    run.train(8)
    if rank == 1:
        run.controller._run.policy.units.moments.first[3] += 1e-6
    with pytest.raises(RuntimeError, match=r"step 12: the ranks that hold the shards do not agree"):
        run.train(4)


@ranks(2)
def test_detached_it_is_whole(rank: int) -> None:
    run = Run(by_layer)
    before = whole(run.model)
    run.controller.set_masks({g.name: torch.arange(g.size) % 3 > 0 for g in run.controller.groups})
    assert any(not torch.equal(before[n], p) for n, p in whole(run.model).items())
    run.controller.detach()
    assert all(torch.equal(before[n], p) for n, p in whole(run.model).items())
