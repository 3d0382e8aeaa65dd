"""What a norm module computes, found out by trying it, and the same with statistics over live units only.

    mu = mean x                  over the channels alone (LayerNorm; 0 in RMSNorm), or, with g groups,
    v  = mean (x - mu)^2         over the members of each group and over space (GroupNorm), if channels come
                                 first, or of each group alone (Mamba-2), if they are last
    y  = (x - mu) / sqrt(v + eps) * (offset + w) + b

where mean x² is Σ x² over a number of channels that the module keeps, if it does not count them
(F.normalize(x) * self.scale with scale = √C), and where a gate z is given, x silu(z) for x, or y silu(z)
for y (the norms of Mamba).

A module is taken for a norm by what it answers to random numbers with random parameters, on a copy of it,
never by its name: torch's own, those of transformers and a user's alike. With units off, `normalised` takes
the means over the live channels. A dormant one is normalised with the others' mu and v and counts for
neither, so that what reads it still sees what it would be, and no gradient reaches it.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .untouched import seeded

__all__ = ["Formula", "answer", "formula_of", "normalised", "recognised"]

EPSILONS = (0.0, 0.1)  # a number of a module between them may be its eps
WRITTEN = (1e-5, 1e-6, 1e-12, 1e-8, 1e-24)  # or one of these may be in its code; the last: of F.normalize
LEAST = 1e-8  # entries are tried that are as small: below it eps may be a floor, not a summand
FAR = 10.0  # times larger, x gives the same answer
CLOSE = 1e-3  # of the largest entry: modules compute in float32, and near eps
USUAL = 8  # channels tried where no parameter tells how many there are
GATES: dict[bool, tuple[Literal["", "before", "after"], ...]] = {False: ("",), True: ("before", "after")}
MEMBERS = 3  # positions in space that are tried

Inputs: TypeAlias = "tuple[Tensor, ...]"  # x, and a gate


@dataclass(frozen=True)
class Formula:
    """The equation above, for one module."""

    axis: int  # the dimension of x with the channels: -1, or 1
    groups: int  # of channels that share statistics with each other (and space, if axis is 1); 0: all share
    centred: bool
    eps: float | None  # None: that of the numbers computed in
    gain: str | None = None  # names of the parameters w and b
    bias: str | None = None
    offset: float = 0.0
    gate: Literal["", "before", "after"] = ""
    own_dtype: bool = True  # y has the dtype of x; else the wider one of x and w
    own_dtype_in_autocast: bool = True
    kept: int | None = None  # the number of channels that the module divides by, however many there are


def normalised(
    x: Tensor,
    formula: Formula,
    live: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None = None,
) -> Tensor:
    """y, with the means over the channels where `live` (bool, one per channel)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    if gate is not None and formula.gate == "before":
        wide = wide * F.silu(gate.to(wide.dtype))
    channels = [1] * x.dim()
    channels[formula.axis] = len(live)
    on = live.to(wide).view(channels)
    if formula.groups and formula.axis == -1:
        pieces = wide.unflatten(-1, (formula.groups, -1)), on.unflatten(-1, (formula.groups, -1))
        y = _over_channels(pieces[0], formula, pieces[1]).flatten(-2)
    else:
        y = (_over_groups if formula.groups else _over_channels)(wide, formula, on)
    if gain is not None:
        y = y * (formula.offset + gain.to(wide.dtype)).view(channels)
    if bias is not None:
        y = y + bias.to(wide.dtype).view(channels)
    if gate is not None and formula.gate == "after":
        y = y * F.silu(gate.to(wide.dtype))
    return y.to(_dtype(x, formula, gain))


def _over_channels(x: Tensor, formula: Formula, on: Tensor) -> Tensor:
    n = on.sum(formula.axis, keepdim=True).clamp_min(1)
    if formula.centred:
        x = x - (x * on).sum(formula.axis, keepdim=True) / n
    v = (x.square() * on).sum(formula.axis, keepdim=True) / (n if formula.kept is None else formula.kept)
    return _bounded(x * torch.rsqrt(v + _eps(x, formula)), on, x.shape[formula.axis])


