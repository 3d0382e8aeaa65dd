"""The gate controller: one small network, shared by all units, from what is observed of a unit to its value.

For every unit i with features φ_i (below) and an analytic first guess b_i > 0,

    v_i = b_i · exp(f_θ(φ_i)),        f_θ: R^F -> R, one hidden layer, f_θ = 0 at the start

so an untrained controller is exactly the second-order score. The guess: for a unit that is on,
b = ½H + [−mean]₊ (saliency/moments.py); for one that is off, the larger of what its own gradient promises,
[−mean − ½H]₊, and of what its curvature says it would be worth, as far as n observations since it was last
looked at can be believed, ½H n/(n + `DOUBT`); without any, `OPTIMISM` times the weakest eighth of its group's
active units: a group that was cut deep must be able to ask for width back. Of an active unit that was never
observed (its consumers are frozen) the norm w of what reads it tells: b = b̄ w / w̄, the mean value of those
that were (1 if none was) times its share of its group's norm.

θ learns with the model, from the rows that training shows anyway. A unit's gate is relaxed,

    z_i(θ) = sigmoid((v_i − λ c_i) / τ),        τ = mean |λ c|,  c_i: marginal cost, λ: the regulator's price

and what was observed of the gate says what the loss would be at z instead of the mask m, to second order:

    L(θ) + λ C(θ) ≈ Σ_i [ g_i (z_i − m_i) + ½ H_i (z_i − m_i)² + λ c_i z_i ]           (up to a constant)

with g_i = ∂L/∂g_i and H_i its curvature. One AdamW step on it, over mean |g| + λ c so that no loss's unit
matters, at each learning. No second forward, no ablation. Where it is no better than the plain score it stays
switched off (`Control(learned=…)`; docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..structure.untouched import seeded

__all__ = ["FEATURES", "GateController", "Statistics", "apportioned", "features", "first_guess"]

FEATURES = (
    "log curvature", "signed slope", "noise", "log weight norm", "movement", "log cost share", "age",
    "dormant", "loss slope", "progress", "log group size",
)  # fmt: skip
HIDDEN = 8
OPTIMISM, DOUBT = 0.7, 2.0
TINY = 1e-30  # of squares of gradients, which may be of any unit
MOST = 2**24  # numbers of which torch takes a quantile; of more, a sample


@dataclass(frozen=True)
class Statistics:
    """What is known of every unit (vectors of length U) and of the run (floats).

    `mean`, `curvature`: of its gate gradient, first and second moment over `seen` observations. `weight`:
    squared norm of the columns that read it. `movement`: −Σ_t g, under gradient flow the growth of ½ that
    norm over the rate. `cost`: its marginal cost, fraction of dense, summed over budgeted resources. `age`:
    steps since it was last switched, fraction of the horizon. `on`: is it (bool)? `group`: number of its
    group (int64, ascending). `loss_slope`: relative fall of the loss; `progress`: part of the run passed.
    """

    mean: Tensor
    curvature: Tensor
    weight: Tensor
    movement: Tensor
    seen: Tensor
    cost: Tensor
    age: Tensor
    on: Tensor
    group: Tensor
    loss_slope: float
    progress: float


def apportioned(s: Statistics, shares: Tensor | None) -> Statistics:
    """From a whole that was seen to its units, of amplitude a in it (plant/base.py): g → a g, H → a² H."""
    if shares is None:
        return s
    shares = shares.to(s.mean)
    return replace(s, mean=shares * s.mean, curvature=shares**2 * s.curvature)


def _by_group(x: Tensor, group: Tensor, on: Tensor) -> Tensor:
    """Mean of x over the active units of each unit's group."""
    groups = int(group.max()) + 1
    weight = on.to(x.dtype)
    total = torch.zeros(groups).index_add_(0, group, x * weight)
    count = torch.zeros(groups).index_add_(0, group, weight).clamp_min(1.0)
    return (total / count)[group]


