"""Many replicas: the same decisions on every rank, whatever DDP is told to do, and divergence is repaired."""

from __future__ import annotations

import copy
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rig import QUICK, bits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import ranks

import controlprune as cp
from controlprune.cost.problem import Problem
from controlprune.loop.replicas import digest
from controlprune.policies.base import Decision, Observation
from controlprune.policies.feedback.control import ControlLoop

STEPS = 60
HALF = cp.Budget(flops=0.5)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 4)
    )


def data(step: int, rank: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(size, 8, generator=generator)
    return x, (x[:, :4] + x[:, 4:]).argmax(1)


class Run:
    """One rank's training."""

    def __init__(
        self,
        rank: int,
        *,
        before: bool = True,
        seed: int = 0,
        policy: Any = QUICK,
        steps: int = STEPS,
        adam: bool = True,
        budget: cp.Budget = HALF,
        instruments: cp.Instruments | None = None,
        **options: Any,
    ) -> None:
        self.rank, self.step = rank, 0
        self.widths: list[int] = []
        self.numbers: list[int] = []
        self.inner = net()
        make = torch.optim.Adam if adam else torch.optim.SGD
        self.optimizer = make(self.inner.parameters(), lr=0.01)
        arguments = {
            "budget": budget,
            "example_inputs": (torch.zeros(2, 8),),
            "total_steps": steps,
            "policy": policy,
            "seed": seed,
            "instruments": instruments,
        }
        if before:
            self.controller = cp.attach(self.inner, self.optimizer, **arguments)
        self.model = DDP(self.inner, **options)
        if not before:
            self.controller = cp.attach(self.model, self.optimizer, **arguments)

    def train(self, steps: int, parts: int = 1, each: Any = None) -> None:
        for _ in range(steps):
            self.step += 1
            loss = torch.zeros(())
            for part in range(parts):
                x, y = data(parts * self.step + part, self.rank)
                with nullcontext() if part == parts - 1 else self.model.no_sync():
                    loss = nn.functional.cross_entropy(self.model(x), y) / parts
                    loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.controller.step(loss)
            self.optimizer.zero_grad()
            self.widths.append(len(self.inner[0].weight))
            self.numbers.append(sum(p.numel() for p in self.inner.parameters()))
            if each is not None:
                each(self)


def everywhere(value: Any) -> list[Any]:
    """The value on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def state_of(run: Run) -> list[int]:
    """A digest of masks, layout, weights and optimizer state."""
    names = {str(k): m for k, m in run.controller.masks.items()}
    return digest([names, run.controller.plant.compact, bits(run.inner, run.optimizer)])


def assert_same(run: Run) -> None:
    states = everywhere(state_of(run))
    assert all(state == states[0] for state in states), f"step {run.step}"


def squeeze(run: Run) -> None:
    """The user shrinks and expands on the way (these nets are too small for it to pay by itself)."""
    if run.step in (25, 45):
        run.controller.shrink()
    if run.step == 35:
        run.controller.expand()
    assert_same(run)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attached after": {"before": False},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True, "before": False},
}


@pytest.mark.parametrize("options", OPTIONS)
@ranks(2)
def test_every_rank_decides_alike(rank: int, options: str) -> None:
    """Other data on every rank; after every step masks, weights and optimizer state are the same bits."""
    run = Run(rank, **OPTIONS[options])
    run.train(STEPS, each=squeeze)
    assert run.controller._run.replicas.repairs == 0
    assert run.widths[20] == 32 > run.widths[30]
    assert run.widths[36] == 32 > run.widths[46]
    small = run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5
    assert small is run.inner
    x, y = data(0, rank)
    nn.functional.cross_entropy(run.model(x), y).backward()  # DDP goes on, with the small net
    assert all(
        torch.equal(p.grad, g) for p, g in zip(small.parameters(), gradients_of_rank_0(small), strict=True)
    )


def gradients_of_rank_0(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for gradient in found:
        dist.broadcast(gradient, 0)
    return found


@pytest.mark.parametrize("seeds", ["same", "different"])
@ranks(2)
def test_a_run_that_starts_at_the_budget(rank: int, seeds: str) -> None:
    """Units are drawn at random: with other seeds, too, rank 0's are everyone's, and that is no fault."""
    policy = cp.Control(start="budget", observe_every=1, update_every=4, revise_every=3)
    seed = rank if seeds == "different" else 0
    for before in (True, False):
        run = Run(rank, seed=seed, policy=policy, before=before)
        run.train(20, each=assert_same)
        assert run.controller._run.replicas.repairs == 0
        run.controller.detach()


@pytest.mark.parametrize("fault", ["mask", "other unit", "statistics", "random state"])
@ranks(2)
def test_divergence_is_caught_at_the_next_update(rank: int, fault: str) -> None:
    run = Run(rank)
    run.train(30)
    assert not run.controller.plant.compact
    if fault == "other unit":
        run.controller.shrink()
        run.train(1)
    if rank == 1:
        inject(run, fault)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(4 - run.step % 4)
    assert ["did not agree" in str(w.message) for w in caught] == [True]
    assert run.controller.history[-1].event.startswith("repair")
    assert_same(run)
    run.train(STEPS - run.step, each=assert_same)
    assert run.controller._run.replicas.repairs == 1
    assert "1 repairs" in run.controller.report()
    run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5


def inject(run: Run, fault: str) -> None:
    loop, name = run.controller._run.policy, run.controller.groups[0].name
    mask = run.controller.masks[name]
    if fault == "mask":
        run.controller.set_masks({name: mask ^ (torch.arange(len(mask)) == int(mask.nonzero()[0]))})
    elif fault == "other unit":  # as many, so the shapes stay
        on, off = int(mask.nonzero()[0]), int((~mask).nonzero()[0])
        mask[on], mask[off] = False, True
        run.controller.set_masks({name: mask})
    elif fault == "statistics":
        loop.units.moments.first[3] += 1e-6
    else:
        loop.random.manual_seed(5)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("view", [False, True])
@ranks(2)
def test_accumulation_under_no_sync(rank: int, parts: int, view: bool) -> None:
    run = Run(rank, gradient_as_bucket_view=view)
    run.train(STEPS, parts=parts, each=squeeze)
    assert run.controller._run.replicas.repairs == 0


def doubled(state: list[int], bucket):  # no annotations: torch compares them as objects
    """A user's hook: counts its calls, averages."""
    state.append(bucket.index())
    work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return work.then(lambda future: future.value()[0] / dist.get_world_size())


@pytest.mark.parametrize("hook", ["users", "fp16", "powerSGD", "built in"])
@ranks(2)
def test_communication_hooks_stay(rank: int, hook: str) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    run, calls = Run(rank), []
    if hook == "users":
        run.model.register_comm_hook(calls, doubled)
    elif hook == "fp16":
        run.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "powerSGD":
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=4, min_compression_rate=0.5)
        run.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        run.model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    run.train(STEPS, each=squeeze)
    if hook == "users":
        assert len(calls) == STEPS
    if hook == "powerSGD":
        assert state.error_dict
    if hook == "built in":
        assert "FP16" in run.model._get_ddp_logging_data()["comm_hook"]
    assert run.controller._run.replicas.repairs == 0


