"""controlprune: online pruning by feedback control."""

from .attach import attach
from .budget import Budget, InfeasibleBudget, Price
from .controller import Controller
from .export import load, save
from .history import History
from .instruments import Instruments
from .meters import Wattage
from .packed import Packed
from .plots import plot
from .policies.control import Control
from .structure import find_groups
from .traced import Traced, trace
from .version import __version__

__all__ = [
    "Budget",
    "Control",
    "Controller",
    "History",
    "InfeasibleBudget",
    "Instruments",
    "Packed",
    "Price",
    "Traced",
    "Wattage",
    "__version__",
    "attach",
    "find_groups",
    "load",
    "plot",
    "save",
    "trace",
]
