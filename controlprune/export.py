"""Save and load a compact model: safetensors and JSON, never pickle.

    save(controller, "small.safetensors")          one file: the live tensors, and in its JSON header the
    model = load("small.safetensors", Net())       structure (extents, size attributes) and the masks

`load` takes a dense model of the same class, brings it to the saved widths and fills it: no example
inputs, no trace. A file that was not written here, is newer, or belongs to another model is refused
before the model is touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .controller import Controller, require_unattached
from .copies import compact_copies
from .masking import Plant, checked
from .structure.extents import Concat, Extent, Fixed, Product, Units, size
from .structure.groups import Group, SizeAttribute, Slice, Structure

__all__ = ["load", "save"]

FORMAT = 1


def save(controller: Controller, path: str | Path) -> None:
    """Write the model at its present active units; the training goes on undisturbed."""
    if not isinstance(controller, Controller):
        raise TypeError(f"controller={type(controller).__name__}: give what controlprune.attach returned")
    plant = controller.plant
    tensors = compact_copies(plant)
    header = {
        "format": FORMAT,
        "structure": _structure_to_json(plant.structure),
        "masks": {
            name: [int(i) for i in torch.nonzero(mask).flatten()]
            for name, mask in zip(plant.structure.names, plant.masks, strict=True)
        },
    }
    save_file(tensors, str(path), metadata={"controlprune": json.dumps(header)})


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """`model` (dense, of the class that was saved) at the saved widths with the saved tensors."""
    header, tensors = _read(Path(path))
    require_unattached(model)
    try:
        structure = _structure_from_json(header["structure"])
        masks = checked([_mask(g.size, header["masks"][g.name]) for g in structure.groups], structure)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r}: its header is corrupt ({error!r})") from error
    _check_same(structure, model, path)
    plant = Plant(model, None, structure)
    plant.apply(masks, compact=True)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wrong = [k for k in tensors if k not in own or own[k].shape != tensors[k].shape]
    if wrong or set(own) - set(tensors):
        plant.release()
        raise ValueError(
            f"path={str(path)!r}: {(wrong or sorted(set(own) - set(tensors)))[0]} does not fit the model"
        )
    plant.harden()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return model


def _mask(size: int, active: list[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.tensor(active, dtype=torch.long)] = True
    return mask


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path={str(path)!r}: not a whole safetensors file ({error})") from error
    if "controlprune" not in metadata:
        raise ValueError(f"path={str(path)!r}: a safetensors file, but not one that controlprune.save wrote")
    header = json.loads(metadata["controlprune"])
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise ValueError(f"path={str(path)!r}: its header is corrupt (no format)")
    if header["format"] > FORMAT:
        raise ValueError(f"path={str(path)!r}: written by a newer controlprune (format {header['format']})")
    return header, tensors


def _check_same(structure: Structure, model: nn.Module, path: str | Path) -> None:
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, extents in structure.tensors.items():
        expected = tuple(size(e) for e in extents)
        if name not in own:
            raise ValueError(f"model: it has no tensor {name!r}; {str(path)!r} was saved from another class")
        if tuple(own[name].shape) != expected:
            raise ValueError(
                f"model: {name!r} has shape {tuple(own[name].shape)}, that saved in {str(path)!r} had, dense,"
                f" {expected}; give a dense model of the same configuration"
            )


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


def _extent_from_json(value: Any) -> Extent:
    if isinstance(value, int):
        return Fixed(value)
    ((kind, inner),) = value.items()
    if kind == "units":
        return Units(*inner)
    terms = tuple(_extent_from_json(x) for x in inner)
    return Product(terms) if kind == "product" else Concat(terms)


def _structure_to_json(structure: Structure) -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": g.name,
                "size": g.size,
                "kind": g.kind,
                "slices": [[s.tensor, s.dim, _extent_to_json(s.extent), s.role] for s in g.slices],
            }
            for g in structure.groups
        ],
        "tensors": {k: [_extent_to_json(e) for e in v] for k, v in structure.tensors.items()},
        "parameters": sorted(structure.parameters),
        "attributes": [
            [a.module, a.attribute, a.index, _extent_to_json(a.extent)] for a in structure.attributes
        ],
    }


def _structure_from_json(value: Mapping[str, Any]) -> Structure:
    groups = tuple(
        Group(
            g["name"],
            g["size"],
            g["kind"],
            tuple(
                Slice(tensor, dim, _extent_from_json(extent), role)
                for tensor, dim, extent, role in g["slices"]
            ),
        )
        for g in value["groups"]
    )
    return Structure(
        groups=groups,
        refused=(),
        tensors={k: tuple(_extent_from_json(e) for e in v) for k, v in value["tensors"].items()},
        parameters=frozenset(value["parameters"]),
        attributes=tuple(SizeAttribute(m, a, i, _extent_from_json(e)) for m, a, i, e in value["attributes"]),
        work=(),
    )
