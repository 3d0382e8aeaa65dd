"""A pretrained network cut while it is fine-tuned: what stays is what the new task needs, not what is large.

Pretrained on pairs of digits, to name both; fine-tuned to name the left one only, from few pairs. Half of the
hidden units then serve what nobody asks for any more, and their weights are as large as the others'.
"""

from __future__ import annotations

from functools import cache
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import controlprune as cp
from controlprune.app.compare import accuracy
from controlprune.app.tasks import load

STEPS, BATCH, BUDGET = 160, 32, 0.2
SEEDS = range(3)


def _pairs(rows: tuple[Tensor, Tensor], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two digits side by side, and both their labels."""
    x, y = rows
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.randint(len(x), (2, count), generator=generator)
    return torch.cat([x[i].flatten(1), x[j].flatten(1)], 1), torch.stack([y[i], y[j]], 1)


def _net(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, outputs)
    )


@cache
def _pretrained() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = _net(20)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    x, y = _pairs(load("digits").train, 20_000, 0)
    for rows in torch.arange(len(x)).split(64):
        out = model(x[rows])
        (cross_entropy(out[:, :10], y[rows, 0]) + cross_entropy(out[:, 10:], y[rows, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value for name, value in model.state_dict().items() if not name.startswith("4.")}


def _tuned(seed: int, *, pretrained: bool = True, policy: cp.Policy | None = None) -> float:
    """Accuracy in per cent after fine-tuning under the budget; a blank net is cut before."""
    torch.manual_seed(seed)
    model = _net(10)
    if pretrained:
        model.load_state_dict(_pretrained(), strict=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = _pairs(load("digits").train, 1500, seed)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=BUDGET), example_inputs=(x[:8],), total_steps=STEPS,
        policy=policy,
    )  # fmt: skip
    if not pretrained:
        _cut_at_once(controller, model)
        controller = None
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        loss = cross_entropy(model(x[rows]), y[rows, 0])
        loss.backward()
        optimizer.step()
        if controller is not None:
            controller.step(loss)
        optimizer.zero_grad()
    if controller is not None:
        controller.finalize()
    held_out, labels = _pairs(load("digits").test, 2000, 1)
    return 100 * accuracy(model, held_out, labels[:, 0])


def _cut_at_once(controller: cp.Controller, model: nn.Sequential) -> None:
    """A common fraction of both layers, inside the budget, for good."""
    masks = {}
    for group, reader, width in zip(controller.groups, (model[2], model[4]), (48, 24), strict=True):
        assert isinstance(reader, nn.Linear)
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[reader.weight.norm(dim=0).topk(width).indices] = True
        masks[group.name] = mask
    controller.set_masks(masks)
    controller.finalize()


def test_the_default_keeps_of_a_pretrained_net_what_the_new_task_needs() -> None:
    default = [_tuned(seed) for seed in SEEDS]
    by_norm = [_tuned(seed, policy=cp.Control(value=lambda known: known.weight)) for seed in SEEDS]
    blank = [_tuned(seed, pretrained=False) for seed in SEEDS]
    assert mean(default) > mean(by_norm) + 2.0  # 89.9 and 85.0: the same plan, only the order differs
    assert mean(default) > mean(blank) + 2.0
