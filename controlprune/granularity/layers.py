"""Whole residual branches: one unit each, on or off (structure/branches.py finds them).

With z ∈ {0, 1} the width of a branch's group, everything of the branch has one factor more,

    FLOPs = Σ_operators coefficient · Π sizes · z          |w| = Π sizes · z

so costs stay multilinear, and depth and width, under one budget ("channel+layer"), compete by value per cost.
Nothing of the branch is heard when the parameters of its last module are zero: these are its consumers, and
its gate gradient is Σ ⟨w, ∂w⟩ over them, exact as for a channel. Compact, the branch is not run and its
parameters are away, for good after `finalize`.

Every branch is tried on a copy of the model: masked and compact outputs must agree, or it is left alone.
Policies that fill every group alike (all but `Control`) do not compare branches: they keep the first.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..plant.plant import Plant
from ..structure.analyse import tensors_in
from ..structure.branches import Found, branches_of
from ..structure.extents import Extent, Fixed, Product, Units
from ..structure.groups import Branch, Group, Refusal, Slice, Structure, Work
from ..structure.record import ExampleInputs, call_model, copied, output_tensors
from ..structure.skipping import off, remove
from ..structure.trial import agree
from ..structure.untouched import seeded
from .base import Granularity
from .channels import Channels
from .entries import fixed

__all__ = ["Layers"]


class Layers(Granularity):
    """granularity="layer", or "channel+layer"."""

    def __init__(self, *, channels: bool = False) -> None:
        self.channels = channels

    def __str__(self) -> str:
        return '"channel+layer"' if self.channels else '"layer"'

    def trace(
        self, model: nn.Module, example_inputs: ExampleInputs, ignored_layers: Sequence[nn.Module | str] = ()
    ) -> Structure:
        traced = super().trace(model, example_inputs, ignored_layers)
        base = traced if self.channels else fixed(traced)
        ignored = set(tensors_in(model, ignored_layers))
        found = [b for b in branches_of(model, example_inputs) if not set(b.tensors) & ignored]
        good, refused = _tried(model, example_inputs, base, found)
        structure = _which_stay(model, example_inputs, base, good)
        return replace(structure, refused=(*structure.refused, *refused))

    def units(self, model: nn.Module, traced: Structure, ignored: Collection[str] = ()) -> Structure:
        if not traced.branches:
            reasons = "".join(f"\n  {r.name}: {r.reason}" for r in traced.refused)
            raise ValueError(
                f"granularity={self}: no residual branch, x + B(x), was found in this model by running it on "
                f'example_inputs{":" + reasons if reasons else ""}; give granularity="channel"'
            )
        return traced

    def plant(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        structure: Structure,
        park_on: torch.device | None = None,
    ) -> Plant:
        self.require_whole(model)
        return Channels().plant(model, optimizer, structure, park_on)


def with_branches(structure: Structure, found: Sequence[Found]) -> Structure:
    """`structure`, with a group of one unit for each branch."""
    first, tensors = len(structure.groups), dict(structure.tensors)
    names = Counter(branch.name for branch in found)
    groups: list[Group] = []
    branches: list[Branch] = []
    inside: dict[str, Units] = {}  # module -> the unit it belongs to
    for number, branch in enumerate(found, first):
        unit = Units(number, 1)
        for name in (n for n in branch.tensors if tensors[n]):
            head, *rest = tensors[name]
            tensors[name] = (_times(unit, head), *rest)
        slices = tuple(
            Slice(name, 0, tensors[name][0], "reader" if _is_last(name, branch, structure) else "producer")
            for name in branch.tensors
            if tensors[name]
        )
        name = f"layer {branch.name if names[branch.name] == 1 else branch.ends}"
        groups.append(Group(name, 1, "layer", slices, step=1, optional=True))
        branches.append(Branch(number, branch.ends, branch.passes, branch.returns))
        inside |= dict.fromkeys((branch.ends, *branch.passes), unit)

    def grown(terms: Sequence[Work]) -> tuple[Work, ...]:
        return tuple(replace(w, factors=(*w.factors, *_units_of(w.where, inside))) for w in terms)

    old = (
        replace(g, slices=tuple(replace(s, extent=tensors[s.tensor][s.dim]) for s in g.slices))
        for g in structure.groups
    )
    return replace(
        structure,
        groups=(*old, *groups),
        tensors=tensors,
        work=grown(structure.work),
        traffic=grown(structure.traffic),
        activations=grown(structure.activations),
        branches=tuple(branches),
    )


def _is_last(name: str, branch: Found, structure: Structure) -> bool:
    return name in structure.parameters and name.rpartition(".")[0] == branch.last


def _times(unit: Units, extent: Extent) -> Product:
    return Product((unit, extent) if not isinstance(extent, Fixed) or extent.length > 1 else (unit, Fixed(1)))


def _units_of(where: str, inside: dict[str, Units]) -> list[Units]:
    return [unit for name, unit in inside.items() if where == name or where.startswith(f"{name}.")]


def _tried(
    model: nn.Module, inputs: ExampleInputs, base: Structure, found: Sequence[Found]
) -> tuple[list[Found], tuple[Refusal, ...]]:
    """Which branches compute alike masked and compact, each on its own and all together."""
    good, refused = [], []
    for branch in found:
        reason = _differs(model, inputs, with_branches(base, [branch]))
        if reason:
            refused.append(Refusal(branch.name, 1, reason))
        else:
            good.append(branch)
    reason = _differs(model, inputs, with_branches(base, good)) if len(good) > 1 else ""
    if reason:
        return [], (*refused, *(Refusal(b.name, 1, f"together with the others: {reason}") for b in good))
    return good, tuple(refused)


def _which_stay(
    model: nn.Module, inputs: ExampleInputs, base: Structure, found: Sequence[Found]
) -> Structure:
    """With every branch, told whether the code around it bears its removal: tried together, then alone."""
    whole = with_branches(base, found)
    if not found or _can_be_removed(model, inputs, whole):
        return whole
    stays = [not _can_be_removed(model, inputs, with_branches(base, [branch])) for branch in found]
    stays = stays if any(stays) else [True] * len(stays)
    branches = (replace(b, stays=s) for b, s in zip(whole.branches, stays, strict=True))
    return replace(whole, branches=tuple(branches))


def _all_off(structure: Structure) -> list[Tensor]:
    """Masks under which every branch is off, and all else on."""
    return [torch.full((g.size,), not g.optional) for g in structure.groups]


def _can_be_removed(model: nn.Module, inputs: ExampleInputs, structure: Structure) -> bool:
    """Does a copy with every branch off compute the same with them removed, and run in training too?"""
    masks = _all_off(structure)

    def outputs(removed: bool) -> tuple[list[Tensor], list[Tensor]]:
        trial = copy.deepcopy(model)
        Plant(trial, None, structure).apply(masks, compact=True)
        if removed:
            remove(trial, off(structure.branches, masks))
        return _attempt(trial.train(), inputs), _attempt(trial.eval(), inputs)

    (trained, expected), (trains, found) = outputs(False), outputs(True)
    return agree(expected, found) and bool(trains or not trained)


def _attempt(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """The outputs; none where the model's code raises, whatever that may be."""
    try:
        return _outputs(model, inputs)
    except Exception:
        return []


def _outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    with torch.no_grad(), seeded(0):
        return output_tensors(call_model(model, copied(inputs)))


def _differs(model: nn.Module, inputs: ExampleInputs, structure: Structure) -> str:
    """How the outputs with every branch off differ between the two layouts; "" if they do not."""
    masks = _all_off(structure)
    try:
        trial = copy.deepcopy(model).eval()
        plant = Plant(trial, None, structure)
        outputs = []
        for compact in (False, True):
            plant.apply(masks, compact=compact)
            outputs.append(_outputs(trial, inputs))
    except Exception as error:  # whatever the model's code says of a branch that is not run
        return f"it cannot be skipped ({type(error).__name__}: {error})"
    return "" if agree(*outputs) else "outputs differ between zero parameters and skipping it"
