"""What people do in a training loop, under a controller: precision, scaling, accumulation, optimizers, …

Every test goes through the user's own loop, until the net is cut to half of its FLOPs and shrunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import rig
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import controlprune as cp

STEPS = 60

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
Update = Callable[["Run", Tensor, Tensor], Tensor]


@dataclass
class Run:
    """A model under a controller, and what torch counts for it when dense."""

    model: nn.Module
    optimizer: Optimizer
    controller: cp.Controller
    shape: tuple[int, ...]
    dense: int

    @property
    def widths(self) -> list[tuple[int, ...]]:
        return [row.active for row in self.controller.history]


def attached(model: nn.Module, optimizer: Optimizer, shape: tuple[int, ...]) -> Run:
    x = torch.zeros(2, *shape)
    dense = rig.flops(model, x)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.5),
        example_inputs=(x,),
        total_steps=STEPS,
        policy=rig.QUICK,
    )
    return Run(model, optimizer, controller, shape, dense)


def of(net: str, make: Make) -> Run:
    build, shape = rig.NETS[net]
    torch.manual_seed(0)
    model = build()
    return attached(model, make(model.parameters()), shape)


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def plain(run: Run, x: Tensor, y: Tensor) -> Tensor:
    loss = cross_entropy(run.model(x), y)
    loss.backward()
    run.optimizer.step()
    return loss


def train(run: Run, update: Update = plain, steps: int = STEPS) -> Run:
    for step in range(1, steps + 1):
        torch.manual_seed(step)  # for dropout
        loss = update(run, *rig.batch(step, run.shape))
        run.controller.step(loss)
        run.optimizer.zero_grad()
    return run


def assert_small(run: Run) -> None:
    """Half of the FLOPs in a plain model, whose optimizer goes on with state of the right shapes."""
    x, y = rig.batch(1, run.shape)
    run.controller.finalize()
    assert rig.flops(run.model, x[:2]) <= 0.5 * run.dense
    plain(run, x, y)
    for p in run.model.parameters():
        assert bool(p.isfinite().all())
        for value in run.optimizer.state[p].values():
            if isinstance(value, Tensor) and value.numel() > 1:
                assert all(s in (n, 1) for s, n in zip(value.shape, p.shape, strict=True))


# --- precision and scaling ------------------------------------------------------------------------


def test_autocast() -> None:
    def update(run: Run, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        return loss

    run = train(of("residual", adam), update)
    assert run.controller.skipped == 0
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert_small(run)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing_and_its_skips_are_skipped(fused: bool) -> None:
    bad, seen = 5, iter(range(1, STEPS + 1))  # step 5, before anything is cut
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)

    def scaled(run: Run, x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(run.model(x), y)
        scaler.scale(loss * (float("inf") if next(seen) == bad else 1.0)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        return loss

    steps = iter(range(1, STEPS + 1))

    def unscaled(run: Run, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(run.model(x), y) if next(steps) == bad else plain(run, x, y)

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.Adam(parameters, lr=0.01, fused=fused)

    runs = train(of("mlp", make), scaled), train(of("mlp", make), unscaled)
    assert [run.controller.skipped for run in runs] == [1, 1]
    assert runs[0].widths == runs[1].widths
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert_small(runs[0])


class Master(Optimizer):
    """Adam on a float32 copy of each parameter, which is given in bfloat16: all its state is float32."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["master"] = torch.zeros(()), p.float()
                    state["first"] = torch.zeros_like(state["master"])
                    state["second"] = torch.zeros_like(state["master"])
                gradient = p.grad.float()
                state["step"] += 1
                state["first"].lerp_(gradient, 0.1)
                state["second"].lerp_(gradient.square(), 0.001)
                rate = group["lr"] * (1 - 0.999 ** state["step"]).sqrt() / (1 - 0.9 ** state["step"])
                state["master"].sub_(rate * state["first"] / (state["second"].sqrt() + 1e-8))
                p.copy_(state["master"])


