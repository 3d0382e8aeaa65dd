"""State-space models: exact values of states, truncation with a bound, layers that can be truncated."""

from .balanced import balanced_truncation, error_bound, hankel_singular_values
from .gramians import gramians
from .hankel_norm import hankel_norm
from .layer import StateSpace, state_space_layers
from .lru import LRU, Bidirectional
from .s4d import S4D
from .scan import linear_scan
from .selective import Selective
from .snapshot import Snapshot
from .truncate import Cut, states_kept_by, states_of, truncate, values_of
from .truncation import Record, Truncation

__all__ = [
    "LRU",
    "S4D",
    "Bidirectional",
    "Cut",
    "Record",
    "Selective",
    "Snapshot",
    "StateSpace",
    "Truncation",
    "balanced_truncation",
    "error_bound",
    "gramians",
    "hankel_norm",
    "hankel_singular_values",
    "linear_scan",
    "state_space_layers",
    "states_kept_by",
    "states_of",
    "truncate",
    "values_of",
]
