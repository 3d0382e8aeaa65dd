"""State-space models: exact values of states, truncation with a bound, layers that can be truncated."""

from .balanced import balanced_truncation, error_bound, hankel_singular_values
from .gramians import gramians
from .layer import StateSpace, state_space_layers
from .lru import LRU, Bidirectional
from .scan import linear_scan
from .snapshot import Snapshot
from .truncate import Cut, truncate, values_of
from .truncation import Record, Truncation, states_of

__all__ = [
    "LRU",
    "Bidirectional",
    "Cut",
    "Record",
    "Snapshot",
    "StateSpace",
    "Truncation",
    "balanced_truncation",
    "error_bound",
    "gramians",
    "hankel_singular_values",
    "linear_scan",
    "state_space_layers",
    "states_of",
    "truncate",
    "values_of",
]
