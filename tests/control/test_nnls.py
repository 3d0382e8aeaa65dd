"""Against scipy's solver and the optimality conditions, on random, degenerate and rank-deficient systems."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import nnls as reference

from controlprune.control.nnls import nnls


@pytest.mark.parametrize("seed", range(60))
def test_it_is_scipys_answer(seed: int) -> None:
    random = np.random.default_rng(seed)
    m, n = int(random.integers(1, 30)), int(random.integers(1, 8))
    scale = 10.0 ** random.integers(-8, 8)
    a = random.standard_normal((m, n)) * scale
    if seed % 3 == 0:
        a = np.abs(a)
    if seed % 5 == 0 and n > 1:
        a[:, 0] = a[:, 1]  # no single answer; a single residual
    b = random.standard_normal(m) * 10.0 ** random.integers(-8, 8)
    x, (expected, residual) = nnls(a, b), reference(a, b)
    assert (x >= 0).all()
    assert np.linalg.norm(a @ x - b) == pytest.approx(residual, rel=1e-9, abs=1e-12 * np.linalg.norm(b))
    if np.linalg.matrix_rank(a) == n:
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max(initial=1e-300))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((3, 2)), np.ones(3)),
        (np.ones((3, 2)), np.zeros(3)),
        (np.ones((3, 2)), -np.ones(3)),
        (np.zeros((0, 2)), np.zeros(0)),
        (np.zeros((2, 0)), np.ones(2)),
    ],
)
def test_where_there_is_nothing_to_take(a: np.ndarray, b: np.ndarray) -> None:
    assert nnls(a, b).tolist() == [0.0] * a.shape[1]


def test_a_run_never_imports_scipys_optimizers() -> None:
    """Half a second, in the first update."""
    program = """
import sys, torch, controlprune as cp
from torch import nn
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(4, 8)
controller = cp.attach(model, optimizer, budget=cp.Budget(flops=0.5), example_inputs=(x,), total_steps=20)
for _ in range(20):
    model(x).sum().backward()
    optimizer.step()
    controller.step()
controller.finalize()
assert "scipy.optimize" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
