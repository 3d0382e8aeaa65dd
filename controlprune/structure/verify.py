"""The numeric check: what the rules derived, tried on the model itself with joint random masks.

    masked:  reader slices of the units that are off are zero           y_m = f(W ⊙ mask)
    shrunk:  every tensor index_select-ed, size attributes written      y_s = f(W[live])
    passes:  max |y_m − y_s| ≤ tolerance · max |y_m| for every output tensor

Tensors that are constant (zero biases, unit gains, layer scales of 1e-6) would hide errors and are replaced
by random values during the check. On disagreement the guilty groups are found by bisection and refused. The
model's own tensors come back untouched: only `.data` is exchanged, and put back whatever happens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .draws import draws, rounded
from .exchange import at_widths, select_live, tensors_of
from .extents import Concat, Extent, Fixed, Product, Units, Window, groups_in, keep, size
from .groups import Refusal, Slice, Structure, Work
from .record import ExampleInputs, call_model, copied, output_tensors, reference_kernels, untouched
from .standins import count_live

__all__ = ["verify", "without"]

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
CHEAP = 10**9  # FLOPs of a forward pass under which five joint masks are tried instead of three
QUIET = 1e-3  # vectors below it (layer scales) count as constant
ALIGNED = 8  # elements: grouped_mm wants rows of a multiple of 16 bytes
DIFFERS = "the numeric check failed: masked and shrunk outputs differ"


def verify(
    model: nn.Module,
    example_inputs: ExampleInputs,
    structure: Structure,
    seed: int = 0,
    *,
    trains: bool = False,
) -> Structure:
    """The structure without the groups for which masked and shrunk outputs disagree (in eval mode).

    `trains`: the forward also runs in training mode, and must when shrunk (its values are random there).
    """
    if any(tensor.device.type == "meta" for tensor in model.parameters()):
        return replace(structure, verified=False)
    if not structure.groups:
        return structure
    masks = draws(structure, seed, meetings=4 if _flops(structure) < CHEAP else 2)
    values = _disturbed(model, structure, seed)
    check = _Check(model, example_inputs, structure, masks, values, trains)
    refused: dict[int, str] = {}
    check.bisect([], _by_likeness(structure), refused)
    groups = tuple(replace(g, multiple=check.multiples.get(n, 1)) for n, g in enumerate(structure.groups))
    return replace(without(replace(structure, groups=groups), refused), verified=True)


def _flops(structure: Structure) -> int:
    return sum(work.coefficient * math.prod(size(f) for f in work.factors) for work in structure.work)


def _disturbed(model: nn.Module, structure: Structure, seed: int) -> dict[str, Tensor]:
    """Values for the check: the model's own, but constants made random."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    for name, value in values.items():
        grouped = any(groups_in(extent) for extent in structure.tensors[name])
        if (grouped or name in structure.parameters) and _is_constant(value):
            level = float(value.flatten()[0])
            noise = torch.rand(value.shape, generator=generator)
            around = (noise + 0.5) * (level if abs(level) > 0.1 else 1.0)
            values[name] = (0.2 * (noise - 0.5) if level == 0 else around).to(value)
    return values


def _is_constant(value: Tensor) -> bool:
    if not value.is_floating_point() or value.numel() < 2:
        return False
    flat = value.flatten()
    if value.dim() == 1 and float(flat.abs().max()) < QUIET:
        return True
    return bool((flat[:8] == flat[0]).all()) and bool((flat == flat[0]).all())


def _by_likeness(structure: Structure) -> list[list[int]]:
    """Groups whose slices look alike but for numbers in the names: they mostly fail together."""
    found: dict[tuple[object, ...], list[int]] = {}
    for number, group in enumerate(structure.groups):
        key = (group.size, *(("".join(c for c in s.tensor if not c.isdigit()), s.dim) for s in group.slices))
        found.setdefault(key, []).append(number)
    return list(found.values())


