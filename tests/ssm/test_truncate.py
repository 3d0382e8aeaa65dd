"""A layer truncated between two steps: its output, its bound, its optimizer, and a user's own layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from systems import gain, response, sweep
from torch import Tensor, nn

from controlprune.ssm import LRU, truncate, values_of
from controlprune.ssm.layer import System


class OwnDense(nn.Module):
    """A user's layer with a dense, real A that it knows by other names."""

    real_output = False

    def __init__(self, states: int) -> None:
        super().__init__()
        self.transition = nn.Parameter(0.9 * torch.linalg.qr(torch.randn(states, states))[0])
        self.input = nn.Linear(2, states, bias=False)
        self.readout = nn.Linear(states, 3)

    def system(self) -> System:
        return self.transition, self.input.weight, self.readout.weight

    def parameters_for(self, A: Tensor, B: Tensor, C: Tensor) -> Mapping[str, Tensor]:
        return {"transition": A, "input.weight": B, "readout.weight": C}

    def forward(self, u: Tensor) -> Tensor:
        x, out = u.new_zeros(len(u), len(self.transition)), []
        for now in u.unbind(1):
            x = x @ self.transition.T + self.input(now)
            out.append(self.readout(x))
        return torch.stack(out, 1)


class Filter(nn.Module):
    """One complex filter per feature, as S4D has them: a batch of systems with one number of states."""

    real_output = True

    def __init__(self, features: int, states: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(features, states) - 3)
        self.angle = nn.Parameter(3 * torch.rand(features, states))
        self.weight = nn.Parameter(torch.randn(features, states, 2))

    def system(self) -> System:
        A = torch.polar(torch.exp(-self.rate.exp()), self.angle)
        return A, torch.ones_like(A)[..., None], torch.view_as_complex(self.weight)[:, None]

    def parameters_for(self, A: Tensor, B: Tensor, C: Tensor) -> Mapping[str, Tensor]:
        gain = torch.view_as_real(C[:, 0] * B[..., 0]).contiguous()
        return {"rate": (-A.abs().clamp_min(1e-30).log()).log(), "angle": A.angle(), "weight": gain}


def sizes(layer: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in layer.parameters()]


def complete(layer: LRU) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    poles, B, C = (x.detach().cdouble().numpy() for x in layer.system())
    return poles, B, C


@pytest.mark.parametrize("states", [1, 5, 16, 31])
def test_a_layer_is_off_by_no_more_than_the_bound(states: int) -> None:
    layer = LRU(3, 32, radius=(0.5, 0.98))
    before = complete(layer)
    cut = truncate(layer, states)
    after = complete(layer)
    assert (cut.before, cut.after, layer.states) == (32, states, states)
    assert cut.values.shape == (1, 64)
    z = sweep(before, after)
    error = gain(response(*before, z, real=True) - response(*after, z, real=True))
    assert error <= cut.bound + 1e-4
    assert cut.bound <= 2 * cut.values.sum()


def test_the_answer_to_an_input_is_off_by_no_more_than_the_bound() -> None:
    layer = LRU(3, 24, radius=(0.5, 0.95))
    small = copy.deepcopy(layer)
    u = torch.randn(4, 400, 3)
    u[:, 300:] = 0  # so that the answers have died away
    bound = truncate(small, 8).bound
    off = (layer(u) - small(u)).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)
    assert (off <= bound).all()
    assert (off > 0).all()


def test_nothing_is_lost_of_what_did_nothing() -> None:
    """Ten states that are not heard: twelve stay, the output with them."""
    layer = LRU(3, 22)
    with torch.no_grad():
        layer.C[:, 12:] = 0
    u = torch.randn(2, 60, 3)
    before = layer(u)
    cut = truncate(layer, 12)
    assert cut.bound < 1e-3
    assert torch.allclose(layer(u), before, atol=1e-4)


def test_parameters_stay_the_same_objects_and_training_goes_on() -> None:
    layer = LRU(3, 20)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    kept = list(layer.parameters())
    u = torch.randn(2, 30, 3)

    def step() -> float:
        loss = (layer(u) - u).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    for _ in range(3):
        step()
    truncate(layer, 6, optimizer)
    assert all(a is b for a, b in zip(kept, layer.parameters(), strict=True))
    assert all(p.grad is None for p in (layer.nu, layer.theta, layer.B, layer.C))
    for p in layer.parameters():
        assert optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape == p.shape
        assert optimizer.state[p]["step"].item() == 3
        assert (optimizer.state[p]["exp_avg_sq"] >= 0).all()
    first = step()
    for _ in range(20):
        last = step()
    assert last < first


