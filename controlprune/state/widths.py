"""The widths of a small model as plain JSON: enough to make a dense one of its class as small.

    {"format": 1,
     "shapes": {tensor: [n_1, …]},                      every tensor that is not as its class makes it
     "sizes":  [[module, attribute, index, value], …],  the Python integers that go with them
     "skipped": [[module, returns, stays], …]}          modules that are not run (structure/skipping.py)

It goes where the model's own configuration is saved. A model that is pruned twice has the second record over
the first. The units themselves are not named: weights come from the file beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.extents import Fixed, size
from ..structure.groups import SizeAttribute, Structure
from ..structure.sizes import get_size, let_heads_leave, set_size
from ..structure.skipping import off, skip_for_good

__all__ = ["narrow", "record"]

FORMAT = 1
Record = Mapping[str, Any]


def record(structure: Structure, widths: Sequence[int], before: Record | None = None) -> dict[str, Any]:
    """Of a model of this structure at these widths; `before`: the record of the model that was attached."""
    shapes = dict(before["shapes"]) if before else {}
    sizes = {tuple(entry[:3]): entry for entry in (before["sizes"] if before else ())}
    for name, extents in structure.tensors.items():
        shape = [size(extent, widths) for extent in extents]
        if shape != [size(extent) for extent in extents]:
            shapes[name] = shape
    for a in structure.attributes:
        if (value := size(a.extent, widths)) != size(a.extent):
            sizes[a.module, a.attribute, a.index] = [a.module, a.attribute, a.index, value]
    skipped = [list(e) for e in (before or {}).get("skipped", ())]
    skipped += [list(e) for e in off(structure.branches, [torch.ones(n) for n in widths])]
    found = {"format": FORMAT, "shapes": shapes, "sizes": list(sizes.values())}
    return found | ({"skipped": skipped} if skipped else {})


def narrow(model: nn.Module, widths: Record) -> None:
    """Make a dense model as small as the record says; what its weights are then is not said.

    ValueError, before anything is changed, if the record is of another model.
    """
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    tensors |= dict(model.named_buffers())
    _require_alike(modules, tensors, widths)
    for module, attribute, index, value in widths["sizes"]:
        set_size(modules, module, attribute, index, value)
    let_heads_leave(model)
    with torch.no_grad():
        for name, shape in widths["shapes"].items():
            tensors[name].data = tensors[name].data[tuple(slice(n) for n in shape)].clone()
    skip_for_good(model, [(m, n, stays) for m, n, stays in widths.get("skipped", ())])


def _require_alike(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], widths: Record) -> None:
    try:
        if widths["format"] != FORMAT:
            raise ValueError(f"format {widths['format']!r}, this version reads {FORMAT}")
        for name, shape in widths["shapes"].items():
            dense = tensors[name].shape
            least = 0 if widths.get("skipped") else 1
            if len(shape) != len(dense) or not all(
                least <= n <= d for n, d in zip(shape, dense, strict=True)
            ):
                raise ValueError(f"{name} is {tuple(dense)}, no larger than {tuple(shape)}")
        for module, returns, stays in widths.get("skipped", ()):
            if module not in modules or type(returns) is not int or type(stays) is not bool:
                raise ValueError(f"{module!r} is no module that can be skipped")
        for module, attribute, index, value in widths["sizes"]:
            found = get_size(modules, SizeAttribute(module, attribute, index, Fixed(0)))
            if type(found) is not int or not 0 < value <= found:
                raise ValueError(f"{module}.{attribute} is {found!r}, not at least {value!r}")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the widths are those of another model or damaged ({type(error).__name__}: {error}); give the "
            "class and configuration that were pruned"
        ) from error
