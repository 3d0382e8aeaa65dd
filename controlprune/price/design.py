"""Gains of the PI regulator from an identified response, and the margins of the loop, by python-control.

Plant, per update (y: resource use, u: log price, both as deviations; g > 0 because use falls with price;
u_{t+1} is set from e_t and, at d = 0, in force when y_{t+1} is measured)::

    y_{t+1} = a y_t − (1 − a) g u_{t+1−d}          P(z) = g (1 − a) z^{1−d} / (z − a)     (sign in the error)
    regulator (price/pi.py)                   C(z) = [K_I + K_P (1 − ν)(z − 1)/(z − ν)] / (z − 1)
    loop                                           L(z) = C(z) P(z)

The zero of the PI cancels the pole of the plant, K_P = K_I a / (1 − a) (exactly, for ν = 0), which leaves
L = K_I g z^{−d} / (z − 1). A further delay of m updates takes m ω of the phase; so where the phase of L at
K_I = 1 is PM = max(φ, m ω) above −180°, K_I makes |L| = 1. For ν = 0 in closed form::

    PM = π/2 − ω (d + 1/2),     K_I = 2 sin(ω/2) / g

Phase margins φ in degrees, gain margin as a factor, delay margin m in updates (PM / ω).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import control
import numpy as np
from scipy.optimize import root_scalar

from .identify import Response
from .pi import PI

__all__ = ["Design", "Margins", "design", "loop", "margins"]

GRID = np.geomspace(1e-4, np.pi * (1 - 1e-6), 4000)  # radians per update; a grid of its own misses crossovers


@dataclass(frozen=True)
class Margins:
    gain: float  # factor on the loop gain at which the loop becomes unstable
    phase: float  # degrees
    delay: float  # updates of further delay at which the loop becomes unstable
    crossover: float  # radians per update
    damping: float  # least damping ratio of closed-loop poles that outlive an update (1: no oscillation)


@dataclass(frozen=True)
class Design:
    regulator: PI
    margins: Margins


def loop(response: Response, regulator: PI) -> control.TransferFunction:
    """L(z), sampled once per update."""
    a, nu = response.pole, regulator.smoothing
    k_i, k_p = regulator.integral, regulator.proportional
    numerator = np.polyadd(k_i * np.array([1.0, -nu]), k_p * (1 - nu) * np.array([1.0, -1.0]))
    denominator = np.polymul([1.0, -1.0], [1.0, -nu])
    ahead, behind = max(1 - response.delay, 0), max(response.delay - 1, 0)  # z^{1 − d}
    plant = np.concatenate([[response.gain * (1 - a)], np.zeros(ahead)])
    lag = np.concatenate([[1.0, -a], np.zeros(behind)])
    return control.TransferFunction(np.polymul(numerator, plant), np.polymul(denominator, lag), True)


def margins(response: Response, regulator: PI) -> Margins:
    """Margins of the loop, by python-control."""
    open_loop = loop(response, regulator)
    sampled = control.frequency_response(open_loop, GRID)
    gain, phase, _, _, crossover, _ = control.stability_margins(sampled)
    last = float(np.real(open_loop(-1.0)))  # at the Nyquist frequency, which the crossing search leaves out
    gain = min(gain, -1 / last) if last < 0 else gain
    poles = np.asarray(control.poles(control.feedback(open_loop, 1)), complex)
    return Margins(
        gain=float(gain),
        phase=float(phase),
        delay=float(np.radians(phase) / crossover),
        crossover=float(crossover),
        damping=min((_damping(complex(p)) for p in poles if abs(p) > math.exp(-1)), default=1.0),
    )


def _damping(pole: complex) -> float:
    """ζ of z = exp(s): −Re s / |s|."""
    s = np.log(pole)
    return float(-s.real / abs(s)) if abs(s) else 0.0


def design(
    response: Response, phase_margin: float = 60.0, smoothing: float = 0.0, delay_margin: float = 0.0
) -> Design:
    """The fastest PI (largest K_I) with at least these margins (degrees, updates), its zero on the pole."""
    if not 0 < phase_margin < 90:
        raise ValueError(f"phase_margin={phase_margin!r}: give degrees in (0, 90)")
    if not 0 <= delay_margin < math.inf:
        raise ValueError(f"delay_margin={delay_margin!r}: give a number of updates >= 0")
    shape = PI(integral=1.0, proportional=response.pole / (1 - response.pole), smoothing=smoothing)
    unit = loop(response, shape)
    least = math.radians(phase_margin)

    def behind(omega: float) -> float:
        """Phase of L past the target, wrapped to (−π, π]; it falls through 0 at the crossover."""
        above = max(least, delay_margin * omega)
        return float(np.angle(unit(np.exp(1j * omega)) * np.exp(1j * (math.pi - above))))

    grid = np.linspace(1e-4, np.pi - 1e-4, 2000)
    after = next(i for i, omega in enumerate(grid) if behind(omega) <= 0)
    crossover = root_scalar(behind, bracket=(grid[after - 1], grid[after])).root
    k_i = float(1 / abs(unit(np.exp(1j * crossover))))
    regulator = replace(shape, integral=k_i, proportional=k_i * shape.proportional)
    return Design(regulator, margins(response, regulator))