def features(s: Statistics) -> Tensor:
    """φ, shape (U, F): dimensionless, of order one; amounts are relative to the unit's group."""
    scale = _by_group(s.curvature.sqrt(), s.group, s.on).clamp_min(TINY)
    moved = _by_group(s.movement.abs(), s.group, s.on).clamp_min(TINY)
    sizes = torch.bincount(s.group)[s.group].float()
    constant = torch.ones_like(s.mean)
    columns = (
        2.0 * (s.curvature.sqrt().clamp_min(TINY).log() - scale.log()).clamp(-2.5, 2.5),
        torch.asinh(-s.mean / scale).clamp(-5, 5),
        s.mean.abs() / (s.curvature.sqrt() + s.mean.abs() + TINY),
        ((s.weight + TINY) / (_by_group(s.weight, s.group, s.on) + TINY)).log().clamp(-5, 5),
        torch.asinh(s.movement / moved).clamp(-5, 5),
        (s.cost + 1e-12).log().clamp(-15, 0) / 5.0,
        s.age,
        (~s.on).float(),
        constant * max(-1.0, min(1.0, 5.0 * s.loss_slope)),
        constant * s.progress,
        sizes.log() / 5.0,
    )
    return torch.stack(columns, dim=1)


def first_guess(s: Statistics) -> Tensor:
    """b > 0, shape (U,), in units of the loss."""
    active = _told_by_norm(s, 0.5 * s.curvature + (-s.mean).clamp_min(0.0))
    promise = (-s.mean - 0.5 * s.curvature).clamp_min(0.0)
    live = torch.bincount(s.group[s.on], minlength=int(s.group.max()) + 1).tolist()
    weakest = torch.stack([_weakest(of_group) for of_group in active[s.on].split(live)])
    looked_at = torch.maximum(promise, 0.5 * s.curvature) * s.seen / (s.seen + DOUBT)
    dormant = torch.where(s.seen > 0, looked_at, OPTIMISM * weakest[s.group])
    return torch.where(s.on, active, dormant).clamp_min(TINY)


def _weakest(active: Tensor) -> Tensor:
    """The eighth of a group's active units that is worth least reaches up to here; 0 where there are none."""
    sample = active[:: 1 + len(active) // MOST]
    return torch.quantile(sample, 0.125) if len(sample) else active.new_zeros(())


def _told_by_norm(s: Statistics, active: Tensor) -> Tensor:
    """The value of active units, where it was observed and where not."""
    known, unknown = s.on & (s.seen > 0), s.on & (s.seen == 0)
    if not bool(unknown.any()):
        return active
    level = active[known].mean() if bool(known.any()) else torch.ones(())
    share = (s.weight + TINY) / (_by_group(s.weight, s.group, s.on) + TINY)
    return torch.where(unknown, level * share, active)


class GateController:
    """The network with its optimizer."""

    def __init__(self, *, seed: int, rate: float = 0.01) -> None:
        with seeded(seed):
            self.net = nn.Sequential(nn.Linear(len(FEATURES), HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        self.net.float()  # whatever the user's default is
        last = self.net[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.1)

    def values(self, s: Statistics) -> Tensor:
        """v > 0, shape (U,)."""
        with torch.no_grad():
            return self._value(features(s), first_guess(s))

    def _value(self, phi: Tensor, guess: Tensor) -> Tensor:
        return guess * torch.exp(self.net(phi).squeeze(-1).clamp(-4.0, 4.0))

    def learn(self, s: Statistics, price: float) -> float:
        """One gradient step on the relaxed trade-off, which is returned as it was before."""
        phi, guess, on = features(s), first_guess(s), s.on.float()
        cost = price * s.cost
        width = cost.abs().mean().clamp_min(TINY)
        scale = (s.mean.abs().mean() + width).clamp_min(TINY)
        with torch.enable_grad():
            away = torch.sigmoid(((self._value(phi, guess) - cost) / width).clamp(-20.0, 20.0)) - on
            loss = ((s.mean * away + 0.5 * s.curvature * away * away + cost * (away + on)) / scale).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        settings = self.optimizer.state_dict()["param_groups"]  # ours, whatever was saved
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        for parameter, entries in self.optimizer.state.items():
            if any(entries[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("gates: moments of another network")
