"""Experiments on the last batch: what the gate controller learns from, beyond the gradients it is given.

- **Ablations**: a few units switched for one forward pass each, the loss as it would have been (replay.py)
  against the loss as it is, on the same batch with the same random numbers. In units of the loss.
- **Probes**: gate gradients of units that are physically absent (probe.py), at the scale at which the
  optimizer saw the others: what the user did to the gradients since the loss (unscaling, clipping) is
  the least-squares ratio of the two over the units that are there, ⟨seen, probed⟩ / ⟨probed, probed⟩.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .ablate import switched
from .gates import Experiment
from .masking import Plant
from .policies.base import Trial
from .probe import probe
from .replay import Batch, identify, paired_difference

__all__ = ["ablations", "absent_gradients"]


def ablations(plant: Plant, batch: Batch, loss: float, trials: Sequence[Trial]) -> list[Experiment]:
    """Carry the trials out; those whose loss is not finite are left out."""
    _, rows = identify(batch, loss)
    changes = [switched(plant, t.group, t.units, off=t.off) for t in trials]
    found = paired_difference(plant.model, batch, rows, changes)
    offsets = [sum(plant.structure.sizes[:g]) for g in range(len(plant.masks))]
    return [
        Experiment(t.units + offsets[t.group], t.off, change, error)
        for t, (change, error) in zip(trials, found, strict=True)
        if math.isfinite(change)
    ]


def absent_gradients(plant: Plant, batch: Batch, seen: Tensor | None) -> Tensor:
    """Gate gradients over all units, NaN for those that are live; `seen`: the last row observed."""
    live = torch.cat(plant.masks)
    gradients = probe(plant, batch).cpu()
    if seen is not None:
        gradients = gradients * _ratio(seen[live], gradients[live])
    return gradients.masked_fill(live, math.nan)


def _ratio(seen: Tensor, probed: Tensor) -> float:
    scale = float((seen * probed).sum() / (probed * probed).sum().clamp_min(1e-30))
    return scale if math.isfinite(scale) and scale > 0 else 1.0
