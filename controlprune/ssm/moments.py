"""What an optimizer remembers of a layer, said of the layer's new parameters.

q: the new parameters, p = φ(q): the old ones that the same movement would have been, J = ∂p/∂q. A gradient
is a covector, so what averages gradients goes by Jᵀ (the inverse transpose of the map p → q), and what
averages their squares, entries taken as uncorrelated, by the squared magnitudes:

    m_q = Jᵀ m_p,      v_q = (J ∘ J)ᵀ v_p = E_z [(Jᵀ (√v_p ∘ z))²],   z = ±1 at random

J is never formed: both are vector-Jacobian products of φ, the second one a mean over `DRAWS` of them (exact
where J has one entry a row; else off by √(2 / DRAWS) of itself, a tenth of what Adam divides by).

State that is neither (a step size, a Hessian, anything unknown) cannot follow. All state of that parameter
is dropped then, the optimizer begins it anew, and the caller is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Map", "Moments", "carried"]

FIRST = frozenset({"exp_avg", "momentum_buffer"})  # averages of gradients
SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})  # averages of their squares
DRAWS = 64

Tensors = Mapping[str, Tensor]
Map = Callable[[dict[str, Tensor]], Tensors]


@dataclass(frozen=True)
class Moments:
    """New state per parameter name and key; the names whose state is to be dropped."""

    state: Mapping[str, Mapping[str, Tensor]]
    dropped: tuple[str, ...]


def carried(optimizer: Optimizer, old: Tensors, new: Tensors, first: Map, second: Map) -> Moments:
    """The state of the parameters `old`, by name, for `new`.

    `first` is φ, with φ(new) = old; `second` is φ with what its squares would overstate left out.
    """
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in old.items()}
    keys = {key for entries in states.values() for key, value in entries.items() if _follows(value)}
    dropped = {
        name
        for name, entries in states.items()
        for key, value in entries.items()
        if _follows(value) and key not in FIRST | SECOND
    }
    at = {name: tensor.double() for name, tensor in new.items()}
    values, pull, *_ = torch.func.vjp(first, at)
    _, pull_squares, *_ = torch.func.vjp(second, at)

    def covector(key: str) -> dict[str, Tensor]:
        return {
            name: states[name][key].double() if _follows(states[name].get(key)) else torch.zeros_like(value)
            for name, value in values.items()
        }

    found: dict[str, dict[str, Tensor]] = {name: {} for name in new}
    for key in sorted(keys & (FIRST | SECOND)):
        moved = pull(covector(key))[0] if key in FIRST else _squared(pull_squares, covector(key))
        for name in new:
            if key in states[name]:
                found[name][key] = moved[name].to(new[name].dtype)
    return Moments({n: s for n, s in found.items() if n not in dropped}, tuple(sorted(dropped)))


def _follows(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _squared(pull: Callable, mean: dict[str, Tensor]) -> dict[str, Tensor]:
    """(J ∘ J)ᵀ of `mean`, by random signs."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    root = {name: value.clamp_min(0).sqrt() for name, value in mean.items()}
    total: dict[str, Tensor] = {}
    for _ in range(DRAWS):
        signs = {n: torch.randint(0, 2, v.shape, generator=draw).to(v) * 2 - 1 for n, v in root.items()}
        for name, value in pull({n: root[n] * signs[n] for n in root})[0].items():
            total[name] = total.get(name, 0) + value**2 / DRAWS
    return total
