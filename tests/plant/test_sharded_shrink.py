"""Sharded parameters really shrink: bit-equal to one process that shrinks, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sharded import Shard, at_once, by_layer, hybrid, net, none, tensor_parallel, whole
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from workers import ranks

import controlprune as cp

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
}
QUIET = cp.Control(observe_every=1000, update_every=1000, freeze=1.0)  # masks are set by hand


class Run:
    """The same batches on every rank, so that the mean of the gradients is each of them to the last bit."""

    def __init__(
        self,
        shard: Shard,
        optimizer: str = "adamw",
        policy: cp.Control = QUIET,
        steps: int = 500,
        park_on: str | None = None,
    ) -> None:
        self.model = net()
        traced = cp.trace(self.model, (torch.zeros(2, 8).double(),))
        shard(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.controller = cp.attach(
            self.model, self.optimizer, budget=cp.Budget(flops=0.5), example_inputs=traced, total_steps=steps,
            round_to=1, policy=policy, park_on=park_on,
        )  # fmt: skip

    def train(self, steps: int) -> None:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.controller.steps)
            x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
            loss = nn.functional.cross_entropy(self.model(x), (x[:, :4] + x[:, 4:]).argmax(1))
            loss.backward()
            self.optimizer.step()
            self.controller.step(loss)
            self.optimizer.zero_grad()

    def masks(self, every: int) -> None:
        """All but every n-th unit."""
        self.controller.set_masks({g.name: torch.arange(g.size) % every > 0 for g in self.controller.groups})


def everything(run: Run) -> dict[str, Tensor]:
    """Weights and optimizer state, whole."""
    found = whole(run.model)
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return found


def assert_equal(one: Run, many: Run, where: str) -> None:
    expected, found = everything(one), everything(many)
    assert expected.keys() == found.keys(), where
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, f"{where}: {name}"
        assert torch.equal(found[name], tensor), f"{where}: {name}"


def shrink_and_expand(shard: Shard, optimizer: str) -> None:
    one, many = Run(none, optimizer), Run(shard, optimizer)
    parameters = list(many.model.parameters())
    turns: list[tuple[str, Any]] = [
        ("dense", lambda run: None),
        ("masked", lambda run: run.masks(3)),
        ("shrunk", lambda run: run.controller.shrink()),
        ("other units", lambda run: run.masks(2)),
        ("expanded", lambda run: run.controller.expand()),
        ("masked again", lambda run: run.masks(5)),
        ("shrunk again", lambda run: run.controller.shrink()),
    ]
    for where, turn in turns:
        for run in (one, many):
            turn(run)
        assert_equal(one, many, where)
        for run in (one, many):
            run.train(2)
        assert_equal(one, many, f"{where}, trained")
        for a, b in zip(
            one.controller.plant.weight_norms(), many.controller.plant.weight_norms(), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert all(p is q for p, q in zip(parameters, many.model.parameters(), strict=True))
    assert sum(p.numel() for p in many.model.parameters()) < sum(p.numel() for p in net().parameters())
    many.controller.finalize()
    one.controller.finalize()
    assert_equal(one, many, "finalized")
    x = torch.ones(2, 8).double()
    assert torch.equal(one.model(x), many.model(x))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@ranks(2)
def test_as_one_process_on_2_ranks(rank: int, optimizer: str) -> None:
    shrink_and_expand(by_layer, optimizer)


@ranks(4)
def test_as_one_process_on_4_ranks(rank: int) -> None:
    shrink_and_expand(by_layer, "adamw")
    shrink_and_expand(at_once, "sgd")


@ranks(4)
def test_hybrid_sharding(rank: int) -> None:
    shrink_and_expand(hybrid, "adamw")


@ranks(2)
def test_under_control(rank: int) -> None:
    """The whole loop: it shrinks by itself, looks, returns units, ends in the budget."""
    policy = cp.Control(observe_every=1, update_every=4, revise_every=3, looks=1.0)
    one, many = Run(none, policy=policy, steps=64), Run(by_layer, policy=policy, steps=64)
    layouts = set()
    for step in range(64):
        if step == 40:
            for run in (one, many):
                run.controller.shrink()
        for run in (one, many):
            run.train(1)
        layouts.add(many.controller.plant.compact)
        for name, mask in one.controller.masks.items():
            assert torch.equal(mask, many.controller.masks[name]), (step, name)
    assert layouts == {False, True}
    many.controller.finalize()
    assert many.controller.cost()["flops"].fraction <= 0.5


@ranks(2)
def test_tensor_parallel_keeps_its_shapes(rank: int) -> None:
    with pytest.raises(ValueError, match=r"policy: parameters under tensor parallelism.*shrink=False"):
        Run(tensor_parallel)
    run = Run(tensor_parallel, policy=cp.Control(shrink=False))
    with pytest.raises(RuntimeError, match=r"shrink: these sharded parameters keep their shapes"):
        run.controller.plant.apply(run.controller.plant.masks, compact=True)
    with pytest.raises(ValueError, match=r"into: sharded parameters .*give finalize\(into=model\)"):
        run.controller.finalize()


def save(run: Run, folder: Any) -> None:
    run.controller.sync()
    controller = cp.Packed(run.controller)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state_dict_saver.save(
        {"controller": controller, "model": model, "optimizer": optimizer}, checkpoint_id=folder
    )


def load(run: Run, folder: Any) -> None:
    state_dict_loader.load({"controller": cp.Packed(run.controller)}, checkpoint_id=folder)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state_dict_loader.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)


@ranks(4)
def _save_shrunk(rank: int, folder: Any) -> None:
    run = Run(by_layer)
    run.masks(3)
    run.train(2)
    run.controller.shrink()
    run.train(2)
    save(run, folder)
    run.train(2)
    run.controller.expand()
    run.train(1)
    if rank == 0:
        torch.save(everything(run), f"{folder}.pt")
    else:
        everything(run)


@ranks(2)
def _go_on(rank: int, folder: Any) -> None:
    run = Run(by_layer)
    load(run, folder)
    assert run.controller.plant.compact
    run.train(2)
    run.controller.expand()  # what is parked came too
    run.train(1)
    expected, found = torch.load(f"{folder}.pt"), everything(run)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_resumed_on_another_number_of_ranks(tmp_path: Any) -> None:
    _save_shrunk(folder=tmp_path / "a")
    _go_on(folder=tmp_path / "a")