def test_a_carried_gradient_points_where_the_new_gradient_points() -> None:
    """With the exact gradient in place of its average: what arrives is nearly the gradient after the cut."""
    teacher = LRU(3, 4, radius=(0.8, 0.95))
    layer = LRU(3, 32, radius=(0.6, 0.95))
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        u = torch.randn(16, 60, 3)
        (layer(u) - teacher(u).detach()).square().mean().backward()
        optimizer.step()
    u = torch.randn(256, 60, 3)
    target = teacher(u).detach()
    optimizer.zero_grad()
    (layer(u) - target).square().mean().backward()
    for p in layer.parameters():
        assert p.grad is not None
        optimizer.state[p]["exp_avg"] = p.grad.clone()
    cut = truncate(layer, 24, optimizer)
    assert cut.bound < 0.5 * cut.values.sum()
    optimizer.zero_grad()
    (layer(u) - target).square().mean().backward()
    for name, least in (("theta", 0.8), ("B", 0.8), ("C", 0.8), ("nu", 0.3)):
        p = layer.get_parameter(name)
        assert p.grad is not None
        carried = optimizer.state[p]["exp_avg"]
        assert torch.cosine_similarity(carried.flatten(), p.grad.flatten(), 0) > least, name


def test_what_cannot_follow_is_begun_anew_and_said() -> None:
    layer = LRU(2, 8)
    optimizer = torch.optim.Rprop(layer.parameters())
    layer(torch.randn(1, 10, 2)).sum().backward()
    optimizer.step()
    cut = truncate(layer, 4, optimizer)
    assert cut.reset == ("B", "C", "nu", "theta")
    assert layer.nu not in optimizer.state
    assert layer.D in optimizer.state
    layer(torch.randn(1, 10, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
    ],
)
def test_optimizers_go_on(make) -> None:
    layer = LRU(2, 8)
    optimizer = make(layer.parameters())
    for states in (8, 5, 3):
        assert truncate(layer, states, optimizer).reset == ()
        layer(torch.randn(1, 10, 2)).sum().backward()
        optimizer.step()


def test_a_dense_layer_of_a_user_keeps_its_function_in_balanced_coordinates_and_is_cut_in_them() -> None:
    layer = OwnDense(12)
    optimizer = torch.optim.Adam(layer.parameters())
    u = torch.randn(2, 40, 2)
    layer(u).square().sum().backward()
    optimizer.step()
    before = layer(u)
    assert truncate(layer, 12, optimizer).bound == 0
    assert torch.allclose(layer(u), before, atol=1e-3)
    cut = truncate(layer, 7, optimizer)
    assert sizes(layer) == [(7, 7), (7, 2), (3, 7), (3,)]
    off = (layer(u) - before).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)
    assert (off <= cut.bound + 1e-3).all()
    layer(u).square().sum().backward()
    optimizer.step()


def test_moments_of_an_exact_change_of_basis_are_exact() -> None:
    """Balanced coordinates of all states: Jᵀ m is the gradient there."""
    layer = OwnDense(6).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    u = torch.randn(4, 30, 2, dtype=torch.float64)
    layer(u).square().sum().backward()
    optimizer.step()
    truncate(layer, 6, optimizer)
    optimizer.zero_grad()
    layer(u).square().sum().backward()
    for p in (layer.input.weight, layer.readout.weight, layer.transition):
        assert p.grad is not None
        assert torch.allclose(optimizer.state[p]["momentum_buffer"], p.grad, rtol=1e-6)


def test_a_batch_of_systems_has_one_number_of_states() -> None:
    layer = Filter(5, 16)
    optimizer = torch.optim.Adam(layer.parameters())
    torch.view_as_real(layer.system()[2]).square().sum().backward()
    optimizer.step()
    before = [x.detach().cdouble().numpy() for x in layer.system()]
    cut = truncate(layer, 6, optimizer)
    after = [x.detach().cdouble().numpy() for x in layer.system()]
    assert cut.values.shape == (5, 32)
    assert sizes(layer) == [(5, 6), (5, 6), (5, 6, 2)]
    for old, new in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        z = sweep(old, new)
        assert gain(response(*old, z, real=True) - response(*new, z, real=True)) <= cut.bound + 1e-3


def test_values_of_a_layer_fall() -> None:
    values = values_of(LRU(2, 10))
    assert values.shape == (1, 20)
    assert (np.diff(values[0]) <= 0).all()


def test_a_cut_that_cannot_be_made_leaves_everything_as_it_was() -> None:
    layer = LRU(2, 8)
    before = copy.deepcopy(layer.state_dict())
    for states in (0, 9):
        with pytest.raises(ValueError, match=rf"states={states}: LRU has 8; give 1 to 8"):
            truncate(layer, states)
    with torch.no_grad():
        layer.B[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        truncate(layer, 4)
    layer.load_state_dict(before)
    with pytest.raises(ValueError, match="Linear does not give system"):
        truncate(nn.Linear(2, 2), 1)
