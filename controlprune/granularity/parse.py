"""`attach(granularity=…)`, read once.

"channel"      channels, neurons, heads, experts                   (channels.py)
"weight"       single weights                                      (weights.py)
"""

from __future__ import annotations

from .base import Granularity
from .channels import Channels
from .weights import Weights

__all__ = ["granularity_of"]

KNOWN = '"channel", "weight"'


def granularity_of(given: object) -> Granularity:
    """What was asked for; ValueError or TypeError if it is nothing known."""
    if isinstance(given, Granularity):
        return given
    if isinstance(given, str):
        if given == "channel":
            return Channels()
        if given == "weight":
            return Weights()
        raise ValueError(f"granularity={given!r}: give one of {KNOWN}")
    raise TypeError(f"granularity={given!r}: give one of {KNOWN}")