@dataclass
class _Check:
    model: nn.Module
    example_inputs: ExampleInputs
    structure: Structure
    masks: list[list[Tensor]]  # each a joint mask of all groups
    values: dict[str, Tensor]
    trains: bool
    multiples: dict[int, int] = field(default_factory=dict)  # widths that a kernel insists on
    error: str = ""

    def bisect(self, accepted: list[int], families: list[list[int]], refused: dict[int, str]) -> list[int]:
        """Add to `refused` what can't be accepted along with `accepted`; returns all that can."""
        candidates = [number for family in families for number in family]
        if not candidates or self.passes([*accepted, *candidates]):
            return [*accepted, *candidates]
        if len(candidates) == 1:
            return self._alone(accepted, candidates[0], refused)
        if len(families) == 1:
            return self._bisect_family(accepted, families[0], refused)
        half = len(families) // 2
        accepted = self.bisect(accepted, families[:half], refused)
        return self.bisect(accepted, families[half:], refused)

    def _alone(self, accepted: list[int], number: int, refused: dict[int, str]) -> list[int]:
        """Refuse the group, unless it fails only at widths that are no multiple of ALIGNED."""
        error, n = self.error, self.structure.groups[number].size
        if error != DIFFERS and n % ALIGNED == 0 and n > ALIGNED:
            self.multiples[number] = ALIGNED
            if self.passes([*accepted, number]):
                return [*accepted, number]
            del self.multiples[number]
        refused[number] = error
        return accepted

    def _bisect_family(self, accepted: list[int], family: list[int], refused: dict[int, str]) -> list[int]:
        """The first two alone; what happens to both happens to their likenesses."""
        first, rest = family[:2], family[2:]
        for number in first:
            accepted = self.bisect(accepted, [[number]], refused)
        if rest and all(number in refused for number in first):
            refused.update(dict.fromkeys(rest, refused[first[0]]))
            return accepted
        if all(number in self.multiples for number in first):
            self.multiples.update(dict.fromkeys(rest, ALIGNED))
        half = (len(rest) + 1) // 2
        accepted = self.bisect(accepted, [rest[:half]], refused)
        return self.bisect(accepted, [rest[half:]], refused)

    def passes(self, numbers: Sequence[int]) -> bool:
        """Masked equals shrunk with the units of these groups off, those of the others on."""
        for draw, joint in enumerate(self.masks):
            masks = [
                rounded(mask, self.multiples.get(n, 1)) if n in numbers else torch.ones_like(mask)
                for n, mask in enumerate(joint)
            ]
            with untouched(self.model):  # what the masked run leaves behind (caches) must not matter
                if not self._agree(masks, trains=self.trains and draw == 0):
                    return False
        return True

    def _agree(self, masks: list[Tensor], *, trains: bool) -> bool:
        self.model.eval()
        count_live(self.model, self.structure.norms, masks)
        try:
            masked = self._run({name: self._masked(name, masks) for name in self.values}, None)
        finally:
            count_live(self.model, self.structure.norms, None)
        try:
            live = {n: select_live(v, self.structure.tensors[n], masks) for n, v in self.values.items()}
            widths = [int(mask.sum()) for mask in masks]
            shrunk = self._run(live, widths)
            if trains:
                self.model.train()
                self._run(live, widths)
        except Exception as error:
            text = str(error).strip().splitlines()
            detail = f"{type(error).__name__}: {text[0] if text else ''}"
            self.error = f"the model's code fixes its size ({detail})"
            return False
        self.error = DIFFERS
        return len(masked) == len(shrunk) and all(_close(a, b) for a, b in zip(masked, shrunk, strict=True))

    def _masked(self, name: str, masks: list[Tensor]) -> Tensor:
        value = self.values[name]
        for number, group in enumerate(self.structure.groups):
            for entry in group.readers:
                if entry.tensor == name and not bool(masks[number].all()):
                    alone = [m if n == number else torch.ones_like(m) for n, m in enumerate(masks)]
                    off = ~keep(entry.extent, alone).to(value.device)
                    value = value.index_fill(entry.dim, off.nonzero().flatten(), 0)
        return value

    def _run(self, values: Mapping[str, Tensor], widths: list[int] | None) -> list[Tensor]:
        with at_widths(self.model, self.structure, values, widths), torch.no_grad():
            torch.manual_seed(0)
            with reference_kernels(self.model):
                return output_tensors(call_model(self.model, copied(self.example_inputs)))


def _close(masked: Tensor, shrunk: Tensor) -> bool:
    if masked.shape != shrunk.shape:
        return False
    if not (masked.is_floating_point() or masked.is_complex()):
        return True  # decisions (argmax, counts) may flip on rounding; the floats tell
    tolerance = TOLERANCE.get(masked.dtype, 1e-4)
    scale = masked.abs().amax() if masked.numel() else masked.new_zeros(())
    difference = (masked - shrunk).abs().nan_to_num(0.0, 0.0)
    same_holes = torch.equal(masked.isnan(), shrunk.isnan())
    return same_holes and bool((difference <= tolerance * scale.nan_to_num(1.0, 1.0)).all())


def without(structure: Structure, reasons: Mapping[int, str]) -> Structure:
    """The structure with these groups refused: their units are fixed positions, the others renumbered."""
    if not reasons:
        return structure
    numbers = {
        old: new for new, old in enumerate(n for n in range(len(structure.groups)) if n not in reasons)
    }

    def cut(extent: Extent) -> Extent:
        match extent:
            case Fixed():
                return extent
            case Units(group, length):
                return Units(numbers[group], length) if group in numbers else Fixed(length)
            case Product(terms) | Concat(terms):
                inner = tuple(cut(term) for term in terms)
                if not any(groups_in(term) for term in inner):
                    return Fixed(size(extent))
                return type(extent)(inner)
            case Window():
                raise ValueError("a window of a sharded dimension belongs to no traced structure")

    def cut_slice(entry: Slice) -> Slice:
        return replace(entry, extent=cut(entry.extent))

    def cut_work(terms: Sequence[Work]) -> tuple[Work, ...]:
        return tuple(replace(w, factors=tuple(cut(factor) for factor in w.factors)) for w in terms)

    groups = tuple(
        replace(group, slices=tuple(cut_slice(entry) for entry in group.slices))
        for number, group in enumerate(structure.groups)
        if number in numbers
    )
    refused = [Refusal(g.name, g.size, reasons[n]) for n, g in enumerate(structure.groups) if n in reasons]
    attributes = tuple(replace(a, extent=cut(a.extent)) for a in structure.attributes)
    norms = tuple(replace(n, extent=cut(n.extent)) for n in structure.norms)
    return replace(
        structure,
        groups=groups,
        refused=(*structure.refused, *refused),
        tensors={name: tuple(cut(extent) for extent in dims) for name, dims in structure.tensors.items()},
        attributes=tuple(a for a in attributes if groups_in(a.extent)),
        norms=tuple(n for n in norms if groups_in(n.extent)),
        work=cut_work(structure.work),
        traffic=cut_work(structure.traffic),
        activations=cut_work(structure.activations),
    )