@ranks(3)
def test_ranks_that_run_out_of_data(rank: int) -> None:
    """`join`: the others go on, masks hold while one is out, and all are the same again afterwards."""
    policy = cp.Control(observe_every=1, update_every=3)
    with (
        pytest.raises(RuntimeError, match=r"join: .*replicate\(ddp\) before"),
        (late := Run(rank)).model.join(),
    ):
        late.train(1)
    run = Run(rank, policy=policy, before=False)
    for epoch in range(4):
        with run.model.join():
            run.train(12 + (epoch + rank) % 3)
        if epoch == 1:
            run.controller.shrink()
        states = everywhere((run.controller.steps, digest(run.controller._run.policy.state_dict())))
        assert all(state == states[0] for state in states), states
        assert run.controller.steps == (epoch + 1) * 14
        assert_same(run)
    assert run.controller._run.replicas.repairs == 0
    run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5


@ranks(2)
def test_bad_luck_on_one_rank(rank: int) -> None:
    """A loss that is not finite on one rank is a skipped step on all."""
    run = Run(rank)
    for step in range(24):
        x, y = data(step, rank)
        loss = nn.functional.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        run.controller.step(loss * float("nan") if step % 10 == 3 and rank == 1 else loss)
        run.optimizer.zero_grad()
    assert run.controller.skipped == 3
    assert_same(run)


