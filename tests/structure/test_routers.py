"""Which experts behind a softmax are units, and what makes a router unfit: -inf or 0 that would do harm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlprune.plant.plant import Plant
from controlprune.structure import analyse

from .agreement import random_masks

Gate = Callable[["Mixture", Tensor], Tensor]


class Mixture(nn.Module):
    """Four experts, all at work; `gate` gives their weights."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate, self.experts = gate, 4
        self.router, self.noise, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.randn(4, 5, 10)), nn.Parameter(torch.randn(4, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        p, hidden = self.gate(self, x), torch.einsum("bd,edh->beh", x, self.up).tanh()
        each = torch.einsum("beh,eho->beo", hidden, self.down).reshape(len(x), -1)
        return self.out((each.view(len(x), self.experts, -1) * p.unsqueeze(-1)).sum(1))


def noisy(m: Mixture, x: Tensor) -> Tensor:
    logits = m.router(x)
    if m.training:
        logits = logits + torch.randn_like(logits) * F.softplus(m.noise(x))
    return F.softmax(logits / 0.7, -1)


def renormed(m: Mixture, x: Tensor) -> Tensor:
    p = F.softmax(m.router(x).unsqueeze(1).float() * 2.0, -1).squeeze(1)
    return p / p.sum(-1, keepdim=True)


def thresholded(m: Mixture, x: Tensor) -> Tensor:
    p = m.router(x).softmax(-1)
    return p * (p > 0.2)


def even_load(m: Mixture, x: Tensor) -> Tensor:
    p = m.router(x).softmax(-1)
    m.loss = p.mean(0).square().sum() + (p * p.clamp(min=1e-9).log()).sum(-1).mean()
    return p


FIT: dict[str, Gate] = {
    "plain": lambda m, x: m.router(x).softmax(-1),
    "noisy": noisy,
    "renormed": renormed,
    "thresholded": thresholded,
    "even_load": even_load,
}


def entropy(m: Mixture, x: Tensor) -> Tensor:
    """Only in training mode, where outputs are not compared."""
    p = m.router(x).softmax(-1)
    if m.training:
        m.loss = (p * p.log()).sum()
    return p


def scaled_load(m: Mixture, x: Tensor) -> Tensor:
    p = m.router(x).softmax(-1)
    m.loss = m.experts * p.mean(0).square().sum()
    return p


def varied_load(m: Mixture, x: Tensor) -> Tensor:
    p = m.router(x).softmax(-1)
    m.loss = p.mean(0).var()
    return p


def z_loss(m: Mixture, x: Tensor) -> Tensor:
    logits = m.router(x)
    m.loss = logits.square().mean()
    return logits.softmax(-1)


def kept_logits(m: Mixture, x: Tensor) -> Tensor:
    m.seen = m.router(x)
    return m.seen.softmax(-1)


def kept_weights(m: Mixture, x: Tensor) -> Tensor:
    m.seen = m.router(x).softmax(-1)
    return m.seen


def padded(m: Mixture, x: Tensor) -> Tensor:
    """The last row is of zeros, not of -inf."""
    return F.pad(m.router(x)[:-1], (0, 0, 0, 1)).softmax(-1)


def written_over(m: Mixture, x: Tensor) -> Tensor:
    logits = m.router(x)
    logits[0].fill_(0.3)
    return logits.softmax(-1)


def crossed(m: Mixture, x: Tensor) -> Tensor:
    logits = m.router(x)
    return (logits.unsqueeze(1) + logits.unsqueeze(2)).softmax(-1).sum(1)


def negated(m: Mixture, x: Tensor) -> Tensor:
    return (1.0 - m.router(x)).softmax(-1)


LOGITS, WEIGHTS = "takes their logits too", "takes their weights"
KEPT = "the model keeps or returns what they weigh"
UNFIT: dict[str, tuple[Gate, str]] = {
    "bounded": (lambda m, x: m.router(x).tanh().softmax(-1), "softmax runs over its units: with one off"),
    "negative": (lambda m, x: (m.router(x) * -1.0).softmax(-1), "softmax runs over its units: with one off"),
    "negated": (negated, "softmax runs over its units: with one off"),
    "both": (lambda m, x: (y := m.router(x)).softmax(-1) * y.sigmoid(), f"sigmoid {LOGITS}"),
    "rooted": (lambda m, x: m.router(x).softmax(-1).sqrt(), f"sqrt {WEIGHTS}"),
    "entropy": (entropy, f"log {WEIGHTS}"),
    "scaled_load": (scaled_load, "how many there are is a number that tensors are computed with"),
    "varied_load": (varied_load, f"var {WEIGHTS}"),
    "z_loss": (z_loss, f"pow {LOGITS}"),
    "kept_logits": (kept_logits, KEPT),
    "kept_weights": (kept_weights, KEPT),
    "padded": (padded, f"constant_pad_nd {LOGITS}"),
    "written_over": (written_over, f"fill {LOGITS}"),
    "crossed": (crossed, "its units are summed"),
}


def mixture(gate: Gate) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mixture(gate), torch.randn(3, 5)


@pytest.mark.parametrize("name", FIT)
def test_experts_behind_a_softmax_are_units(name: str) -> None:
    model, x = mixture(FIT[name])
    structure = analyse(model, (x,))
    assert sorted(structure.sizes) == [4, 6, 10], structure.refused
    assert [router.module for router in structure.routers] == ["router"]
    (expert,) = (group for group in structure.groups if group.kind == "expert")
    assert {s.tensor for s in expert.producers} >= {"router.weight", "router.bias", "up"}
    assert [(s.tensor, s.dim) for s in expert.readers] == [("down", 0)]


@pytest.mark.parametrize("name", FIT)
def test_a_loss_of_the_models_own_is_the_same_masked_and_shrunk(name: str) -> None:
    model, x = mixture(FIT[name])
    model = model.double()
    plant = Plant(model, None, analyse(model, (x.double(),)))
    found = []
    for compact in (False, True):
        plant.apply(random_masks(plant.structure, 3), compact=compact)
        torch.manual_seed(1)
        loss = model(x.double()).square().sum() + getattr(model, "loss", 0.0)
        loss.backward()
        gradient = model.router.weight.grad
        found.append((loss.detach(), gradient[gradient.abs().sum(1) > 0].clone()))
        model.zero_grad()
    for masked, shrunk in zip(*found, strict=True):
        if name != "noisy":  # other noise
            torch.testing.assert_close(masked, shrunk)
        assert masked.isfinite().all()


@pytest.mark.parametrize("name", UNFIT)
def test_what_makes_a_router_unfit_is_told(name: str) -> None:
    gate, reason = UNFIT[name]
    model, x = mixture(gate)
    structure = analyse(model, (x,))
    assert sorted(structure.sizes) == [6, 10], name
    assert not structure.routers
    told = [refusal.reason for refusal in structure.refused if refusal.size == 4]
    assert any(reason in line for line in told), told


def test_the_rules_alone_refuse_them() -> None:
    """Not the numeric check, which sees no training mode and no loss that the model keeps to itself."""
    for name, (gate, _) in UNFIT.items():
        model, x = mixture(gate)
        assert 4 not in analyse(model, (x,), check=False).sizes, name
