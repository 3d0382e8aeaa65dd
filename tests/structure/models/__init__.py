"""Small models, one per awkward case: what real code does that a layer table would miss."""

from __future__ import annotations

from . import attention, convolutions, experts, forwards, rearranged, recurrent, weights

__all__ = ["CASES"]

CASES = {
    **rearranged.CASES,
    **convolutions.CASES,
    **attention.CASES,
    **recurrent.CASES,
    **weights.CASES,
    **forwards.CASES,
    **experts.CASES,
}
