"""Attach keeps a copy of the weights while it finds out whether a forward writes them, and no longer."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from controlprune.structure import analyse
from controlprune.structure.untouched import Memory
from controlprune.structure.verify import _Check


class Clipped(nn.Sequential):
    """Writes its last layer in every forward (`eval`), or in those of training."""

    def __init__(self, when: str) -> None:
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "eval" or (self.when == "train" and self.training):
            self[2].weight.data.clamp_(-0.01, 0.01)
        return super().forward(x)


@pytest.mark.parametrize("when", ["never", "eval", "train"])
def test_only_what_a_forward_writes_is_kept_while_masks_are_tried(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Memory]] = []
    init = Memory.__init__

    def remembered(self: Memory, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        made.append(weakref.ref(self))

    held: list[list[int]] = []
    run = _Check.run

    def looked(self: _Check) -> None:
        memory = made[0]()
        assert memory is not None
        held.append([n for n, p in enumerate(model.parameters()) if memory.copies.get(id(p))])
        run(self)

    monkeypatch.setattr(Memory, "__init__", remembered)
    monkeypatch.setattr(_Check, "run", looked)
    model = Clipped(when)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure = analyse(model, (torch.randn(2, 4),))
    assert held == [[] if when == "never" else [2]]
    assert structure.verified
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
