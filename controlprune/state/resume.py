"""What a controller's `state_dict` is made of, and whether a given one may be loaded here.

Nothing is changed by anything in this file: a state that does not fit is refused with the reason, before
model, optimizer or controller are touched. A checksum over the rest tells a state that was damaged or changed
on its way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..budget import UNITS, Budget, Price, Resource
from ..structure.groups import Structure
from .checksum import checksum

__all__ = ["FORMAT", "budget_of", "plain_budget", "require_alike", "require_state", "signed"]

FORMAT = 7
PARTS = ("plant", "loop", "history", "accounts", "layouts", "survey")
NEEDED = ("policy", *PARTS, "budget", "counts", "measurements", "intake", "loss", "seconds", "checksum")

KINDS: Mapping[type, tuple[type, ...]] = {float: (float, int), list: (list, tuple), tuple: (list, tuple)}


def signed(state: Mapping[str, Any]) -> dict[str, Any]:
    """With its checksum."""
    rest = {key: value for key, value in state.items() if key != "checksum"}
    return rest | {"checksum": checksum(rest)}


def require_state(state: object, structure: Structure, policy: str) -> None:
    """ValueError unless it is the whole state of a controller of this model under this policy."""
    if not isinstance(state, Mapping) or "format" not in state or "groups" not in state:
        raise ValueError("state_dict: this is not a controller's state_dict")
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise ValueError(
            f"state_dict: format {state['format']} was written by a newer controlprune; this one reads "
            f"{FORMAT}: update the package"
        )
    missing = [key for key in NEEDED if key not in state]
    if missing:
        raise ValueError(f"state_dict: it is incomplete, {', '.join(missing)} missing")
    if state["checksum"] != signed(state)["checksum"]:
        raise ValueError(
            "state_dict: it is corrupt: its checksum does not match, so it was damaged or changed after it "
            "was saved; load one that is whole"
        )
    if not _same_groups(state["groups"], structure):
        raise ValueError("state_dict: its groups are not this model's; it belongs to another model")
    if state["policy"] != policy:
        raise ValueError(
            f"state_dict: it was saved under the policy {state['policy']}, this controller's is {policy}; "
            "attach with the same one"
        )


def _same_groups(groups: object, structure: Structure) -> bool:
    if not isinstance(groups, Mapping) or any(type(n) is not int for n in groups.values()):
        return False
    return groups == dict(zip(structure.names, structure.sizes, strict=True))


def require_alike(blank: Any, saved: Any, where: str = "") -> None:
    """ValueError unless `saved` is built like `blank`, the state of something that has just begun.

    The same entries, kinds of numbers and tensors; what is None or empty in `blank` may be anything, and a
    tensor with no rows may have got some.
    """
    if isinstance(blank, Tensor):
        rows = 1 if len(blank.shape) > 1 and len(blank) == 0 else 0
        alike = (
            isinstance(saved, Tensor)
            and saved.dtype == blank.dtype
            and saved.ndim == blank.ndim
            and saved.shape[rows:] == blank.shape[rows:]
        )
        if not alike:
            raise ValueError(f"{where}: not a tensor of {tuple(blank.shape)} {blank.dtype}")
    elif isinstance(blank, Mapping):
        if not isinstance(saved, Mapping) or (blank and saved.keys() != blank.keys()):
            raise ValueError(f"{where}: it has other entries than {list(blank)[:5]}")
        for key, value in blank.items():
            require_alike(value, saved[key], f"{where}/{key}" if where else str(key))
    elif isinstance(blank, (list, tuple)) and blank:
        if not isinstance(saved, (list, tuple)) or len(saved) != len(blank):
            raise ValueError(f"{where}: {saved!r} is no list of {len(blank)}")
        for k, (value, other) in enumerate(zip(blank, saved, strict=True)):
            require_alike(value, other, f"{where}/{k}")
    elif blank is not None:
        kinds = KINDS.get(type(blank), (type(blank),))
        if type(saved) not in kinds or (type(blank) is int and not 0 <= saved < 2**31):
            raise ValueError(f"{where}: {saved!r} is no {type(blank).__name__}")


def plain_budget(budget: Budget | Price) -> dict[str, Any]:
    """As plain values; of resources of the user's own, their names and limits."""
    values = {name: getattr(budget, name, None) for name in UNITS}
    own = {resource.name: limit for resource, limit in budget.own.items()}
    plain = {"kind": type(budget).__name__} | {k: v for k, v in values.items() if v is not None}
    return plain | ({"own": own} if own else {})


def budget_of(given: Mapping[str, Any], known: Mapping[Resource, Any]) -> Budget | Price:
    """The reverse; `known`: the resources of the user's own in the budget that is to be replaced."""
    values = {k: v for k, v in given.items() if k not in ("kind", "own")}
    if given["kind"] == "Price":
        return Price(**values)
    by_name = {resource.name: resource for resource in known}
    return Budget(**values, own={by_name[name]: limit for name, limit in given.get("own", {}).items()})
