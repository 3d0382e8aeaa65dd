"""Switching units for a moment is the same as masks that have them switched, and is undone exactly."""

from __future__ import annotations

import pytest
import torch
from rig import Rig, assert_same_bits, batch, bits, rig
from torch import Tensor

from controlprune.saliency.ablate import switched


def cut(net: str, compact: bool) -> Rig:
    run = rig(net)
    run.controller.set_masks({g.name: torch.arange(g.size) % 3 > 0 for g in run.controller.groups})
    if compact:
        run.controller.shrink()
    run.model.eval()
    return run


def output(run: Rig) -> Tensor:
    with torch.no_grad():
        return run.model(batch(0, run.shape)[0])


@pytest.mark.parametrize(("compact", "off"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_it_is_what_the_masks_would_do(net: str, group: int, compact: bool, off: bool) -> None:
    run = cut(net, compact)
    plant, name = run.controller.plant, run.controller.groups[group].name
    units = torch.tensor([1, 4, 7] if off else [0, 3])
    before = bits(run.model, run.optimizer)
    with switched(plant, group, units, off=off):
        now = output(run)
    assert_same_bits(before, bits(run.model, run.optimizer))
    mask = run.controller.masks[name]
    mask[units] = not off
    base = output(run)
    run.controller.set_masks({name: mask})
    torch.testing.assert_close(now, output(run))
    assert (now - base).abs().max() > 1e-4


def test_it_is_undone_after_an_error() -> None:
    run = cut("mlp", False)
    before = bits(run.model, run.optimizer)
    with pytest.raises(KeyError), switched(run.controller.plant, 0, torch.tensor([1]), off=True):
        raise KeyError
    assert_same_bits(before, bits(run.model, run.optimizer))
