"""The plant of the price loop, identified from a real run: y_{t+1} = a y_t + b u_{t+1−d} + c.

y: realised use, fraction of dense; u: log of the relative price (policies/pricing.py), which dither moves
about while the loop is closed. Recursive least squares (regulators/identify.py) over the first part
of some runs, judged on what follows, which it has not seen; a and b are those of all runs, c each run's own.
Prediction k updates ahead, the prices known::

    ŷ_{t+i} = a ŷ_{t+i−1} + b u_{t+i−d} + c,  i = 1 … k,   ŷ_t = y_t

beside the rivals "as it is now", ŷ_{t+k} = y_t, and "as it was on average". Errors are root mean squares,
in fractions of dense.

The sensitivity is measured too: with a disturbance D of the measurement at harmonics h, over whole periods::

    S(e^{jω_h}) = (E_h + D_h) / D_h           E, D: DFT of the error and of the disturbance
    predicted:  S = 1 / (1 + L)               (regulators/design.py)

its noise is the mean |E| at the two bins beside each harmonic, over |D_h|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from controlprune.control.least_squares import LeastSquares
from controlprune.price.design import loop
from controlprune.price.identify import Response
from controlprune.price.pi import PI

__all__ = ["Fit", "Trace", "identify", "predict", "predicted_sensitivity", "sensitivity", "simulate"]

Array = NDArray[np.float64]
AHEAD = (1, 5, 10)
DELAYS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Trace:
    """One run, an entry per update: the use, the reference, and the price that this use answered."""

    use: Array
    reference: Array
    log_price: Array  # relative


@dataclass(frozen=True)
class Fit:
    a: float
    b: float
    constants: tuple[float, ...]  # c of each run
    delay: int
    errors: dict[int, tuple[float, float, float]]  # updates ahead -> of the model, "as now", "as on average"

    @property
    def response(self) -> Response:
        return Response(-self.b / (1 - self.a), min(max(self.a, 0.0), 0.99), self.delay)


def identify(traces: Sequence[Trace], share: float = 0.6) -> Fit:
    """One plant for all traces: fitted to the first `share` of each, the delay that explains it best."""
    fits = [_identify(traces, share, delay) for delay in DELAYS]
    return min(fits, key=lambda fit: fit[1])[0]


def _identify(traces: Sequence[Trace], share: float, delay: int) -> tuple[Fit, float]:
    """The fit, and the root mean square of its residuals."""
    squares = LeastSquares((0.0, -0.3, *(0.0 for _ in traces)), spread=10.0, forgetting=1.0)
    state = squares.init()
    seen = [int(share * len(trace.use)) for trace in traces]
    rows = []
    for k, (trace, stop) in enumerate(zip(traces, seen, strict=True)):
        own = np.eye(len(traces))[k]
        for t in range(delay, stop - 1):
            rows.append((np.array([trace.use[t], trace.log_price[t + 1 - delay], *own]), trace.use[t + 1]))
    for features, target in rows:
        state = squares.update(state, features, float(target))
    a, b, *constants = (float(x) for x in state.theta)
    residuals = [target - features @ state.theta for features, target in rows]
    fit = Fit(a, b, tuple(constants), delay, {})
    rest = [_part(trace, n, len(trace.use)) for trace, n in zip(traces, seen, strict=True)]
    means = [float(trace.use[:n].mean()) for trace, n in zip(traces, seen, strict=True)]
    errors = {ahead: _errors(fit, rest, means, ahead) for ahead in AHEAD}
    return replace(fit, errors=errors), float(np.sqrt(np.mean(np.square(residuals))))


def _part(trace: Trace, start: int, stop: int) -> Trace:
    return Trace(trace.use[start:stop], trace.reference[start:stop], trace.log_price[start:stop])


def _errors(
    fit: Fit, rest: Sequence[Trace], means: Sequence[float], ahead: int
) -> tuple[float, float, float]:
    first = ahead + fit.delay
    model = [t.use[first:] - predict(fit, k, t, ahead)[first:] for k, t in enumerate(rest)]
    now = [t.use[first:] - t.use[first - ahead : -ahead] for t in rest]
    average = [t.use[first:] - mean for t, mean in zip(rest, means, strict=True)]
    return (_rms(model), _rms(now), _rms(average))


def _rms(errors: Sequence[Array]) -> float:
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def predict(fit: Fit, run: int, trace: Trace, ahead: int) -> Array:
    """ŷ_t from what was known `ahead` updates before, and the prices since; nan where that is too early."""
    out = np.full(len(trace.use), np.nan)
    for t in range(ahead + fit.delay, len(trace.use)):
        y = trace.use[t - ahead]
        for i in range(t - ahead + 1, t + 1):
            y = fit.a * y + fit.b * trace.log_price[i - fit.delay] + fit.constants[run]
        out[t] = y
    return out


def simulate(fit: Fit, log_price: Array, start: float) -> Array:
    """The deviation of the use that the plant alone answers to a sequence of prices."""
    out, y = np.empty(len(log_price)), start
    for t in range(len(log_price)):
        y = fit.a * y + fit.b * log_price[max(0, t - fit.delay)]
        out[t] = y
    return out


def sensitivity(
    errors: Array, disturbance: Sequence[float], harmonics: Sequence[int]
) -> tuple[NDArray[np.complex128], Array]:
    """S at the harmonics, and its noise; `errors` over whole periods of `disturbance`, in step with it."""
    period = len(disturbance)
    count = len(errors) // period
    if count < 1 or len(errors) != count * period:
        raise ValueError(f"errors: {len(errors)} of them are no whole number of periods of {period}")
    spectrum = np.fft.rfft(errors - errors.mean())
    given = np.fft.rfft(np.tile(np.asarray(disturbance), count))
    bins = count * np.asarray(harmonics)
    around = (np.abs(spectrum[bins - 1]) + np.abs(spectrum[np.minimum(bins + 1, len(spectrum) - 1)])) / 2
    return (spectrum[bins] + given[bins]) / given[bins], around / np.abs(given[bins])


def predicted_sensitivity(response: Response, regulator: PI, omega: Array) -> NDArray[np.complex128]:
    open_loop = loop(response, regulator)
    return np.array([1 / (1 + open_loop(np.exp(1j * w))) for w in omega], complex)
