"""`attach(granularity=…)`, read once.

"channel"      channels, neurons, heads, experts                   (channels.py)
"channel+head_dim": and columns of queries and keys    (channels.py)
"weight"       single weights                                      (weights.py)
"state"        states of state-space layers                        (states.py)
"layer"        whole residual branches, "channel+layer": and channels   (layers.py)
{module: …}    several at once                                     (several.py)
"N:M"          N of every M weights along a row                    (n_m.py)
"block:RxC"    tiles of R × C weights                              (blocks.py)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .base import Granularity
from .blocks import Blocks
from .channels import Channels
from .layers import Layers
from .n_m import NofM
from .several import Several
from .states import States
from .weights import Weights

__all__ = ["granularity_of"]

NAMED = {"channel": Channels, "weight": Weights, "state": States, "layer": Layers}
PATTERNS = '"2:4" (any N:M), "block:64x32" (any RxC)'
PAIRS = '"channel+layer"', '"channel+head_dim"'
KNOWN = ", ".join([*(f'"{name}"' for name in NAMED), *PAIRS, PATTERNS, "or a dict"])


def granularity_of(given: object) -> Granularity:
    """What was asked for; ValueError or TypeError if it is nothing known."""
    if isinstance(given, Granularity):
        return given
    if isinstance(given, str):
        if given in NAMED:
            return NAMED[given]()
        if given == "channel+head_dim":
            return Channels(head_dim=True)
        if given == "channel+layer":
            return Layers(channels=True)
        if found := re.fullmatch(r"(\d+):(\d+)", given):
            return NofM(*map(int, found.groups()))
        if found := re.fullmatch(r"block:(\d+)x(\d+)", given):
            return Blocks(*map(int, found.groups()))
        raise ValueError(f"granularity={given!r}: give one of {KNOWN}")
    if isinstance(given, Mapping) and given:
        for key, value in given.items():
            if not isinstance(key, (nn.Module, str)):
                raise TypeError(f"granularity: {key!r} is no module, nor the name of one")
            if isinstance(value, Mapping):
                raise TypeError(f"granularity: {key!r} has a mapping in the mapping; name the inner modules")
        return Several({key: granularity_of(value) for key, value in given.items()})
    raise TypeError(f"granularity={given!r}: give one of {KNOWN}")
