"""Sides of a comparison: same data, same seed, honest counts, a small size that is initialised as small."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from controlprune.app.compare import (
    Side,
    accuracy,
    batches,
    count_flops,
    count_parameters,
    fresh,
    latencies,
    ratio,
    train,
)
from controlprune.app.tasks import mlp, plain_net, residual_net
from controlprune.cost.flops import flops
from controlprune.structure import analyse


def side(seed: int = 0, hidden: int = 16) -> Side:
    torch.manual_seed(seed)
    model = mlp(6, (hidden,))
    x, y = torch.randn(40, 6), torch.randint(10, (40,))
    return Side(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(x, y, 8, seed))


def test_batches_cover_each_epoch_once_in_an_order_fixed_by_the_seed() -> None:
    x, y = torch.arange(10.0), torch.arange(10)
    first, second, other = (batches(x, y, 3, seed) for seed in (0, 0, 1))
    epoch = [next(first)[1].tolist() for _ in range(3)]
    assert epoch == [next(second)[1].tolist() for _ in range(3)]
    assert epoch != [next(other)[1].tolist() for _ in range(3)]
    assert len({label for batch in epoch for label in batch}) == 9, "whole batches only, none twice"


def test_sides_take_turns_and_do_not_disturb_each_other() -> None:
    alone, first, second = side(), side(), side(seed=1)
    turns: list[int] = []
    train([alone], 7, chunk=7)
    train([first, second], 7, chunk=3, progress=lambda steps, losses: turns.append(steps))
    assert turns == [3, 3, 1]
    assert first.steps == second.steps == 7
    assert len(first.chunks) == 3
    pairs = zip(alone.model.parameters(), first.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    first.chunks, second.chunks = [1.0, 2.0, 99.0], [2.0, 4.0]
    assert ratio(first, second) == 0.5, "only the turns both took count"


def test_what_a_side_does_after_each_step_sees_the_loss() -> None:
    run, losses = side(), []
    run.after = lambda loss: losses.append(loss.item())
    mean = run.advance(5)
    assert len(losses) == 5
    assert mean == pytest.approx(sum(losses) / 5)


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        (partial(mlp, 64, (32, 16)), (2, 64)),
        (partial(residual_net, 1, 8), (2, 1, 8, 8)),
        (partial(plain_net, 3, (8, 8, 8, 8)), (2, 3, 16, 16)),
    ],
)
def test_the_fresh_small_size_has_its_widths_flops_and_fan_in(
    factory: partial[nn.Module], shape: tuple
) -> None:
    inputs = torch.randn(shape)
    structure = analyse(factory(), (inputs,))
    widths = [max(1, n // 4) for n in structure.sizes]
    small = fresh(factory, structure, widths, seed=3)
    assert count_flops(small, inputs) == flops(structure).value(widths)
    again = fresh(factory, structure, widths, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    for module in small.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.numel() >= 200:
            bound = 1 / math.sqrt(module.weight[0].numel())  # torch's initialisation at this fan-in
            assert 0.8 * bound < module.weight.abs().max() <= bound


def test_a_small_size_at_full_width_is_as_large_as_dense() -> None:
    factory = partial(mlp, 6, (16,))
    structure = analyse(factory(), (torch.randn(2, 6),))
    assert count_parameters(fresh(factory, structure, structure.sizes, 0)) == count_parameters(factory())


def test_measuring_changes_nothing_of_the_model() -> None:
    model = residual_net(1, 8)
    model.train()
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.randn(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)
    assert 0 <= accuracy(model, x, y, batch=2) <= 1
    count_flops(model, x)
    assert all(seconds > 0 for seconds in latencies([model, model], x, rounds=2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model[0].training


def test_accuracy_counts_the_last_short_batch() -> None:
    x = torch.eye(10)[[0, 1, 2, 3, 4]]
    assert accuracy(nn.Identity(), x, torch.tensor([0, 1, 2, 9, 9]), batch=2) == pytest.approx(0.6)


def test_flops_are_two_per_multiply_add() -> None:
    assert count_flops(nn.Linear(3, 5), torch.randn(7, 3)) == 2 * 7 * 3 * 5
