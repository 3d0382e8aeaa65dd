"""Values of single weights: on, by their curvature; off, by whose place they could take.

A gate on a weight w has g = w ∂w, so little that over any window its mean is noise beside its spread, and a
weight that is off stands at zero: to first order nearly all of those would be worth more than any that is on.
So, with n weights of a layer on,

    on      v_i = ½ H_i = ½ B Var(g_i) + …         the Fisher diagonal, w_i² F_i (as in optimal brain damage)
    off     the j-th of largest |mean ∂w|:         v = (1 + EDGE) · the j-th smallest value that is on
            for j ≤ k = ⌊share · n⌋, nothing for the others

and a revision exchanges at most k of them, the least for those that the gradient wants most: RigL's regrowth
(Evci et al. 2020). How many a layer has, the trade-off says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .network import TINY, Statistics

__all__ = ["regrowth"]

EDGE = 0.5  # over the hysteresis of the trade-off, or none would come in


def regrowth(values: Tensor, s: Statistics, groups: Sequence[int], share: float) -> Tensor:
    """`values`, with those of the units of these groups as above."""
    if not groups:
        return values
    found = values.clone()
    ends = torch.bincount(s.group).cumsum(0).tolist()
    for group in groups:
        mine = slice(ends[group - 1] if group else 0, ends[group])
        on, wanted = s.on[mine], s.mean[mine].abs()
        own = torch.where(on, (0.5 * s.curvature[mine]).clamp_min(TINY), TINY)
        k = min(int(share * int(on.sum())), int((~on).sum()))
        if k:
            least = torch.sort(own[on]).values[:k]
            best = torch.topk(wanted.masked_fill(on, -1.0), k).indices
            own[best] = torch.where(wanted[best] > 0, (1.0 + EDGE) * least, TINY)
        found[mine] = own
    return found
