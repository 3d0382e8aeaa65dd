"""A structure as plain JSON values, and back with every claim it makes checked.

A file may say anything. What comes back here is a `Structure` whose terms hold together:

    Units(g, N)     g is a group of it, N its size
    slices          stand at dimensions of its tensors, with the extent that is there
    groups          have names of their own, a reader each

and nothing was allocated by sizes that a file claims. `misfit` then says where it is not that of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .extents import Concat, Extent, Fixed, Product, Units, Window, size
from .groups import Branch, Group, SizeAttribute, Slice, Structure
from .sizes import get_size

__all__ = ["masks_from_json", "masks_to_json", "misfit", "structure_from_json", "structure_to_json"]


def structure_to_json(structure: Structure) -> dict[str, Any]:
    """Which part of a dimension reads is not said: a file holds the compact layout alone."""
    return {
        "groups": [
            {
                "name": g.name,
                "size": g.size,
                "kind": g.kind,
                **({"optional": True} if g.optional else {}),
                "slices": [
                    [s.tensor, s.dim, _extent_to_json(structure.tensors[s.tensor][s.dim]), s.role]
                    for s in g.slices
                ],
            }
            for g in structure.groups
        ],
        "tensors": {k: [_extent_to_json(e) for e in v] for k, v in structure.tensors.items()},
        "parameters": sorted(structure.parameters),
        "attributes": [
            [a.module, a.attribute, a.index, _extent_to_json(a.extent)] for a in structure.attributes
        ],
        **({"views": list(structure.views)} if structure.views else {}),
        **({"branches": [_branch_to_json(b) for b in structure.branches]} if structure.branches else {}),
    }


def structure_from_json(value: Any) -> Structure:
    """ValueError, LookupError, TypeError or RecursionError if the value is not one that holds together."""
    groups = tuple(
        Group(
            _text(g["name"]),
            _count(g["size"]),
            _text(g["kind"]),
            tuple(
                Slice(_text(tensor), _count(dim), _extent_from_json(extent), role)
                for tensor, dim, extent, role in g["slices"]
            ),
            optional=g.get("optional") is True,
        )
        for g in value["groups"]
    )
    structure = Structure(
        groups=groups,
        refused=(),
        tensors={k: tuple(_extent_from_json(e) for e in v) for k, v in value["tensors"].items()},
        parameters=frozenset(value["parameters"]),
        attributes=tuple(
            SizeAttribute(_text(m), _text(a), None if i is None else _count(i), _extent_from_json(e))
            for m, a, i, e in value["attributes"]
        ),
        work=(),
        views=tuple(map(_text, value.get("views", ()))),
        branches=tuple(_branch_from_json(b) for b in value.get("branches", ())),
    )
    _require_consistent(structure)
    return structure


def masks_to_json(structure: Structure, masks: Sequence[Tensor]) -> dict[str, list[int]]:
    """Group name -> its active units, in order."""
    return {
        name: torch.nonzero(mask).flatten().tolist()
        for name, mask in zip(structure.names, masks, strict=True)
    }


def masks_from_json(structure: Structure, value: Any) -> list[Tensor]:
    if set(value) != set(structure.names):
        raise ValueError(f"masks of the groups {sorted(value)[:3]}, not {list(structure.names)[:3]}")
    return [_mask(group, value[group.name]) for group in structure.groups]


def misfit(structure: Structure, model: nn.Module) -> str:
    """What of a dense model is not as the structure says; "" if everything is."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, extents in structure.tensors.items():
        expected = tuple(size(extent) for extent in extents)
        if name not in own:
            return f"it has no tensor {name!r}"
        if tuple(own[name].shape) != expected:
            return f"{name!r} has shape {tuple(own[name].shape)}, not the dense one {expected}"
        if (name in parameters) != (name in structure.parameters):
            return f"{name!r} is {'a parameter' if name in parameters else 'a buffer'} of it"
    if extra := sorted(own.keys() - structure.tensors.keys()):
        return f"it has a tensor {extra[0]!r} more"
    for name in (*structure.views, *(n for b in structure.branches for n in b.returns)):
        if name not in modules:
            return f"it has no module {name!r}"
    for entry in structure.attributes:
        where = f"{entry.module}.{entry.attribute}"
        try:
            found = get_size(modules, entry)
        except (KeyError, AttributeError, IndexError, TypeError):
            return f"it has no attribute {where}"
        if type(found) is not int or found != size(entry.extent):
            return f"its {where} is {found!r}, not {size(entry.extent)}"
    return ""