@ranks(2)
def test_only_rank_0_saves(rank: int, tmp_path: Any) -> None:
    """Saved between two updates, by one rank, resumed by both: bit for bit the undisturbed run."""
    run, path = Run(rank), tmp_path / "state.pt"
    run.train(30)
    run.controller.shrink()
    run.train(3)
    run.controller.sync()
    if rank == 0:
        parts = (run.inner, run.optimizer, run.controller)
        torch.save([part.state_dict() for part in parts], path)
    dist.barrier()
    run.train(STEPS - run.step)
    again = Run(rank)
    for part, state in zip((again.inner, again.optimizer, again.controller), torch.load(path), strict=True):
        part.load_state_dict(state)
    again.step = again.controller.steps
    again.train(STEPS - again.step)
    assert state_of(again) == state_of(run)
    assert again.controller._run.replicas.repairs == 0


class Stopwatch:
    """A clock of one rank: its steps take longer the higher the rank, and it jitters by itself."""

    def __init__(self, rank: int) -> None:
        self.rank, self.now = rank, 0.0
        self.noise = torch.Generator().manual_seed(rank)

    def __call__(self) -> float:
        return self.now

    def step(self, run: Run) -> None:
        share = run.numbers[-1] / run.numbers[0]
        self.now += (1 + 0.5 * self.rank) * share * (1 + 0.1 * float(torch.rand((), generator=self.noise)))


@ranks(2)
def test_clocks_that_differ(rank: int) -> None:
    """What is measured is averaged before anybody decides by it."""
    watch = Stopwatch(rank)
    budget = cp.Budget(train_time=0.6)
    run = Run(rank, budget=budget, instruments=cp.Instruments(clock=watch), steps=120)

    def each(run: Run) -> None:
        run.controller.shrink()  # nothing is saved while the tensors are dense
        watch.step(run)
        assert_same(run)

    run.train(120, each=each)
    assert run.controller._run.replicas.repairs == 0
    run.controller.finalize()
    assert_same(run)
    time = run.controller.cost()["train_time"].fraction
    assert sum(everywhere(time)) / 2 == pytest.approx(0.6, abs=0.05)


