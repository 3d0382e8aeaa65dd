"""The trace by itself: made of the plain model, before its parameters are sharded (plant/sharded.py) or
moved.

`cp.attach(…, example_inputs=traced)` takes it in place of example inputs. FLOPs and parameters are known from
it alone; what must run the model to be measured (memory, latency, energy) is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..structure import analyse, require_groups
from .groups import Structure
from .record import batch_size
from .surroundings import plainly

__all__ = ["Traced", "trace"]


@dataclass(frozen=True)
class Traced:
    """What one forward pass told: the `structure` of the model; `batch`, the examples it was given."""

    structure: Structure
    batch: int


@plainly
def trace(model: nn.Module, example_inputs: Any, *, ignored_layers: Sequence[nn.Module | str] = ()) -> Traced:
    """Trace `model` on `example_inputs` (a tuple, a dict or a tensor); ValueError if nothing is prunable."""
    structure = analyse(model, example_inputs, ignored_layers=ignored_layers)
    require_groups(structure, type(model).__name__)
    return Traced(structure, batch_size(example_inputs))
