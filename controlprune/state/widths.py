"""The widths of a small model as plain JSON: enough to make a dense one of its class as small.

    {"format": 1,
     "shapes": {tensor: [n_1, …]},                      every tensor that is not as its class makes it
     "sizes":  [[module, attribute, index, value], …],  the Python integers that go with them
     "picked": {buffer: [[N_1, [i, …]], …]},            of N_1, … positions those that are there
     "views": [module, …],                              modules that infer sizes (structure/views.py)
     "skipped": [[module, returns, stays], …]}          modules that are not run (structure/skipping.py)

It goes where the model's own configuration is saved. A model that is pruned twice has the second record over
the first. The units themselves are not named: weights come from the file beside it. Only of buffers that no
state dict holds (the angles of rotary embeddings) is said which are left of those that the class makes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.extents import Fixed, keep, size
from ..structure.groups import SizeAttribute, Structure
from ..structure.sizes import get_size, let_heads_leave, set_size
from ..structure.skipping import off, skip_for_good
from ..structure.views import infer_sizes

__all__ = ["narrow", "pick", "picked", "record"]

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
    views = [*(before or {}).get("views", ()), *structure.views]
    found = {"format": FORMAT, "shapes": shapes, "sizes": list(sizes.values())}
    return found | ({"skipped": skipped} if skipped else {}) | ({"views": views} if views else {})


def picked(
    structure: Structure, masks: Sequence[Tensor], buffers: Collection[str], before: Record | None = None
) -> dict[str, list[Any]]:
    """Which positions of these buffers are live, per dimension, of how many; `before` as in `record`."""
    found: dict[str, list[Any]] = dict((before or {}).get("picked", {}))
    for name in buffers:
        extents = structure.tensors[name]
        live = [keep(extent, masks).nonzero().flatten().tolist() for extent in extents]
        left, dense = [len(where) for where in live], [size(extent) for extent in extents]
        earlier = found.get(name, [[n, range(n)] for n in dense])
        if left != dense and left != [len(at) for _, at in earlier]:  # else `before` has it (finalized)
            found[name] = [[n, [at[i] for i in where]] for (n, at), where in zip(earlier, live, strict=True)]
    return found


def pick(dense: Tensor, positions: Sequence[Any]) -> Tensor:
    """What `picked` says is left of it."""
    for dim, (_, where) in enumerate(positions):
        dense = dense.index_select(dim, torch.tensor(where, device=dense.device))
    return dense


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
    infer_sizes(model, widths.get("views", ()), away=True)
    with torch.no_grad():
        for name, shape in widths["shapes"].items():
            where = widths.get("picked", {}).get(name)
            dense = tensors[name].data
            left = dense[tuple(slice(n) for n in shape)].clone() if where is None else pick(dense, where)
            tensors[name].data = left
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
        for name, positions in widths.get("picked", {}).items():
            lengths, left = [n for n, _ in positions], [len(where) for _, where in positions]
            some = all(type(i) is int and 0 <= i < n for n, where in positions for i in where)
            if lengths != list(tensors[name].shape) or left != widths["shapes"][name] or not some:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not one of {lengths}")
        for module, returns, stays in widths.get("skipped", ()):
            if module not in modules or type(returns) is not int or type(stays) is not bool:
                raise ValueError(f"{module!r} is no module that can be skipped")
        for module in widths.get("views", ()):
            modules[module]
        for module, attribute, index, value in widths["sizes"]:
            found = get_size(modules, SizeAttribute(module, attribute, index, Fixed(0)))
            if type(found) is not int or not 0 < value <= found:
                raise ValueError(f"{module}.{attribute} is {found!r}, not at least {value!r}")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the widths are those of another model or damaged ({type(error).__name__}: {error}); give the "
            "class and configuration that were pruned"
        ) from error
