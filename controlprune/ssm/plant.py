"""States of state-space layers as units: what is off was truncated away, between two steps, for good.

Unit i of a layer is the i-th direction of its balanced coordinates, i-th by Hankel singular value. These turn
as the layer learns, so units are ranks, and the masks that can be laid down are "the first n". At an update
the layer is taken to balanced coordinates, cut, and brought back to its own parameters (`truncate.py`); the
optimizer's moments follow (`moments.py`). There is one layout, the compact one, and no way back: the diagonal
form of a truncated system is no part of the diagonal form of the whole one.

What is seen of the units, for one price over states and channels:

    g   = ∂L/∂(gate on C x) = ⟨C, (∂p/∂C)ᵀ ∂L/∂p⟩        of the whole layer, free of charge
    a_i = σ_i / √Σσ²                                     of one state (its two real orders together)
    v_i = a_i [−mean g]₊ + ½ a_i² H                      H: the Fisher curvature of g (saliency/moments.py)

a_i² is the share of state i in the energy Σσ² = ‖Γ‖²_F of the Hankel operator, which takes white noise of the
past to the output of the future. Balanced directions are uncorrelated there, so their energies add up, and so
do the values, to that of the layer: Σ_i ½ a_i² H = ½ H, the rise of the loss to second order if C x were off,
as a channel's value is if the channel were. What is assumed is that the loss is as sensitive along one
direction of the output as along C x itself. Within a layer the order is that of σ, exactly.

`release` cannot bring states back; it fills the shapes that were found up with idle ones (`resize.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..plant.base import BasePlant
from ..plant.gate_gradients import Later
from ..plant.masks import Masks, all_on, checked
from ..structure.groups import Structure
from .layer import StateSpace
from .resize import resize
from .truncate import states_of, to_truncate, values_of

__all__ = ["StatePlant", "group_name", "layer_gate", "layer_name", "read_by"]


class StatePlant(BasePlant):
    """The user's model and optimizer with any of its layers at fewer states.

    Group g is the layer of its name (less `SUFFIX`).
    """

    parks: ClassVar[bool] = False

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, structure: Structure) -> None:
        self.model, self.optimizer, self.structure = model, optimizer, structure
        modules = dict(model.named_modules())
        self._layers = [modules[layer_name(name)] for name in structure.names]
        self._states = list(structure.sizes)
        self._bounds = dict.fromkeys(structure.names, 0.0)
        self._mark: list[int] = [0]
        self._loading = False
        self._hardened = False

    # --- masks --------------------------------------------------------------------------------------

    @property
    def masks(self) -> Masks:  # type: ignore[override]
        return tuple(
            torch.arange(size) < states
            for size, states in zip(self.structure.sizes, self._states, strict=True)
        )

    @property
    def compact(self) -> bool:  # type: ignore[override]
        return tuple(self._states) != self.structure.sizes

    def widths_at(self, masks: Sequence[Tensor], compact: bool) -> tuple[int, ...]:
        return super().widths_at(masks, True)

    def project(self, masks: Masks) -> Masks:
        """As many states, the first ones, and never more than there are."""
        counts = [min(int(mask.sum()), now) for mask, now in zip(masks, self._states, strict=True)]
        return tuple(torch.arange(len(mask)) < n for mask, n in zip(masks, counts, strict=True))

    def apply(self, masks: Sequence[Tensor], *, compact: bool) -> None:
        """Truncate to these masks, all layers or none; where there are to be more states, they are idle."""
        if self._hardened:
            raise RuntimeError("this model was finalized (harden); attach it anew to cut it further")
        wanted = [int(mask.sum()) for mask in checked(masks, self.structure)]
        self.recheck()
        rows = list(zip(self.structure.names, self._layers, self._states, wanted, strict=True))
        if self._loading:
            for _, layer, now, states in rows:
                if states != now:
                    resize(layer, states, self.optimizer)
            self._states = wanted
            return
        cuts = {
            name: to_truncate(layer, states, self.optimizer, name)
            for name, layer, now, states in rows
            if states < now
        }
        for _, layer, now, states in rows:
            if states > now:
                resize(layer, states, self.optimizer)
        for name, (cut, put) in cuts.items():
            put()
            self._bounds[name] += cut.bound
        self._states = wanted
        if cuts:
            self._mark = _digest(self._layers)

    def recheck(self) -> None:
        """RuntimeError if others have cut states."""
        for name, layer, states in zip(self.structure.names, self._layers, self._states, strict=True):
            if (found := states_of(layer)) != states:
                raise RuntimeError(
                    f"model: {name!r} has {found} states, the controller left {states}: it was cut by "
                    "others; detach before and attach anew after it"
                )

    @contextmanager
    def loading(self) -> Iterator[None]:
        self._loading = True
        try:
            yield
        finally:
            self._loading = False

    def quiet(self, state: Mapping[str, Any], prefix: str) -> bool:
        return True

    def follow_tensors(self) -> None:
        """Nothing is kept beside the tensors."""

    def rest(self) -> None:
        """Nothing is dormant in the tensors."""

    def read_later(self, later: Later) -> None:
        """What is read are gradients of parameters, when the optimizer runs."""

    def release(self) -> None:
        with self.loading():
            self.apply(all_on(self.structure), compact=False)

    def harden(self) -> None:
        self._hardened = True

    # --- what is seen -------------------------------------------------------------------------------

    @property
    def has_gradients(self) -> bool:
        return any(p.grad is not None for layer in self._layers for p in layer.parameters())

    def gate_gradient(self, only: Collection[int] | None = None) -> Tensor:
        """That of the layer, for each of its states (`shares` are of it); zero where one is gone."""
        rows = []
        for layer, size, states in zip(self._layers, self.structure.sizes, self._states, strict=True):
            gate = layer_gate(layer, only).float()
            rows.append(torch.where(torch.arange(size, device=gate.device) < states, gate, 0.0))
        return torch.cat([row.to(rows[0].device) for row in rows])

    def weight_norms(self) -> list[Tensor]:
        """Of what reads the states, the same for each."""
        found = []
        for group, layer in zip(self.structure.groups, self._layers, strict=True):
            own = dict(layer.named_parameters())
            reads = {part.tensor.rpartition(".")[2] for part in group.readers}
            total = torch.stack([own[name].detach().float().square().sum() for name in reads]).sum()
            found.append((total / group.size).expand(group.size))
        return found

    def shares(self) -> Tensor:
        """a_i: see above; alike where a layer has no Hankel singular values now."""
        rows = []
        for layer, size, states in zip(self._layers, self.structure.sizes, self._states, strict=True):
            row = torch.zeros(size)
            row[:states] = _amplitudes(layer, states)
            rows.append(row)
        return torch.cat(rows)

    @property
    def error_bounds(self) -> Mapping[str, float]:
        return self._bounds

    @property
    def mark(self) -> Sequence[int]:
        return self._mark

    # --- saved and restored -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        found = {f"mask/{name}": mask for name, mask in zip(self.structure.names, self.masks, strict=True)}
        found |= {f"bound/{name}": torch.tensor(b, dtype=torch.float64) for name, b in self._bounds.items()}
        return found | {"compact": torch.tensor(self.compact), "mark": torch.tensor(self._mark)}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Room for the saved numbers of states; the model's state dict has the states themselves."""
        names = self.structure.names
        known = {"compact", "mark", *(f"{kind}/{name}" for name in names for kind in ("mask", "bound"))}
        if saved.keys() != known:
            odd = sorted(saved.keys() ^ known)[0]
            raise ValueError(f"saved: {odd!r} is missing or too much; it was saved from another model")
        bounds = {name: float(saved[f"bound/{name}"]) for name in names}
        mark = [int(x) for x in saved["mark"]]
        with self.loading():
            self.apply([saved[f"mask/{name}"].cpu() for name in names], compact=True)
        self._bounds, self._mark = bounds, mark


