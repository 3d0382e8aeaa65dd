"""Experiments on the last batch: what the gate controller learns from, beyond the gradients it is given.

- **Ablations**: a few units switched for one forward pass each, the loss as it would have been
  (saliency/last_batch.py) against the loss as it is, on the same batch with the same random numbers. In
  units of the loss.
- **Probes**: gate gradients of units that are physically absent (saliency/probe.py), at the scale at which
  the optimizer saw the others: what the user did to the gradients since the loss (unscaling, clipping) is
  the least-squares ratio of the two over the units that are there, ⟨seen, probed⟩ / ⟨probed, probed⟩. A
  loss known by its gradient alone (saliency/last_batch.py, the local metric) is brought to scale likewise.

Replicas carry out the same experiments, each on its own batch; `total` adds up over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plant.plant import Plant
from .ablate import switched
from .last_batch import LOCAL, Batch, identify, paired_difference
from .network import Experiment
from .probe import probe

__all__ = ["Trial", "ablations", "absent_gradients"]

Total = Callable[[Tensor], Tensor]


def ablations(
    plant: Plant, batch: Batch, loss: float, trials: Sequence[Trial], seen: Tensor | None, total: Total
) -> list[Experiment]:
    """Carry the trials out; those whose loss is not finite are left out. `loss`: of this very batch."""
    name, rows = identify(batch, loss)
    if seen is not None and float(total(torch.tensor([float(name == LOCAL)]))) > 0:  # on any of the replicas
        probed = _mean(probe(plant, batch).cpu(), total)
        _, rows = identify(batch, loss, _scale(seen, probed, plant.masks))
    changes = [switched(plant, t.group, t.units, off=t.off) for t in trials]
    found = paired_difference(plant.model, batch, rows, changes, total)
    offsets = [sum(plant.structure.sizes[:g]) for g in range(len(plant.masks))]
    return [
        Experiment(t.units + offsets[t.group], t.off, change, error)
        for t, (change, error) in zip(trials, found, strict=True)
        if math.isfinite(change)
    ]


def absent_gradients(plant: Plant, batch: Batch, seen: Tensor | None, total: Total) -> Tensor:
    """Gate gradients over all units, NaN for those that are live; `seen`: the row of this step."""
    live = torch.cat(plant.masks)
    gradients = _mean(probe(plant, batch).cpu(), total)
    if seen is not None:
        gradients = gradients * _ratio(seen[live], gradients[live])
    return gradients.masked_fill(live, math.nan)


def _mean(values: Tensor, total: Total) -> Tensor:
    """Over replicas, in the dtype of `values`."""
    summed = total(torch.cat([values, torch.ones(1)]))
    return (summed[:-1] / summed[-1]).to(values.dtype)


def _scale(seen: Tensor, probed: Tensor, masks: Sequence[Tensor]) -> float:
    """What a GradScaler's unscaling was: a power of two, so dropout's noise in the ratio does not matter."""
    live = torch.cat(tuple(masks))
    return 2.0 ** round(math.log2(_ratio(seen[live], probed[live])))


def _ratio(seen: Tensor, probed: Tensor) -> float:
    scale = float((seen * probed).sum() / (probed * probed).sum().clamp_min(1e-30))
    return scale if math.isfinite(scale) and scale > 0 else 1.0


@dataclass(frozen=True)
class Trial:
    """A paired ablation to carry out: switch these units of one group, measure the loss."""

    group: int
    units: Tensor  # positions within the group
    off: bool