@ranks(2)
def test_devices_measured_apart_go_by_rank_0(rank: int) -> None:
    """What was measured when attaching is not the same on two machines: one of them is believed."""
    multiples = (4 << rank,) * 2
    attaching = sys.modules["controlprune.loop.attach"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(attaching, "group_multiples", lambda *given, timed: multiples)
        patch.setattr(attaching, "several", lambda: False)  # they were measured before the processes met
        run = Run(rank)
        warnings.simplefilter("error")
        run.train(STEPS, each=assert_same)
    assert run.controller._run.replicas.repairs == 0
    assert run.controller._run.problem.steps == everywhere(run.controller._run.problem.steps)[0]
    assert run.controller._run.problem.steps[0] == 4


@ranks(2)
def test_what_cannot_be_followed_is_refused(rank: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(rank)
    with pytest.raises(ValueError, match="ddp: it wraps another model"):
        run.controller.replicate(DDP(model))
    with pytest.raises(TypeError, match="ddp=Sequential: give the DistributedDataParallel"):
        run.controller.replicate(model)
    with pytest.raises(RuntimeError, match="a controller is attached"):
        cp.attach(run.model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(torch.zeros(2, 8),),
                  total_steps=9)  # fmt: skip
    plain = copy.deepcopy(run.inner)
    plain(torch.zeros(2, 8))
    run.controller.detach()
    assert "join_hook" not in vars(run.model)


# --- two ranks of B against one process of 2 B -----------------------------------------------------


@dataclass(frozen=True)
class Forced(cp.Control):
    """Decides nothing: the masks of a step are given. Everything else of the loop is at work."""

    def begin(self, problem: Problem) -> ControlLoop:
        return ForcedLoop(self, problem)


class ForcedLoop(ControlLoop):
    def decide(self, observation: Observation) -> Decision | None:
        step, masks = observation.step, observation.masks
        if step == 0:
            return None
        self.units.stability(torch.cat(masks))
        wanted = tuple((torch.arange(len(m)) + step // 12) % 3 > 0 for m in masks)
        return Decision(wanted, 24 < step <= 48, self.problem.budget, self._price())


def mixed(kind: str, y: Tensor, t: Tensor) -> Tensor:
    """A loss that is identified, and one that is not."""
    if kind == "cross-entropy":
        return nn.functional.cross_entropy(y, t)
    return (y - nn.functional.one_hot(t, 4)).abs().pow(1.5).mean()


def forced(rank: int, kind: str, loss: str) -> cp.Controller:
    """`kind`: both halves of the batch in this process, or this rank's half."""
    heeding = cp.Plan(latest=0.1)  # then the windows of its values are kept, and compared here
    policy = Forced(plan=heeding, observe_every=1, update_every=4, revise_every=3)
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    whole = model if kind == "one" else DDP(model)
    controller = cp.attach(whole, optimizer, budget=cp.Budget(flops=0.5), total_steps=80,
                           example_inputs=(torch.zeros(2, 8).double(),), policy=policy)  # fmt: skip
    for step in range(1, 73):
        halves = [data(step, k) for k in (0, 1)]
        x, t = (torch.cat(z) for z in zip(*halves, strict=True)) if kind == "one" else halves[rank]
        value = mixed(loss, whole(x.double()), t)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        controller.step(value)
        optimizer.zero_grad()
    return controller


@pytest.mark.parametrize("loss", ["cross-entropy", "unknown"])
@ranks(2)
def test_two_ranks_see_what_one_process_with_both_batches_sees(rank: int, loss: str) -> None:
    one, two = forced(rank, "one", loss), forced(rank, "two", loss)
    assert two._run.replicas.repairs == 0
    a, b = one._run.policy, two._run.policy
    pairs = {
        "moments": (a.units.moments.first, b.units.moments.first, 2e-4),
        "squares": (a.units.moments.second, b.units.moments.second, 2e-4),
        "window": (a.units.window.float(), b.units.window.float(), 2**-7),  # kept in bfloat16
    }
    for name, (x, y, rtol) in pairs.items():
        scale = float(x.abs().max())
        torch.testing.assert_close(x, y, rtol=rtol, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")
    assert [r.active for r in one.history] == [r.active for r in two.history]


def alternate(run: Run) -> None:
    """Shrunk and expanded in turn, and checked after every step."""
    if run.step % 40 == 20:
        run.controller.shrink()
    elif run.step % 40 == 0 and run.step < 400:
        run.controller.expand()
    assert_same(run)


def five_hundred_steps(rank: int) -> None:
    run = Run(rank, steps=500)
    run.train(500, each=alternate)
    assert run.controller._run.replicas.repairs == 0
    assert sum(a != b for a, b in pairwise(run.numbers)) >= 10
    assert any(sum(row.on) for row in run.controller.history)
    run.controller.finalize()
    assert run.controller.cost()["flops"].fraction <= 0.5
    assert_same(run)


@pytest.mark.slow
@ranks(2)
def test_500_steps_on_2_ranks(rank: int) -> None:
    five_hundred_steps(rank)


@pytest.mark.slow
@ranks(4)
def test_500_steps_on_4_ranks(rank: int) -> None:
    five_hundred_steps(rank)


@pytest.mark.parametrize("options", ["plain", "bucket view"])
@ranks(2)
def test_single_weights_grow_alike(rank: int, options: str) -> None:
    """RigL reads gradients of dormant weights, averaged over the ranks, and masks them then."""
    inner = net()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.05, momentum=0.9)
    controller = cp.attach(
        inner,
        optimizer,
        budget=cp.Budget(params=0.3),
        example_inputs=(torch.zeros(2, 8),),
        total_steps=40,
        policy=cp.RigL(update_every=4),
        granularity="weight",
    )
    model, moved = DDP(inner, **OPTIONS[options]), 0
    for t in range(40):
        x, y = data(t, rank)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        before = controller.masks
        controller.step(loss)
        optimizer.zero_grad()
        moved += sum(int((m != before[n]).sum()) for n, m in controller.masks.items())
        found = digest([dict(controller.masks), bits(inner, optimizer)])
        assert everywhere(found) == [found, found], t
    assert moved > 100
    assert controller._run.replicas.repairs == 0
    controller.finalize()