def _over_groups(x: Tensor, formula: Formula, on: Tensor) -> Tensor:
    grouped = x.reshape(x.shape[0], formula.groups, x.shape[1] // formula.groups, -1)
    on = on.view(1, formula.groups, -1, 1)
    n = (on.sum(2, keepdim=True) * grouped.shape[3]).clamp_min(1)
    grouped = grouped - (grouped * on).sum((2, 3), keepdim=True) / n
    v = (grouped.square() * on).sum((2, 3), keepdim=True) / n
    y = _bounded(grouped * torch.rsqrt(v + _eps(x, formula)), on, grouped.shape[2] * grouped.shape[3])
    return y.view(x.shape)


def _bounded(y: Tensor, on: Tensor, n: int) -> Tensor:
    """|y| ≤ √n for dormant ones, as if they counted: where one is live v = 0, and y would grow by layers."""
    return torch.where(on.bool(), y, y.clamp(-math.sqrt(n), math.sqrt(n)))


def _eps(wide: Tensor, formula: Formula) -> float:
    return torch.finfo(wide.dtype).eps if formula.eps is None else formula.eps


def _dtype(x: Tensor, formula: Formula, gain: Tensor | None) -> torch.dtype:
    autocast = torch.is_autocast_enabled(x.device.type)
    if formula.own_dtype_in_autocast if autocast else formula.own_dtype:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32 if gain is None else gain.dtype)


# --- which module is a norm ----------------------------------------------------------------------------


def recognised(model: nn.Module) -> dict[str, Formula]:
    """The formula of every module of the model that is a norm over its channels, by its dotted name."""
    known: dict[object, Formula | None] = {}
    found: dict[str, Formula] = {}
    for name, module in model.named_modules():
        if not _may_be_norm(module):
            continue
        likeness = _likeness(module)
        if likeness not in known:
            known[likeness] = formula_of(module)
        formula = known[likeness]
        if formula is not None:
            found[name] = formula
    return found


def formula_of(module: nn.Module) -> Formula | None:
    """What the module computes, if that is the equation above; it is tried on a copy."""
    try:
        twin = copy.deepcopy(module)
        twin = twin.to_empty(device="cpu") if _on_meta(module) else twin.to("cpu")
        twin = twin.double().eval().requires_grad_(False)
        with seeded(0), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in twin.parameters():
                parameter.copy_(torch.randn(parameter.shape) + 0.5)
            return next(_fitting(twin), None)
    except Exception:  # it wants other inputs, or can't be copied: no norm that is known here
        return None


def _may_be_norm(module: nn.Module) -> bool:
    source = type(module).__module__
    if source.startswith("torch.nn.modules.") and not source.endswith(".normalization"):
        return False
    parameters = list(module.parameters())
    return (
        next(module.children(), None) is None
        and next(module.buffers(), None) is None
        and len(parameters) <= 2
        and all(max(p.shape, default=1) == p.numel() for p in parameters)
    )


def _epsilons(module: nn.Module) -> list[float | None]:
    low, high = EPSILONS
    numbers = [v for v in vars(module).values() if type(v) is float and low < v < high]
    return [*dict.fromkeys(numbers), *([None] if getattr(module, "eps", 0.0) is None else [])]


def _likeness(module: nn.Module) -> object:
    """Modules alike in class, parameters' shapes and plain settings compute the same."""
    shapes = tuple((name, p.shape) for name, p in module.named_parameters())
    plain = tuple((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple)))
    return type(module), shapes, plain


