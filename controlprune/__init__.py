"""controlprune: online pruning by feedback control."""

from .app.plots import plot
from .budget import Budget, InfeasibleBudget, Price
from .cost.energy_meter import Wattage
from .cost.instruments import Instruments
from .integrations.pretrained import from_pretrained, save_pretrained
from .loop.attach import attach
from .loop.controller import Controller
from .loop.export import load, save
from .loop.history import History
from .policies.feedback.control import Control
from .state.packed import Packed
from .state.version import __version__
from .structure import find_groups
from .structure.traced import Traced, trace

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
    "from_pretrained",
    "load",
    "plot",
    "save",
    "save_pretrained",
    "trace",
]
