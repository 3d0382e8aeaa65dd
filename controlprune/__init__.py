"""controlprune: online pruning by feedback control."""
from .version import __version__

__all__ = ["__version__"]
