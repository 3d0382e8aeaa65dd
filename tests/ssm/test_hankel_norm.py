"""The regulariser is Σ σ, its gradient is that of Σ σ, and training with it makes layers compressible."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from controlprune.ssm import LRU, S4D, hankel_norm, states_kept_by, values_of


@pytest.mark.parametrize(
    "layer", [LRU(2, 5, radius=(0.5, 0.9)), S4D(3, 4, step=(0.1, 0.3))], ids=["LRU", "S4D"]
)
def test_value_and_gradient(layer: nn.Module) -> None:
    layer = layer.double()
    total = hankel_norm(layer)
    assert total.item() == pytest.approx(values_of(layer).sum(), rel=1e-9)
    total.backward()
    for name, parameter in layer.named_parameters():
        if name == "D":
            continue
        assert parameter.grad is not None
        at = (0,) * parameter.ndim
        with torch.no_grad():
            here = []
            for move in (1e-5, -2e-5):
                parameter[at] += move
                here.append(values_of(layer).sum())
            parameter[at] += 1e-5
        assert parameter.grad[at].item() == pytest.approx((here[0] - here[1]) / 2e-5, rel=1e-3, abs=1e-6), (
            name
        )


def test_training_with_it_leaves_fewer_states() -> None:
    """A teacher of 3 states learned by 16: with the penalty the values of the others are pushed down."""
    kept = {}
    for weight in (0.0, 3e-2):
        torch.manual_seed(0)
        teacher, layer = LRU(2, 3, radius=(0.8, 0.9)), LRU(2, 16, radius=(0.5, 0.9))
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for step in range(150):
            u = torch.randn(8, 30, 2)
            loss = (layer(u) - teacher(u).detach()).square().mean()
            if weight and step % 2 == 0:
                loss = loss + 2 * weight * hankel_norm(layer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        kept[weight] = states_kept_by(layer, 0.05)
    assert kept[3e-2] < kept[0.0]
