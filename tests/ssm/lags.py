"""Runs with state-space layers: by how many steps does the second channel follow the first?"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode

import controlprune as cp

GRADUAL = cp.Plan(earliest=0.1, latest=0.15, duration=0.3, deadline=0.5)
QUICK = cp.Control(plan=GRADUAL, stages=6, observe_every=1, update_every=4)


def batch(step: int, rank: int = 0, size: int = 16, length: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    lag = torch.randint(3, (size,), generator=generator)
    first = torch.randn(size, length, generator=generator)
    second = torch.stack([row.roll(int(k)) for row, k in zip(first, lag, strict=True)])
    return torch.stack([first, second], 2), lag


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch(0)[0])
    return counter.get_total_flops()


class Run:
    """A training run; `train(a, b)` does the steps a + 1 … b. Of one rank, where one is given."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        steps: int,
        *,
        seed: int = 0,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.rank = make(), rank
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-3)
        self.forward = self.model if rank is None else DDP(self.model)
        given = {"budget": cp.Budget(flops=0.5), "example_inputs": (batch(0)[0],), "policy": QUICK, **options}
        self.controller = cp.attach(self.model, self.optimizer, total_steps=steps, **given)

    def train(self, start: int, stop: int) -> Run:
        for step in range(start + 1, stop + 1):
            u, y = batch(step, self.rank or 0)
            loss = cross_entropy(self.forward(u), y)
            loss.backward()
            self.optimizer.step()
            self.controller.step(loss)
            self.optimizer.zero_grad()
        return self

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save({n: getattr(self, n).state_dict() for n in ("model", "optimizer", "controller")}, file)
        return file.getvalue()

    def load(self, content: bytes, order: Sequence[str]) -> Run:
        states = torch.load(io.BytesIO(content), weights_only=True)
        for name in order:
            getattr(self, name).load_state_dict(states[name])
        return self


def assert_ranks_are_alike(run: Run) -> None:
    for parameter in run.model.parameters():
        others = [torch.empty_like(parameter) for _ in range(2)]
        torch.distributed.all_gather(others, parameter.detach())
        assert torch.equal(*others)
    assert run.controller._run.replicas.repairs == 0
