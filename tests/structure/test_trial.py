"""One joint mask tried: passes use memory again, and what an earlier pass gave is not written over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlprune.structure import analyse
from controlprune.structure.trial import Trial


class Net(nn.Module):
    """`tells`: it also gives an entry of the weight that reads the units, as a view."""

    def __init__(self, tells: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.tells = nn.Linear(5, 64), nn.Linear(64, 64), tells

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.second(self.first(x).relu())
        return (y, self.second.weight[0, :1]) if self.tells else (y,)


class Fresh(TorchDispatchMode):
    """Inside, how large the largest tensor was that got memory of its own."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.data_ptr() not in known]
        self.largest = max([self.largest, *(x.numel() for x in made)])
        return result


def test_a_pass_takes_no_memory_for_weights_but_the_first() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 5)
    trial = Trial(model, x, analyse(model, x), seed=0)
    masks = [torch.arange(64) < 40]
    assert trial.run(masks) is None
    with Fresh() as fresh:
        assert trial.run(masks) is None
    assert fresh.largest <= 40 * 64  # the live part, as it is taken out


def test_an_output_that_is_a_weight_is_not_written_over() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 5)
    structure = analyse(model, x)
    model.tells = True  # position 0 of what is masked, the first live one of what is shrunk
    failure = Trial(model, x, structure, seed=0).run([torch.arange(64) > 0])
    assert failure is not None
