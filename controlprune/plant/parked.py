"""What is parked, packed for a checkpoint: the dormant entries only, as plain tensors.

Of a dense home `H` with dormant entries `D` (a bool tensor of its shape, from the masks), `H[D]` in
row-major order is saved beside its shape: `''` -> the tensor's own, state key -> that of the optimizer,
`key/shape` -> the shape. Live entries are the model's and the optimizer's own to save. Beside them stand the
masks (`mask/<group>`) and the layout (`compact`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..structure.groups import Structure
from .layout import Cuts, Spot, along, at, cuts_of
from .masks import Masks, checked

__all__ = ["escaped", "pack", "parsed", "small_state_aside", "unpack"]


def pack(spot: Spot) -> dict[str, Tensor]:
    """The dormant entries of every home of `spot`."""
    homes = dict(spot.state_home)
    if spot.home is not None:
        homes[""] = spot.home
    found = {}
    for key, home in homes.items():
        found[key] = home[_dormant_entries(spot, home)]
        found[f"{key}/shape"] = torch.tensor(home.shape)
    return found


def unpack(spot: Spot, packed: Mapping[str, Tensor], device: torch.device) -> None:
    """The reverse of `pack`, once `spot` is cut as it was then."""
    for key in (key for key in packed if not key.endswith("/shape")):
        home = spot.state_home.get(key) if key else spot.home
        if home is None:
            shape = packed[f"{key}/shape"].tolist()
            home = torch.zeros(shape, dtype=packed[key].dtype, device=device)
            spot.state_home[key] = home
        home[_dormant_entries(spot, home)] = packed[key].to(home)


def _check_packed(spot: Spot, packed: Mapping[str, Tensor], cuts: Cuts, compact: bool) -> None:
    """Raise a ValueError unless `packed` is what `pack` gives for `spot` at `cuts`."""
    where = f"saved: what is parked of {spot.name!r}"
    needed = bool(cuts) if compact else bool(at(cuts, "dormant" if spot.is_parameter else "silent"))
    if needed != ("" in packed):
        raise ValueError(f"{where} {'is missing' if needed else 'should not be there'} at the saved masks")
    for key, values in packed.items():
        if key.endswith("/shape"):
            continue
        shape = packed[f"{key}/shape"].tolist() if f"{key}/shape" in packed else None
        if shape is None or len(shape) != len(spot.shape) or (not key and shape != list(spot.shape)):
            raise ValueError(f"{where} ({key!r}) has shape {shape}, the tensor here {list(spot.shape)}")
        if any(n not in (1, dense) for n, dense in zip(shape, spot.shape, strict=True)):
            raise ValueError(f"{where} ({key!r}) has shape {shape}, which does not follow the tensor's")
        live = [len(cuts[d].live) if d in cuts and n == spot.shape[d] else n for d, n in enumerate(shape)]
        if values.shape != (math.prod(shape) - math.prod(live),):
            raise ValueError(f"{where} ({key!r}) has {tuple(values.shape)} entries, not what its masks say")


def escaped(name: str) -> str:
    """A tensor's name without a slash, which parts it from what is parked."""
    return name.replace("%", "%25").replace("/", "%2F")


def _dormant_entries(spot: Spot, home: Tensor) -> Tensor:
    """Bool, shaped like `home`: True where an entry is dormant in some dimension."""
    out = torch.zeros(home.shape, dtype=torch.bool, device=home.device)
    dims = [d for d, (n, dense) in enumerate(zip(home.shape, spot.shape, strict=True)) if n == dense]
    for dim, index in at(along(spot.cuts, dims), "dormant").items():
        out.index_fill_(dim, index.to(home.device), True)
    return out


def parsed(
    saved: Mapping[str, Tensor], structure: Structure, spots: Sequence[Spot]
) -> tuple[Masks, dict[str, dict[str, Tensor]]]:
    """The masks and, per tensor, what is parked; every error of a foreign `saved` is raised here."""
    names = structure.names
    missing = {"compact", *(f"mask/{name}" for name in names)} - saved.keys()
    if missing:
        raise ValueError(f"saved: no {sorted(missing)[0]!r}; it was saved from another model")
    masks = checked([saved[f"mask/{name}"] for name in names], structure)
    packed: dict[str, dict[str, Tensor]] = {}
    known: dict = {}
    for spot in spots:
        prefix = f"parked/{escaped(spot.name)}/"
        mine = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        _check_packed(spot, mine, cuts_of(spot, masks, torch.device("cpu"), known), bool(saved["compact"]))
        packed[spot.name] = mine
    extra = len(saved) - 1 - len(names) - sum(map(len, packed.values()))
    if extra:
        raise ValueError(f"saved: {extra} tensors belong to no group of this model; it is another's")
    return masks, packed


@contextmanager
def small_state_aside(
    optimizer: Optimizer | None, spots: Sequence[Spot], tensors: Mapping[str, Tensor], masks: Masks
) -> Iterator[None]:
    """Optimizer state loaded in its compact shapes already is out of the way while tensors move."""
    aside: list[tuple[dict[str, object], str, object]] = []
    known: dict = {}
    for spot in spots:
        tensor = tensors[spot.name]
        if optimizer is None or tensor not in optimizer.state:
            continue
        cuts = cuts_of(spot, masks, torch.device("cpu"), known)
        small = tuple(len(cuts[d].live) if d in cuts else n for d, n in enumerate(spot.shape))
        entries = optimizer.state[tensor]
        for key, value in list(entries.items()):
            if isinstance(value, Tensor) and value.shape == small and value.shape != tensor.shape:
                aside.append((entries, key, entries.pop(key)))
    try:
        yield
    finally:
        for entries, key, value in aside:
            entries[key] = value
