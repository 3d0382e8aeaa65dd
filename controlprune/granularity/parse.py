"""`attach(granularity=…)`, read once.

"channel"      channels, neurons, heads, experts                   (channels.py)
"weight"       single weights                                      (weights.py)
"state"        states of state-space layers                        (states.py)
"""

from __future__ import annotations

from .base import Granularity
from .channels import Channels
from .states import States
from .weights import Weights

__all__ = ["granularity_of"]

NAMED = {"channel": Channels, "weight": Weights, "state": States}
KNOWN = ", ".join(f'"{name}"' for name in NAMED)


def granularity_of(given: object) -> Granularity:
    """What was asked for; ValueError or TypeError if it is nothing known."""
    if isinstance(given, Granularity):
        return given
    if isinstance(given, str):
        if given in NAMED:
            return NAMED[given]()
        raise ValueError(f"granularity={given!r}: give one of {KNOWN}")
    raise TypeError(f"granularity={given!r}: give one of {KNOWN}")
