"""N:M: at most N of every M weights in a row along the dimension that is contracted (Mishra et al. 2021,
arXiv 2104.08378, for 2:4).

    project     of a mask with n of |w| weights on, j = ⌈n M / |w|⌉ of every M: those that are on in it first,
                of equals those of largest |w|

so by magnitude (`cp.Magnitude`, `cp.Gradual`) it is the j largest of every M, exactly. A layer is at N/M or
dense, nothing between: under a budget that all layers at N/M would more than meet, some stay dense.
Everything else is as for single weights, and so is what is finalized: zeros in the pattern. They are skipped
by kernels for semi-structured tensors, which some GPUs have for 2:4
(`torch.sparse.to_sparse_semi_structured`), and by nothing on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..plant.entries import EntryPlant
from ..plant.masks import Masks
from ..structure.groups import Group, Structure
from .weights import Weights

__all__ = ["NofM"]


class NofM(Weights):
    """granularity="N:M"."""

    def __init__(self, n: int, m: int) -> None:
        if not 1 <= n < m:
            raise ValueError(f'granularity="{n}:{m}": give N:M with 1 <= N < M, such as "2:4"')
        self.n, self.m = n, m

    def __str__(self) -> str:
        return f'"{self.n}:{self.m}"'

    def why_not(self, name: str, shape: torch.Size, model: nn.Module, traced: Structure) -> str:
        return f"its {shape[1]} inputs are no multiple of {self.m}" if shape[1] % self.m else ""

    def group(self, name: str, size: int) -> Group:
        least = self.n * size // self.m
        return Group(name, size, "weight", (), multiple=least, step=size, least=least)

    def laid_on(self, model: nn.Module, optimizer: Optimizer | None, structure: Structure) -> EntryPlant:
        return PatternPlant(model, optimizer, structure, self.m)


class PatternPlant(EntryPlant):
    """Masks with the same number on in every `m` of the second dimension."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, structure: Structure, m: int) -> None:
        super().__init__(model, optimizer, structure)
        self.m = m

    @torch.no_grad()
    def project(self, masks: Masks) -> Masks:
        weights = [place.parameter.detach() for place in self._places]
        return tuple(nearest(mask, w, self.m) for mask, w in zip(masks, weights, strict=True))

    def apply(self, masks: Sequence[Tensor], *, compact: bool) -> None:
        for mask, near, name in zip(masks, self.project(tuple(masks)), self.structure.names, strict=False):
            if not torch.equal(mask.cpu(), near):
                raise ValueError(
                    f"masks: {name!r} has not the same number on in every {self.m} weights of a row"
                )
        super().apply(masks, compact=compact)


def nearest(mask: Tensor, weights: Tensor, m: int) -> Tensor:
    """The mask (flat) with the same number on in every `m` along dimension 1 that is nearest to `mask`."""
    if bool(mask.all()):
        return mask
    rows = mask.view(weights.shape).transpose(1, -1)
    size = weights.detach().abs().float().cpu().transpose(1, -1).reshape(-1, m)
    on = rows.reshape(-1, m)
    each = -(-int(mask.sum()) * m // mask.numel())
    score = size / size.max().clamp_min(1e-30) + 2.0 * on
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :each]
    found = torch.zeros_like(on).scatter_(1, order, True)
    return found.view(rows.shape).transpose(1, -1).reshape(-1)