@pytest.mark.parametrize("layout", ["masked", "compact"])
def test_bfloat16_parameters_with_float32_state(layout: str) -> None:
    """What is parked keeps both, bit for bit; statistics are float32."""
    build, shape = rig.NETS["mlp"]
    torch.manual_seed(0)
    model = build().to(torch.bfloat16)
    optimizer = Master(model.parameters())
    quiet = cp.Control(update_every=10**6, observe_every=1)
    controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.5), total_steps=STEPS, policy=quiet,
                           example_inputs=(torch.zeros(2, *shape, dtype=torch.bfloat16),))  # fmt: skip
    run = Run(model, optimizer, controller, shape, 0)

    def update(run: Run, x: Tensor, y: Tensor) -> Tensor:
        return plain(run, x.to(torch.bfloat16), y)

    train(run, update, steps=6)
    name, size = controller.groups[0].name, controller.groups[0].size
    off = torch.arange(size) % 3 == 0
    reader = dict(model.named_parameters())["3.weight"]

    def parked() -> dict[str, Tensor]:
        return {"": reader.detach()[:, off].clone()} | {
            key: value[:, off].clone() for key, value in optimizer.state[reader].items() if value.ndim == 2
        }

    before = parked()
    assert {str(v.dtype) for v in before.values()} == {"torch.bfloat16", "torch.float32"}
    controller.set_masks({name: ~off})
    if layout == "compact":
        controller.shrink()
    train(run, update, steps=6)
    controller.expand()
    controller.set_masks({name: torch.ones(size, dtype=torch.bool)})
    after = parked()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    loop = controller.state_dict()["loop"]
    assert all(m.dtype == torch.float32 for k, m in loop["units"]["moments"].items() if k != "count")
    assert bool(loop["units"]["moments"]["first"].any())


def test_bfloat16_parameters_to_the_end() -> None:
    build, shape = rig.NETS["mlp"]
    torch.manual_seed(0)
    model = build().to(torch.bfloat16)
    optimizer = Master(model.parameters())
    x = torch.zeros(2, *shape, dtype=torch.bfloat16)
    dense = rig.flops(model, x)
    controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.5), total_steps=STEPS,
                           policy=rig.QUICK, example_inputs=(x,))  # fmt: skip
    run = Run(model, optimizer, controller, shape, dense)
    train(run, lambda run, x, y: plain(run, x.to(torch.bfloat16), y))
    assert controller.skipped == 0
    controller.finalize()
    assert rig.flops(model, x) <= 0.5 * dense
    inputs, labels = rig.batch(1, shape)
    plain(run, inputs.to(torch.bfloat16), labels)
    for p in model.parameters():
        assert optimizer.state[p]["master"].shape == p.shape
        assert bool(p.isfinite().all())


def test_gradient_accumulation_is_one_observation_of_the_whole_batch() -> None:
    def halves(run: Run, x: Tensor, y: Tensor) -> Tensor:
        parts = [cross_entropy(run.model(a), b) / 2 for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
        for part in parts:
            part.backward()
        run.optimizer.step()
        return parts[0].detach() + parts[1].detach()

    build, shape = rig.NETS["mlp"]
    runs = []
    for update in (halves, plain):
        torch.manual_seed(0)
        model = build().eval()  # no dropout: both see the same function
        runs.append(train(attached(model, adam(model.parameters()), shape), update, steps=3))
    moments = [run.controller.state_dict()["loop"]["units"]["moments"] for run in runs]
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-7)
    assert_small(train(runs[0], halves, steps=STEPS - 3))


def test_clipping() -> None:
    def update(run: Run, x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(run.model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.5, error_if_nonfinite=True)
        run.optimizer.step()
        return loss

    assert_small(train(of("residual", adam), update))


# --- the model ------------------------------------------------------------------------------------


def test_channels_last_is_kept() -> None:
    build, shape = rig.NETS["residual"]
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)
    run = train(attached(model, adam(model.parameters()), shape))
    assert any(a != b for a, b in zip(run.widths[0], run.widths[-1], strict=True))
    assert_small(run)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            x = torch.randn(2, module.in_channels, 4, 4).to(memory_format=torch.channels_last)
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            assert module(x).is_contiguous(memory_format=torch.channels_last)