def layer_gate(layer: nn.Module, only: Collection[int] | None = None) -> Tensor:
    """∂L/∂g at g = 1, where g multiplies C, for the gradients now in `p.grad`; `only`: of these ids."""
    own = dict(layer.named_parameters())
    leaves, made = _read(layer)
    heard = [
        (tensor, gradient.detach().to(tensor.dtype))
        for name, tensor in made.items()
        if (gradient := own[name].grad) is not None and (only is None or id(own[name]) in only)
    ]
    if not heard:
        return torch.zeros((), device=leaves.device)
    tensors, gradients = zip(*heard, strict=True)
    (found,) = torch.autograd.grad(tensors, leaves, gradients)
    return (leaves.detach().conj() * found).sum().real


def read_by(layer: nn.Module) -> set[str]:
    """The parameters that C is a part of."""
    return set(_read(layer)[1])


def _read(layer: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """C as a leaf, and those parameters as functions of it."""
    space = cast(StateSpace, layer)
    with torch.no_grad():
        A, B, C = space.system()
    with torch.enable_grad():
        C = C.clone().requires_grad_()
        made = space.parameters_for(A, B, C)
    return C, {name: tensor for name, tensor in made.items() if tensor.requires_grad}


SUFFIX = "states"


def group_name(layer: str) -> str:
    return f"{layer}.{SUFFIX}" if layer else SUFFIX


def layer_name(group: str) -> str:
    return group.removesuffix(SUFFIX).removesuffix(".")


def _amplitudes(layer: nn.Module, states: int) -> Tensor:
    try:
        values = torch.as_tensor(values_of(layer))  # [systems, order], order a multiple of the states
    except ValueError:
        return torch.full((states,), states**-0.5)
    energy = values.square().sum(0).view(states, -1).sum(1)
    whole = float(energy.sum())
    return (energy / whole).sqrt().float() if whole > 0 else torch.full((states,), states**-0.5)


def _digest(layers: Sequence[nn.Module]) -> list[int]:
    """Of their parameters, eight bytes."""
    found = hashlib.sha256()
    for parameter in (p for layer in layers for p in layer.parameters()):
        found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return list(found.digest()[:8])
