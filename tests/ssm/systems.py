"""Random stable systems, of the kinds that are hard for the algebra."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Complex = NDArray[np.complex128]
System = tuple[Complex, Complex, Complex]


def diagonal(
    n: int, m: int, p: int, low: float, high: float, phase: float = 2 * np.pi, seed: int = 0
) -> System:
    """Poles uniform on a ring of |λ| in [low, high], one of them at `high`; phases in [0, phase]."""
    draw = np.random.default_rng(seed)
    radius = draw.uniform(low, high, n)
    radius[0] = high
    poles = radius * np.exp(1j * phase * draw.random(n))
    B = np.sqrt(1 - radius**2)[:, None] * normal(draw, n, m)
    return poles, B, normal(draw, p, n) / np.sqrt(n)


def normal(draw: np.random.Generator, *shape: int) -> Complex:
    return (draw.normal(size=shape) + 1j * draw.normal(size=shape)) / np.sqrt(2)


def repeated(n: int, m: int, p: int, kinds: int, spread: float = 0.0, seed: int = 0) -> System:
    """`kinds` different poles only, each met again and again, up to a relative spread."""
    poles, B, C = diagonal(n, m, p, 0.5, 0.99, seed=seed)
    draw = np.random.default_rng(seed + 1)
    return poles[np.arange(n) % kinds] * (1 - spread * draw.random(n)), B, C


def dense(n: int, m: int, p: int, radius: float, seed: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """A real one with the given spectral radius."""
    draw = np.random.default_rng(seed)
    A = draw.normal(size=(n, n)) / np.sqrt(n)
    A *= radius / np.abs(np.linalg.eigvals(A)).max()
    return A, draw.normal(size=(n, m)), draw.normal(size=(p, n))


DIAGONAL: dict[str, System] = {
    "single input and output": diagonal(16, 1, 1, 0.3, 0.99),
    "64 inputs and outputs": diagonal(128, 64, 64, 0.5, 0.999),
    "order 256": diagonal(256, 8, 8, 0.9, 0.999),
    "order 256, near-unstable": diagonal(256, 3, 5, 0.99, 0.9999),
    "near-unstable": diagonal(24, 1, 2, 0.9, 0.9999),
    "positive real": diagonal(20, 2, 2, 0.5, 0.9999, phase=0.0),
    "repeated": repeated(24, 2, 3, kinds=3),
    "clustered": repeated(24, 1, 1, kinds=4, spread=1e-6),
    "a pole at zero": (np.array([0.0, 0.5j, -0.9]), *diagonal(3, 2, 2, 0.1, 0.2)[1:]),
}


def response(poles: Complex, B: Complex, C: Complex, z: Complex, real: bool) -> Complex:
    """The transfer function, of y = C x or of y = Re(C x), at points z of the unit circle: [z, p, m]."""
    if real:
        mirrored = response(poles, B, C, z.conj(), real=False).conj()
        return (response(poles, B, C, z, real=False) + mirrored) / 2
    return np.einsum("pn,zn,nm->zpm", C, 1 / (z[:, None] - poles), B, optimize=True)


def sweep(*systems: System, count: int = 512) -> Complex:
    """Points of the unit circle, evenly and at the angle of every pole."""
    angles = [np.linspace(0, 2 * np.pi, count, endpoint=False), *(np.angle(s[0]) for s in systems)]
    return np.exp(1j * np.concatenate(angles))


def gain(response: Complex) -> float:
    return float(np.linalg.norm(response, 2, axis=(1, 2)).max())
