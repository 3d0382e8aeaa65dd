"""What an optimizer remembers, after the cut."""

from __future__ import annotations

import pytest
import torch

from controlprune.ssm import LRU, truncate
from controlprune.ssm.moments import EVIDENCE, carried


def trained(steps: int) -> tuple[LRU, torch.optim.Adam]:
    layer = LRU(2, 12)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(4, 20, 2)).square().mean().backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize(("steps", "counted"), [(2, 2), (30, EVIDENCE)])
def test_what_is_carried_counts_as_a_few_steps(steps: int, counted: int) -> None:
    layer, optimizer = trained(steps)
    truncate(layer, 6, optimizer)
    assert optimizer.state[layer.B]["step"].item() == counted
    assert optimizer.state[layer.D]["step"].item() == steps, "not touched by the cut"


def test_signal_and_noise_of_a_tensor_keep_their_ratio() -> None:
    layer, optimizer = trained(30)

    def ratios() -> list[float]:
        found = []
        for name in ("nu", "theta", "B", "C"):
            state = optimizer.state[layer.get_parameter(name)]
            steps = state["step"].item()
            m, v = state["exp_avg"] / (1 - 0.9**steps), state["exp_avg_sq"] / (1 - 0.999**steps)
            found.append((m.square().sum() / v.sum()).item())
        return found

    before = ratios()
    truncate(layer, 6, optimizer)
    assert all(now <= then * 1.001 for now, then in zip(ratios(), before, strict=True))


def test_squares_follow_the_squared_magnitude_of_the_jacobian() -> None:
    """p = M q: Jᵀ m is exact, (J ∘ J)ᵀ v within the spread of its draws; exact where J is diagonal."""
    M = torch.randn(40, 6, dtype=torch.float64)
    old = {"p": torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))}
    new = {"p": torch.zeros(6, dtype=torch.float64)}
    optimizer = torch.optim.RMSprop(old.values(), momentum=0.9)
    m, v = torch.randn(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    optimizer.state[old["p"]] = {"step": torch.tensor(9.0), "square_avg": v, "momentum_buffer": m}
    found = carried(optimizer, old, new, lambda q: {"p": M @ q["p"]}, lambda q: {"p": M @ q["p"]}).state["p"]
    assert torch.allclose(found["momentum_buffer"], M.T @ m)
    assert torch.allclose(found["square_avg"], (M**2).T @ v, rtol=0.6)
    assert "step" not in found
    diagonal = torch.linspace(1, 2, 40, dtype=torch.float64)
    exact = carried(
        optimizer, old, old, lambda q: {"p": diagonal * q["p"]}, lambda q: {"p": diagonal * q["p"]}
    ).state["p"]
    assert torch.allclose(exact["square_avg"], diagonal**2 * v)
