"""Save and load a compact model: safetensors and JSON, never pickle.

    save(controller, "small.safetensors")          one file: the live tensors, and in its JSON header the
    model = load("small.safetensors", Net())       structure (extents, size attributes) and the masks

`load` takes a dense model of the same class, brings it to the saved widths and fills it: no example inputs,
no trace. The file appears whole or not at all (state/files.py). A checksum over header and tensors
(state/checksum.py) tells a file that was changed since; it is no signature: what a stranger wrote with a
right checksum is still read as data only, and every claim of it checked. A file that was not written here,
is damaged, newer, or belongs to another model is refused before the model is touched.
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

from ..plant.base import BasePlant
from ..plant.copies import compact_copies
from ..plant.plant import Plant
from ..state.checksum import checksum
from ..state.extra import PREFIX, extra_states, read_extra_states
from ..state.files import replacing
from ..structure.extents import size
from ..structure.groups import Structure, widths_of
from ..structure.portable import (
    masks_from_json,
    masks_to_json,
    misfit,
    structure_from_json,
    structure_to_json,
)
from ..structure.surroundings import plainly
from .controller import Controller
from .ends import require_unattached

__all__ = ["load", "save", "whole_plant"]

FORMAT = 2  # 2: with a checksum
Masks = tuple[Tensor, ...]


def whole_plant(controller: Controller) -> BasePlant:
    """Of which this process holds all."""
    if not isinstance(controller, Controller):
        raise TypeError(f"controller={type(controller).__name__}: give what controlprune.attach returned")
    if controller.plant.group is not None:
        raise ValueError(
            "controller: its parameters are sharded; small = controller.finalize(into=model) gives the small "
            "model, which can be saved"
        )
    return controller.plant


@plainly
def save(controller: Controller, path: str | Path) -> None:
    """Write the model at its present active units; the training goes on undisturbed."""
    plant = whole_plant(controller)
    own = {**dict(plant.model.named_parameters()), **dict(plant.model.named_buffers()), **plant.removed}
    changed = sorted(own.keys() ^ plant.structure.tensors.keys())
    structure, masks = plant.portable
    tensors = {} if changed else compact_copies(plant)
    if wrong := changed[0] if changed else _misfit(structure, masks, tensors, own):
        raise ValueError(
            f"controller: its model was changed since: {wrong!r} is not as it was traced and cut; put back "
            "what was replaced or added, or save the model's own state_dict"
        )
    extra, beside = extra_states(plant.model)
    tensors |= beside
    header = {
        "format": FORMAT,
        "structure": structure_to_json(structure),
        "masks": masks_to_json(structure, masks),
        "extra": extra,
    }
    with replacing(path) as part:
        try:
            save_file(tensors, str(part), metadata=signed(header, tensors))
        except SafetensorError as error:  # the disk is full, say
            raise OSError(str(error)) from error


@plainly
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """`model` (dense, of the class that was saved) at the saved widths with the saved tensors."""
    require_unattached(model)
    structure, header, found = _read(Path(path))
    if wrong := misfit(structure, model):
        raise ValueError(
            f"model: {wrong}; {str(path)!r} was saved from another one: give a dense model of the same class "
            "and configuration"
        )
    masks = _masks(path, structure, header.get("masks"))  # after the claims were found to be the model's own
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    beside = {name: tensor for name, tensor in found.items() if name.startswith(PREFIX)}
    tensors = {name: tensor for name, tensor in found.items() if name not in beside}
    if wrong := _misfit(structure, masks, tensors, own):
        raise ValueError(f"path={str(path)!r}: {wrong!r} does not fit the model")
    try:
        extra = read_extra_states(model, header.get("extra", {}), beside)
    except ValueError as error:
        raise ValueError(f"path={str(path)!r}: {error}") from error
    plant = Plant(model, None, structure)
    plant.apply(masks, compact=True)
    plant.harden()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    for module, state in extra:
        module.set_extra_state(state)
    return model


def signed(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The file's metadata: the header as JSON, and the checksum over it and the tensors."""
    text = json.dumps(header)
    return {"controlprune": text, "checksum": checksum([text, dict(tensors)])}


def _read(path: Path) -> tuple[Structure, dict[str, Any], dict[str, Tensor]]:
    """What the file says, checked in itself; ValueError names it."""
    metadata, tensors = _content(path)
    if "controlprune" not in metadata:
        raise ValueError(f"path={str(path)!r}: a safetensors file, but not one that controlprune.save wrote")
    try:
        header = json.loads(metadata["controlprune"])
        number = header["format"]
        if type(number) is not int:
            raise TypeError(f"format {number!r}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"path={str(path)!r}: its header is corrupt ({error!r})") from error
    if number > FORMAT:
        raise ValueError(
            f"path={str(path)!r}: written by a newer controlprune (format {number}, this one "
            f"reads {FORMAT}); update the package"
        )
    if metadata.get("checksum") != checksum([metadata["controlprune"], tensors]):
        raise ValueError(
            f"path={str(path)!r}: its checksum does not match; it was damaged or changed after it was saved"
        )
    try:
        structure = structure_from_json(header["structure"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"path={str(path)!r}: its header is corrupt ({error!r})") from error
    return structure, header, tensors


def _masks(path: str | Path, structure: Structure, active: Any) -> Masks:
    try:
        return tuple(masks_from_json(structure, active))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"path={str(path)!r}: its header is corrupt ({error!r})") from error


def _content(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of one file, even if another takes its place meanwhile (it is opened twice)."""
    while True:
        before = _identity(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError:
            raise
        except Exception as error:  # SafetensorError, and what torch says of tensors that cannot be
            if _identity(path) == before:
                raise ValueError(f"path={str(path)!r}: not a whole safetensors file ({error})") from error
        else:
            if _identity(path) == before:
                return found


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _misfit(
    structure: Structure, masks: Masks, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> str:
    """The first saved tensor that has not the name, the shape at these masks, or the kind of numbers."""
    widths = widths_of(masks)
    for name in sorted(own.keys() ^ tensors.keys()):
        return name
    for name, extents in structure.tensors.items():
        mine, saved = own[name], tensors[name]
        if tuple(saved.shape) != tuple(size(extent, widths) for extent in extents):
            return name
        if (saved.is_floating_point(), saved.is_complex()) != (mine.is_floating_point(), mine.is_complex()):
            return name
    return ""