def _fitting(module: nn.Module) -> Iterator[Formula]:
    """Formulas that the module's answers agree with, at the size of its eps and far above it."""
    names = [name for name, _ in module.named_parameters()]
    for (axis, groups, shape), gated in itertools.product(_forms(module), (True, False)):
        x, *gate = (torch.randn(shape, dtype=torch.float64) + 0.3 for _ in range(1 + gated))
        far = _answers(module, [(x, *gate), (FAR * x, *gate)])
        if far is None or _gap(*far) > CLOSE:
            continue
        for eps in (*_epsilons(module), *WRITTEN):
            scale = max(math.sqrt(torch.finfo(torch.float64).eps if eps is None else eps), LEAST)
            inputs = [(x, *gate), (scale * x, *gate)]
            answers = _answers(module, inputs) or []
            for centred, offset, gain, bias, when in itertools.product(
                (True, False), (0.0, 1.0), (None, *names), (None, *names), GATES[gated]
            ):
                if len({gain, bias} - {None}) != len(names) or (groups and axis == 1 and not centred):
                    continue
                formula = Formula(axis, groups, centred, eps, gain, bias, offset, when)
                if answers and _agrees(module, formula, inputs, answers):
                    yield _with_dtypes(module, _with_count(module, formula, inputs[0]), inputs[0])


def _forms(module: nn.Module) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(axis, groups, shape of x): channels last, or first before one dimension of space or two."""
    channels = next((p.numel() for p in module.parameters()), _channels(module))
    yield -1, 0, (2, MEMBERS, channels)
    planes = (2, channels, MEMBERS), (2, channels, MEMBERS, MEMBERS)
    yield from ((1, 0, shape) for shape in planes)
    whole = sorted({g for g in vars(module).values() if type(g) is int and g > 0 and channels % g == 0})
    yield from ((1, g, planes[1]) for g in whole)
    apart = dict.fromkeys(g for n in whole for g in (n, channels // n) if 1 < g < channels)
    yield from ((-1, g, (2, MEMBERS, channels)) for g in apart)


def _channels(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", getattr(module, "num_channels", USUAL))
    return shape[-1] if isinstance(shape, (tuple, list)) else shape


def _answers(module: nn.Module, inputs: list[Inputs]) -> list[Tensor] | None:
    """None where the module does not take such inputs, or changes their shape."""
    try:
        answers = [module(*given) for given in inputs]
    except Exception:
        return None
    shape = inputs[0][0].shape
    fits = all(isinstance(y, Tensor) and y.shape == shape for y in answers)
    return answers if fits else None


def _agrees(module: nn.Module, formula: Formula, inputs: list[Inputs], answers: list[Tensor]) -> bool:
    live = torch.ones(inputs[0][0].shape[formula.axis], dtype=torch.bool)
    mine = [answer(module, formula, x, live, *gate) for x, *gate in inputs]
    return all(_gap(y, m) <= CLOSE for y, m in zip(answers, mine, strict=True))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def answer(
    module: nn.Module, formula: Formula, x: Tensor, live: Tensor, gate: Tensor | None = None
) -> Tensor:
    """The module's answer to x (and a gate), with statistics over the live channels."""
    gain, bias = (None if n is None else getattr(module, n).flatten() for n in (formula.gain, formula.bias))
    return normalised(x, formula, live, gain, bias, gate)


def _with_count(module: nn.Module, formula: Formula, given: Inputs) -> Formula:
    """Asked with half of the channels: does it divide by their number, or by that of all?"""
    if formula.groups:
        return formula
    all_channels = given[0].shape[formula.axis]
    half, narrow = copy.deepcopy(module), tuple(x.narrow(formula.axis, 0, all_channels // 2) for x in given)
    for parameter in half.parameters():
        parameter.data = parameter.data.narrow(_longest(parameter), 0, all_channels // 2)
    kept, answers = replace(formula, kept=all_channels), _answers(half, [narrow]) or []
    return kept if answers and _agrees(half, kept, [narrow], answers) else formula


def _longest(parameter: Tensor) -> int:
    return max(range(parameter.dim()), key=lambda d: parameter.shape[d])


def _with_dtypes(module: nn.Module, formula: Formula, given: Inputs) -> Formula:
    """Asked with 16 bits and parameters of 32: does the answer have 16?"""
    module, given = copy.deepcopy(module).float(), tuple(x.bfloat16() for x in given)

    def own(call: Callable[..., Any]) -> bool:
        try:
            return call(*given).dtype == given[0].dtype
        except Exception:
            return True

    plain = own(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = own(module)
    return replace(formula, own_dtype=plain, own_dtype_in_autocast=cast)


def _on_meta(module: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in module.parameters())