def _mask(group: Group, active: Any) -> Tensor:
    units = [_count(unit) for unit in active]
    if not (units or group.optional) or units != sorted(set(units)) or max(units, default=0) >= group.size:
        raise ValueError(f"active units of {group.name!r}: not some of its {group.size} in order")
    mask = torch.zeros(group.size, dtype=torch.bool)
    mask[torch.tensor(units, dtype=torch.long)] = True
    return mask


def _require_consistent(structure: Structure) -> None:
    names = structure.names
    if len(set(names)) != len(names):
        raise ValueError(f"group names {list(names)[:3]}: one twice")
    if not structure.parameters <= structure.tensors.keys():
        raise ValueError("a parameter that is none of the tensors")
    terms = [
        *(extent for extents in structure.tensors.values() for extent in extents),
        *(entry.extent for entry in structure.attributes),
    ]
    for units in (u for term in terms for u in _units(term)):
        if not (units.group < len(names) and units.length == structure.groups[units.group].size):
            raise ValueError(f"{units} is none of its groups")
    if any(b.group >= len(names) for b in structure.branches):
        raise ValueError("a branch of none of its groups")
    for group in structure.groups:
        for part in group.slices:
            if part.role not in ("reader", "producer"):
                raise ValueError(f"{part.role!r} is no role")
            if structure.tensors[part.tensor][part.dim] != part.extent:
                raise ValueError(f"{group.name!r}: {part.tensor!r} has not the extent of its slice")
        if group.size < 1 or not group.readers:
            raise ValueError(f"{group.name!r} has no units, or nothing reads them")


def _branch_to_json(branch: Branch) -> list[Any]:
    told = [branch.group, branch.ends, list(branch.passes), dict(branch.returns)]
    return [*told, True] if branch.stays else told


def _branch_from_json(value: Any) -> Branch:
    group, ends, passes, returns, *stays = value
    found = {_text(name): _count(n) for name, n in returns.items()}
    if found.keys() != {ends, *passes}:
        raise ValueError(f"branch {ends!r}: it does not say what all of its modules return")
    return Branch(_count(group), _text(ends), tuple(map(_text, passes)), found, stays=bool(stays))


def _units(extent: Extent) -> Iterator[Units]:
    match extent:
        case Units():
            yield extent
        case Product(terms) | Concat(terms):
            for term in terms:
                yield from _units(term)
        case _:
            return


def _extent_to_json(extent: Extent) -> Any:
    match extent:
        case Fixed(length):
            return length
        case Units(group, length):
            return {"units": [group, length]}
        case Product(factors):
            return {"product": [_extent_to_json(x) for x in factors]}
        case Concat(parts):
            return {"concat": [_extent_to_json(x) for x in parts]}
        case Window():
            raise ValueError("a window of a sharded dimension is not saved")


def _extent_from_json(value: Any) -> Extent:
    if not isinstance(value, Mapping):
        return Fixed(_count(value))
    ((kind, inner),) = value.items()
    if kind == "units":
        group, length = inner
        return Units(_count(group), _count(length))
    if kind not in ("product", "concat"):
        raise ValueError(f"{kind!r} is no extent")
    terms = tuple(_extent_from_json(term) for term in inner)
    return Product(terms) if kind == "product" else Concat(terms)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value
