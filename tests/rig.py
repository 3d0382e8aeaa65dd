"""Small runs for the tests of the loop: a model, its optimizer and a controller on a made-up task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import controlprune as cp
from controlprune.loop.history import Record

BATCH = 16
QUICK = cp.Control(observe_every=1, update_every=4, revise_every=3, looks=1.0)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
    )


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual sum, a flatten: 1×4×4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.inner_bn = nn.BatchNorm2d(16)
        self.outer = nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner_bn(self.inner(x))))
        return self.head(torch.flatten(nn.functional.max_pool2d(x, 2), 1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (8,)),
    "residual": (Residual, (1, 4, 4)),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
}


def batch(step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The data of a step, the same whoever asks: the class is the largest of four fixed projections."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, *shape, generator=generator)
    directions = torch.randn(4, x[0].numel(), generator=torch.Generator().manual_seed(10**6))
    return x, (x.flatten(1) @ directions.T).argmax(1)


@dataclass
class Rig:
    """One training run; `train(a, b)` does the steps a + 1 … b of the user's loop."""

    model: nn.Module
    optimizer: Optimizer
    controller: cp.Controller
    shape: tuple[int, ...]
    device: str = "cpu"
    shrink_at: int = 0  # the step after which the user shrinks (these nets are too small for it to pay)

    def train(self, start: int, stop: int) -> Tensor:
        loss = torch.zeros(())
        for step in range(start + 1, stop + 1):
            torch.manual_seed(step)  # for dropout
            x, y = batch(step, self.shape)
            x, y = x.to(self.device), y.to(self.device)
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.controller.step(loss)
            self.optimizer.zero_grad()
            if step == self.shrink_at:
                self.controller.shrink()
        return loss


def rig(
    net: str = "mlp",
    optimizer: str = "adam",
    *,
    budget: cp.Budget | cp.Price | None = None,
    policy: Any = QUICK,
    total_steps: int = 120,
    seed: int = 0,
    shrink_at: int = 0,
    device: str = "cpu",
    park_on: str | None = None,
    instruments: cp.Instruments | None = None,
) -> Rig:
    make, shape = NETS[net]
    torch.manual_seed(seed)
    model = make().to(device)
    made = OPTIMIZERS[optimizer](model)
    controller = cp.attach(
        model,
        made,
        budget=budget or cp.Budget(flops=0.5),
        example_inputs=(torch.zeros(2, *shape, device=device),),
        total_steps=total_steps,
        policy=policy,
        seed=seed,
        park_on=park_on,
        instruments=instruments,
    )
    return Rig(model, made, controller, shape, device, shrink_at)


def bits(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Every bit of a model, its buffers, gradients and flags, and of its optimizer's state."""
    found: dict[str, Any] = {f"state {k}": v.detach().clone() for k, v in model.state_dict().items()}
    found |= {f"buffer {k}": v.detach().clone() for k, v in model.named_buffers()}
    for name, p in model.named_parameters():
        found[f"grad {name}"] = None if p.grad is None else p.grad.clone()
        found[f"trained {name}"] = p.requires_grad
        for key, value in (optimizer.state.get(p, {}) if optimizer is not None else {}).items():
            found[f"optimizer {name} {key}"] = copy.deepcopy(value)
    found |= {f"training {name}": m.training for name, m in model.named_modules()}
    return found


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert value.shape == b[key].shape, key
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def hooks(model: nn.Module, optimizer: Optimizer) -> int:
    """How many hooks hang on a model, its parameters and its optimizer."""
    of_modules = sum(
        len(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("_hooks") and isinstance(value, dict)
    )
    of_parameters = sum(
        len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()
    )
    of_optimizer = sum(len(v) for k, v in vars(optimizer).items() if k.endswith("_hooks"))
    return of_modules + of_parameters + of_optimizer


def flops(model: nn.Module, x: Tensor) -> int:
    """What torch counts for one forward pass in eval mode."""
    mode = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    model.train(mode)
    return counter.get_total_flops()


def timeless(rows: Sequence[Record]) -> list[Record]:
    """Rows of a history without the clock."""
    return [replace(row, seconds=0.0, overhead_seconds=0.0) for row in rows]
