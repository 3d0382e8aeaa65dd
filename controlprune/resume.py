"""What a controller's `state_dict` is made of, and whether a given one may be loaded here.

Nothing is changed by anything in this file: a state that does not fit is refused with the reason, before
model, optimizer or controller are touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .budget import Budget, Price
from .structure.groups import Structure

__all__ = ["FORMAT", "budget_of", "plain_budget", "require_state"]

FORMAT = 3
PARTS = ("plant", "loop", "history", "accounts", "layouts", "survey")
NEEDED = ("policy", *PARTS, "budget", "counts", "unread", "loss", "seconds")


def require_state(state: object, structure: Structure, policy: str) -> None:
    """ValueError unless it is the whole state of a controller of this model under this policy."""
    if not isinstance(state, Mapping) or "format" not in state or "groups" not in state:
        raise ValueError("state_dict: this is not a controller's state_dict")
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise ValueError(
            f"state_dict: format {state['format']} was written by a newer controlprune; this one reads "
            f"{FORMAT}: update the package"
        )
    if state["groups"] != dict(zip(structure.names, structure.sizes, strict=True)):
        raise ValueError("state_dict: its groups are not this model's; it belongs to another model")
    missing = [key for key in NEEDED if key not in state]
    if missing:
        raise ValueError(f"state_dict: it is incomplete, {', '.join(missing)} missing")
    if state["policy"] != policy:
        raise ValueError(
            f"state_dict: it was saved under the policy {state['policy']}, this controller's is {policy}; "
            "attach with the same one"
        )


def plain_budget(budget: Budget | Price) -> dict[str, Any]:
    """As plain values."""
    values = {field.name: getattr(budget, field.name) for field in fields(budget)}
    return {"kind": type(budget).__name__} | {k: v for k, v in values.items() if v is not None}


def budget_of(given: Mapping[str, Any]) -> Budget | Price:
    values = {k: v for k, v in given.items() if k != "kind"}
    return {"Budget": Budget, "Price": Price}[given["kind"]](**values)
