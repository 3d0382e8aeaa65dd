"""controlprune: online pruning by feedback control."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .budget import Budget, InfeasibleBudget, Price, Resource
from .control.horizon import Horizon
from .control.ramp import Plan
from .control.scale import Observer
from .cost.energy_meter import Wattage
from .cost.instruments import Instruments
from .cost.measurement import Measurement
from .cost.problem import Problem
from .loop.attach import attach
from .loop.controller import Controller
from .loop.export import load, save
from .loop.history import History
from .loop.teacher import ancestor, distillation
from .policies.base import Decision, Observation, Policy, Wants
from .policies.feedback.control import Control
from .policies.gradual import Gradual
from .policies.magnitude import Magnitude
from .policies.rigl import RigL
from .policies.rotate import Rotation
from .policies.set import SET
from .policies.static import Static
from .price.pi import PI
from .saliency.network import Statistics
from .state.packed import Packed
from .state.version import __version__
from .structure import find_groups
from .structure.rules.table import operator_rule
from .structure.traced import Traced, trace

if TYPE_CHECKING:
    from .app.plots import plot
    from .integrations.pretrained import from_pretrained, save_pretrained

__all__ = [
    "PI",
    "SET",
    "Budget",
    "Control",
    "Controller",
    "Decision",
    "Gradual",
    "History",
    "Horizon",
    "InfeasibleBudget",
    "Instruments",
    "Magnitude",
    "Measurement",
    "Observation",
    "Observer",
    "Packed",
    "Plan",
    "Policy",
    "Price",
    "Problem",
    "Resource",
    "RigL",
    "Rotation",
    "Static",
    "Statistics",
    "Traced",
    "Wants",
    "Wattage",
    "__version__",
    "ancestor",
    "attach",
    "distillation",
    "find_groups",
    "from_pretrained",
    "load",
    "operator_rule",
    "plot",
    "save",
    "save_pretrained",
    "trace",
]

LATER = {  # imported when used: what they need takes longer to import than all the rest
    "plot": "app.plots",
    "from_pretrained": "integrations.pretrained",
    "save_pretrained": "integrations.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module 'controlprune' has no attribute {name!r}")
    return getattr(import_module(f".{LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
