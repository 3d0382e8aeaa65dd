"""The gate controller: one small network, shared by all units, from statistics to values.

For every unit i with features φ_i (below) and an analytic first guess b_i > 0,

    v_i = b_i · exp(f_θ(φ_i)),        f_θ: R^F -> R, one hidden layer, f_θ = 0 at the start

so an untrained controller is exactly the second-order score. The guess: for a unit that is on,
b = ½H + [−mean]₊ (saliency/moments.py); for one that is off, the larger of what its own gradient promises,
[−mean − ½H]₊, and `optimism` times the weakest quarter of its group's active units: a group that was
cut deep must be able to ask for width back.

θ is trained online with the model, on what can be observed:

    calibration   paired ablations e: a set S_e of units switched on one batch changed the loss by D_e ± σ_e
                  w_e ℓ(log b_e + f_θ(φ_e) − log |D_e|),  w_e = |D_e| / (|D_e| + σ_e),  ℓ = smooth L1
                  with b_e = Σ_{i∈S_e} b_i and φ_e = Σ b_i φ_i / b_e: an experiment is kept as one unit
                  (values span decades, so ratios count; an experiment whose sign contradicts v has w_e = 0)
    trade-off     the gradient of L + λC through relaxed gates z_i = sigmoid((v_i − λc_i)/τ):
                  Σ_i (g_i + λ c_i) · z_i(θ), g_i = ∂L/∂g_i observed, τ = mean |λ c|

The first pins the scale of v; the second only the sign of v − λc, and has a small weight.
Predictions are scored before they are trained on (prequential), beside Taylor, Fisher, second order
and magnitude: `scores()` is the rank correlation of each with the measured change of loss. The network
has to earn its place: while its own predictions of the last experiments were further off (mean |log ratio|)
than the first guess's, `values` answers the first guess.

Of an experiment 34 bytes are kept: φ_e in float16, the predictions with D_e and σ_e in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

__all__ = ["FEATURES", "Experiment", "GateController", "Statistics", "features", "first_guess"]

FEATURES = (
    "log curvature", "signed slope", "noise", "log weight norm", "log cost share", "age", "dormant",
    "loss slope", "progress", "log group size",
)  # fmt: skip
HIDDEN = 8
RECENT, TRIAL_PERIOD = 48, 12  # experiments on which the network is judged, and the fewest for a verdict
RIVALS = ("learned", "second order", "fisher", "taylor", "magnitude")
GUESS, CHANGE, ERROR = 1, 5, 6  # columns of the table: the rivals' predictions, then D and σ
TINY = 1e-12


@dataclass(frozen=True)
class Statistics:
    """What is known of every unit (vectors of length U) and of the run (floats)."""

    mean: Tensor
    curvature: Tensor
    weight: Tensor  # squared norm of the columns that read the unit
    cost: Tensor  # marginal cost of the unit, fraction of dense, summed over budgeted resources
    age: Tensor  # steps since it was last switched, fraction of the horizon
    on: Tensor  # bool
    group: Tensor  # group number (int64)
    loss_slope: float
    progress: float


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
    sizes = torch.bincount(s.group)[s.group].float()
    constant = torch.ones_like(s.mean)
    columns = (
        (s.curvature.clamp_min(TINY).log() - (scale * scale).log()).clamp(-5, 5),
        torch.asinh(-s.mean / scale).clamp(-5, 5),
        s.mean.abs() / (s.curvature.sqrt() + s.mean.abs() + TINY),
        ((s.weight + TINY) / (_by_group(s.weight, s.group, s.on) + TINY)).log().clamp(-5, 5),
        (s.cost + TINY).log().clamp(-15, 0) / 5.0,
        s.age,
        (~s.on).float(),
        constant * max(-1.0, min(1.0, 5.0 * s.loss_slope)),
        constant * s.progress,
        sizes.log() / 5.0,
    )
    return torch.stack(columns, dim=1)


def first_guess(s: Statistics, optimism: float) -> Tensor:
    """b > 0, shape (U,), in units of the loss."""
    active = 0.5 * s.curvature + (-s.mean).clamp_min(0.0)
    promise = (-s.mean - 0.5 * s.curvature).clamp_min(0.0)
    weakest = torch.zeros(int(s.group.max()) + 1)
    for g in range(len(weakest)):
        of_group = active[(s.group == g) & s.on]
        weakest[g] = torch.quantile(of_group, 0.125) if len(of_group) else 0.0
    dormant = torch.maximum(promise, optimism * weakest[s.group])
    return torch.where(s.on, active, dormant).clamp_min(TINY)


@dataclass(frozen=True)
class Experiment:
    """Units `members` switched together; `off` says which way; the loss rose by `change` ± `error`."""

    members: Tensor
    off: bool
    change: float
    error: float


class GateController:
    """The network with its optimizer and its memory of experiments."""

    def __init__(self, *, seed: int, memory: int = RECENT, rate: float = 0.01, optimism: float = 0.7) -> None:
        self.optimism = optimism
        self.memory = memory
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(len(FEATURES), HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        last = self.net[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.1)
        self.phi = torch.zeros(0, len(FEATURES), dtype=torch.float16)
        self.table = torch.zeros(0, len(RIVALS) + 2, dtype=torch.bfloat16)  # signed: < 0 where switched on

    def values(self, s: Statistics) -> Tensor:
        """v > 0, shape (U,): learned if the network has earned its place, else the first guess."""
        guess = first_guess(s, self.optimism)
        return self._predict(s, guess) if self.earned else guess

    @property
    def earned(self) -> bool:
        """Did the network predict the last experiments better than the first guess did?"""
        if len(self.table) < TRIAL_PERIOD:
            return False
        sizes = self.table[-RECENT:].float().abs().clamp_min(TINY).log()
        off = (sizes[:, : GUESS + 1] - sizes[:, CHANGE, None]).abs().mean(0)
        return bool(off[0] < off[GUESS])

    def _predict(self, s: Statistics, guess: Tensor) -> Tensor:
        with torch.no_grad():
            return self._value(features(s), guess)

    def _value(self, phi: Tensor, guess: Tensor) -> Tensor:
        return guess * torch.exp(self.net(phi).squeeze(-1).clamp(-4.0, 4.0))

    def record(self, s: Statistics, experiments: list[Experiment]) -> None:
        """Score the predictions, then remember the experiments."""
        phi, guess = features(s), first_guess(s, self.optimism)
        rivals = torch.stack((self._predict(s, guess), guess, 0.5 * s.curvature, s.mean.abs(), s.weight))
        for e in experiments:
            i, sign = e.members, 1.0 if e.off else -1.0
            together = guess[i] @ phi[i] / guess[i].sum()
            outcome = torch.tensor([e.change, e.error])
            row = torch.cat([sign * rivals[:, i].sum(1), outcome])
            self.phi = torch.cat([self.phi, together[None].to(self.phi)])[-self.memory :].clone()
            self.table = torch.cat([self.table, row[None].to(self.table)])[-self.memory :].clone()

    def learn(self, s: Statistics, price: float, *, rounds: int, relaxed_weight: float = 0.01) -> float:
        """`rounds` gradient steps on both losses; returns the calibration loss before them."""
        if not len(self.table):
            return float("nan")
        phi, guess = features(s), first_guess(s, self.optimism)
        slope = s.mean + price * s.cost
        width = (price * s.cost).abs().mean().clamp_min(TINY)
        first = float("nan")
        with torch.enable_grad():
            for k in range(rounds):
                calibration = self._calibration()
                gate = torch.sigmoid(((self._value(phi, guess) - price * s.cost) / width).clamp(-20.0, 20.0))
                relaxed = (slope / slope.abs().mean().clamp_min(TINY) * gate).mean()
                self.optimizer.zero_grad()
                (calibration + relaxed_weight * relaxed).backward()
                self.optimizer.step()
                first = calibration.item() if k == 0 else first
        return first

    def _calibration(self) -> Tensor:
        table = self.table.float()
        guess, change, error = table[:, GUESS], table[:, CHANGE], table[:, ERROR]
        predicted = self._value(self.phi.float(), guess)
        agrees = guess * change > 0
        weight = agrees * change.abs() / (change.abs() + error + TINY)
        apart = predicted.abs().clamp_min(TINY).log() - change.abs().clamp_min(TINY).log()
        loss = F.smooth_l1_loss(apart, torch.zeros_like(apart), reduction="none")
        return (weight * loss).sum() / weight.sum().clamp_min(1e-6)

    def scores(self) -> dict[str, float]:
        """Rank correlation with the last changes of loss measured, each predictor before it saw them."""
        table = self.table.float().numpy()
        if len(table) < 8 or np.ptp(table[:, CHANGE]) == 0:
            return {}
        measured = rankdata(table[:, CHANGE])
        return {
            name: float(np.corrcoef(rankdata(table[:, k]), measured)[0, 1]) if np.ptp(table[:, k]) else 0.0
            for k, name in enumerate(RIVALS)
        }

    def state_dict(self) -> dict[str, object]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name).clone() for name in _MEMORY},
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.net.load_state_dict(state["net"])  # type: ignore[arg-type]
        moments: Mapping[str, Any] = state["optimizer"]  # type: ignore[assignment]
        settings = self.optimizer.state_dict()["param_groups"]  # ours, whatever was saved
        self.optimizer.load_state_dict({"state": moments["state"], "param_groups": settings})
        for name in _MEMORY:
            setattr(self, name, state[name])
        self._require_whole()

    def _require_whole(self) -> None:
        """ValueError unless the next step of learning can be made."""
        if len(self.phi) != len(self.table):
            raise ValueError(
                f"gates: {len(self.phi)} experiments in one table, {len(self.table)} in the other"
            )
        for parameter, entries in self.optimizer.state.items():
            moments = [entries.get(name) for name in ("exp_avg", "exp_avg_sq")]
            if any(not isinstance(m, Tensor) or m.shape != parameter.shape for m in moments):
                raise ValueError("gates: moments of another network")
            step = entries.get("step")
            if not (
                isinstance(step, Tensor) and step.is_floating_point() and step.numel() == 1 and step >= 0
            ):
                raise ValueError(f"gates: {step!r} is no count of steps")


_MEMORY = ("phi", "table")
