"""What an optimizer remembers of a layer, said of the layer's new parameters.

q: the new parameters, p = φ(q): the old ones that the same movement would have been, J = ∂p/∂q. A gradient
is a covector, so what averages gradients goes by Jᵀ (the inverse transpose of the map p → q), and what
averages their squares, entries taken as uncorrelated, by the squared magnitudes:

    m_q = Jᵀ m_p,      v_q = (J ∘ J)ᵀ v_p = E_z [(Jᵀ (√v_p ∘ z))²],   z = ±1 at random

J is never formed: both are vector-Jacobian products of φ, the second one a mean over `DRAWS` of them (exact
where J has one entry a row; else off by √(2 / DRAWS) of itself, a tenth of what Adam divides by).

Both are estimates, v the worse one: nearby poles have nearly the same gradients, and squares carried as if
they were uncorrelated come out too small, as the averages carried beside them show. So the squares of a
tensor are raised until ‖m‖² / Σ v is what it was, and where the optimizer corrects its averages for their
start (Adam), what was carried counts as `EVIDENCE` steps: the gradients after the cut soon overrule it.

State that is neither (a step size, a Hessian, anything unknown) cannot follow. All state of that parameter
is dropped then, the optimizer begins it anew, and the caller is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Map", "Moments", "carried"]

FIRST = frozenset({"exp_avg", "momentum_buffer"})  # averages of gradients
SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})  # averages of their squares
DRAWS = 64
EVIDENCE = 5  # steps that carried averages count as; loss spikes with 3, 5 and 10: docs/ssm.md

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
    for name, mine in found.items():
        if {"exp_avg", "exp_avg_sq"} <= mine.keys():
            _raise_squares(states[name], mine)
            _count_as_few(states[name], mine, _betas(optimizer, old[name]))
    return Moments({n: s for n, s in found.items() if n not in dropped}, tuple(sorted(dropped)))


def _raise_squares(then: Mapping[str, Tensor], now: dict[str, Tensor]) -> None:
    """Σ v up to where ‖m‖² / Σ v is what it was."""
    was = then["exp_avg"].square().sum() / then["exp_avg_sq"].sum()
    factor = now["exp_avg"].square().sum() / now["exp_avg_sq"].sum() / was
    if factor.isfinite() and factor > 1:
        for key in now.keys() & SECOND:
            now[key] = now[key] * factor.to(now[key].dtype)


def _count_as_few(then: Mapping[str, Any], now: dict[str, Tensor], betas: tuple[float, float] | None) -> None:
    """Averages over t steps, m = (1 − β^t) m̂, as those of EVIDENCE steps with the same m̂."""
    step = then.get("step")
    if betas is None or not isinstance(step, Tensor) or "mu_product" in then or step <= EVIDENCE:
        return
    for key, value in now.items():
        beta = betas[0] if key in FIRST else betas[1]
        now[key] = value * ((1 - beta**EVIDENCE) / (1 - beta ** float(step)))
    now["step"] = torch.full_like(step, EVIDENCE)


def _betas(optimizer: Optimizer, parameter: Tensor) -> tuple[float, float] | None:
    for group in optimizer.param_groups:
        if any(parameter is one for one in group["params"]):
            return group.get("betas")
    return None


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