class Checkpointed(nn.Module):
    """An MLP whose hidden layers are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(24, 4)
        self.hidden = nn.Sequential(nn.Linear(32, 24), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.reentrant is None or not x.requires_grad:
            return self.head(self.hidden(x))
        return self.head(checkpoint(self.hidden, x, use_reentrant=self.reentrant))


def test_activation_checkpointing_gives_the_same_run() -> None:
    runs = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = Checkpointed(reentrant)
        runs.append(train(attached(model, adam(model.parameters()), (8,))))
    for run in runs[1:]:
        assert run.widths == runs[0].widths
        for p, q in zip(run.model.parameters(), runs[0].model.parameters(), strict=True):
            assert torch.equal(p, q)
    assert_small(runs[1])


def test_an_average_of_the_weights_follows() -> None:
    run = of("mlp", adam)
    averaged = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    run.controller.follow(averaged.module)

    def update(run: Run, x: Tensor, y: Tensor) -> Tensor:
        loss = plain(run, x, y)
        averaged.update_parameters(run.model)
        return loss

    train(run, update)
    assert_small(run)
    averaged.update_parameters(run.model)
    for p, q in zip(averaged.module.parameters(), run.model.parameters(), strict=True):
        assert p.shape == q.shape
    x, y = rig.batch(2, run.shape)
    assert cross_entropy(averaged(x), y) < 1.0


# --- optimizers -----------------------------------------------------------------------------------


def test_parameter_groups_stay_the_users_own() -> None:
    build, shape = rig.NETS["mlp"]
    model = build()
    parameters = list(model.parameters())
    decay = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.02}], lr=0.01
    )
    groups = [dict(group) for group in optimizer.param_groups]
    run = train(attached(model, optimizer, shape))
    assert_small(run)
    assert optimizer.param_groups == groups
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("name", ["cosine", "one cycle", "plateau"])
def test_learning_rate_schedulers(name: str) -> None:
    run = of("mlp", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    rates = torch.optim.lr_scheduler
    if name == "plateau":
        plateau = rates.ReduceLROnPlateau(run.optimizer, patience=5)
        advance: Callable[[Tensor], None] = lambda loss: plateau.step(loss.item())  # noqa: E731
    else:
        cosine = rates.CosineAnnealingLR(run.optimizer, STEPS)
        cycle = rates.OneCycleLR(run.optimizer, 0.05, STEPS + 1) if name == "one cycle" else cosine
        advance = lambda loss: cycle.step()  # noqa: E731
    before = run.optimizer.param_groups[0]["lr"]

    def update(run: Run, x: Tensor, y: Tensor) -> Tensor:
        loss = plain(run, x, y)
        advance(loss)
        return loss

    train(run, update)
    assert run.optimizer.param_groups[0]["lr"] < before
    assert_small(run)


class Lion(Optimizer):
    """As someone else would write it: state of the shape of the parameter, one step at a time."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.sub_((0.9 * momentum + 0.1 * p.grad).sign(), alpha=group["lr"])
                    momentum.lerp_(p.grad, 0.01)


class RowSums(Lion):
    """Keeps one number per row: of no shape that could be followed."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["row_sums"] = p.flatten(1).sum(1) if p.ndim > 1 else torch.zeros(3)


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "lion": lambda p: Lion(p, lr=0.002),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_as_they_were(name: str) -> None:
    run = of("mlp", OPTIMIZERS[name])
    options = {k: v for k, v in run.optimizer.param_groups[0].items() if k != "params"}
    train(run)
    assert_small(run)
    assert {k: v for k, v in run.optimizer.param_groups[0].items() if k != "params"} == options


def test_state_of_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"RowSums state 'row_sums' of parameters such as '0\.weight'"):
        of("mlp", lambda p: RowSums(p, lr=0.002))


def test_lbfgs_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        of("mlp", lambda p: torch.optim.LBFGS(p))
