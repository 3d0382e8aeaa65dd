"""State-space models: exact values of states, truncation with a bound, layers that can be truncated."""

from .balanced import balanced_truncation, error_bound, hankel_singular_values
from .gramians import gramians

__all__ = ["balanced_truncation", "error_bound", "gramians", "hankel_singular_values"]
