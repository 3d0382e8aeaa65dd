"""At rest: dormant slices stay as they are, whoever writes weights or gradients in between."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from test_plant import gate_gradients, half
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from controlprune.plant.layout import at
from controlprune.plant.plant import Plant
from controlprune.structure import Structure, analyse

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def both(net: str) -> tuple[Plant, Plant, list[Tensor], Tensor, Tensor]:
    """The same model masked and compact, each with its optimizer, after two dense steps."""
    model, structure, x, y = oracle.make(net, 5)
    plants = []
    for twin in (model, copy.deepcopy(model)):
        plant = Plant(twin, torch.optim.SGD(twin.parameters(), **SGD), structure)
        for _ in range(2):
            train(plant, x, y)
        plants.append(plant)
    masks = half(structure)
    for plant, compact in zip(plants, (False, True), strict=True):
        plant.apply(masks, compact=compact)
    return plants[0], plants[1], masks, x, y


def train(plant: Plant, x: Tensor, y: Tensor) -> None:
    assert plant.optimizer is not None
    plant.optimizer.zero_grad()
    nn.functional.cross_entropy(plant.model(x), y).backward()
    plant.optimizer.step()


def silent(plant: Plant, tensors: dict[str, Tensor] | None = None) -> list[Tensor]:
    """What stands in the columns of dormant units."""
    tensors = plant.tensors() if tensors is None else tensors
    return [
        tensors[spot.name].detach().index_select(dim, index)
        for spot in plant.spots
        if spot.is_parameter
        for dim, index in at(spot.cuts, "silent").items()
    ]


def noise(parameter: Tensor) -> None:
    parameter.add_(torch.randn_like(parameter))


def unseen(parameter: Tensor) -> None:
    parameter.data += 1.0  # no version counter tells


def replaced(parameter: Tensor) -> None:
    parameter.data = parameter.data + 1.0  # another storage


@pytest.mark.parametrize("net", ["mlp", "residual"])
@pytest.mark.parametrize("write", [noise, unseen, replaced])
def test_weights_written_between_two_steps(net: str, write: Callable[[Tensor], None]) -> None:
    """The next forward is that of the shrunk model with the same live weights; what is parked stays."""
    masked, _, masks, x, _ = both(net)
    parked = copy.deepcopy(masked.state_dict())
    with torch.no_grad():
        for parameter in masked.model.parameters():
            write(parameter)
    saved = masked.model.state_dict()
    assert not any(columns.any() for columns in silent(masked, saved))
    with torch.no_grad():
        for parameter in masked.model.parameters():
            write(parameter)
    out = masked.model.eval()(x)
    assert not any(columns.any() for columns in silent(masked))
    assert all(torch.equal(value, parked[key]) for key, value in masked.state_dict().items())
    masked.apply(masks, compact=True)
    torch.testing.assert_close(out, masked.model(x))


def test_an_average_swapped_in_and_out() -> None:
    masked, _, _, x, y = both("mlp")
    live = {name: p.detach().clone() for name, p in masked.model.named_parameters()}
    average = {name: torch.randn_like(p) for name, p in live.items()}
    for values in (average, live):
        with torch.no_grad():
            for name, parameter in masked.model.named_parameters():
                parameter.copy_(values[name])
        masked.model(x)
        assert not any(columns.any() for columns in silent(masked))
    assert all(torch.equal(p, live[name]) for name, p in masked.model.named_parameters())
    train(masked, x, y)


def test_a_forward_leaves_living_graphs_alone() -> None:
    """Two forwards, then their backward passes: the hook is no change that autograd would refuse."""
    masked, _, _, x, y = both("mlp")
    losses = [nn.functional.cross_entropy(masked.model(x), y) for _ in range(2)]
    for loss in losses:
        loss.backward()
    assert torch.stack([g.abs().sum() for g in gate_gradients(masked)]).min() > 0


# --- gradients put by hand ------------------------------------------------------------------------------


def by_autograd(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    return tuple(found[name].mean(0) for name, _ in model.named_parameters())


def nothing(model: nn.Module) -> None:
    """No clipping."""


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("gradients", "clipping"), [(by_autograd, clip), (by_autograd, nothing), (per_example, nothing)]
)
@pytest.mark.parametrize("zeroed", [True, False])
def test_masked_steps_are_shrunk_steps_with_gradients_put_by_hand(
    gradients: Callable[..., tuple[Tensor, ...]], clipping: Callable[[nn.Module], None], zeroed: bool
) -> None:
    masked, compact, masks, x, y = both("mlp")
    for step in range(4):
        seen = []
        for plant in (masked, compact):
            assert plant.optimizer is not None
            if zeroed:
                plant.optimizer.zero_grad()
            found = gradients(plant.model, x, y)
            for parameter, value in zip(plant.model.parameters(), found, strict=True):
                parameter.grad = value
            clipping(plant.model)
            seen.append(gate_gradients(plant))
            plant.optimizer.step()
        for of_masked, of_compact, mask in zip(*seen, masks, strict=True):
            torch.testing.assert_close(of_masked[mask], of_compact[mask])
            assert (of_masked[~mask] != 0).all(), f"a dormant unit was not observed at step {step}"
    masked.apply(masks, compact=True)
    for a, b in zip(masked.model.parameters(), compact.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for plant in (masked, compact):
        plant.release()
    for a, b in zip(masked.model.parameters(), compact.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_dormant_units_are_observed_alike_by_hand() -> None:
    """With clipping too: as much as a backward pass shows."""
    masked, _, _, x, y = both("residual")
    masked.model.zero_grad()
    nn.functional.cross_entropy(masked.model(x), y).backward()
    clip(masked.model)
    expected = gate_gradients(masked)
    for _ in range(2):
        masked.model.zero_grad()
        for parameter, value in zip(masked.model.parameters(), by_autograd(masked.model, x, y), strict=True):
            parameter.grad = value
        clip(masked.model)
        for got, want in zip(gate_gradients(masked), expected, strict=True):
            torch.testing.assert_close(got, want)


# --- other number types, sparse gradients ---------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
def test_a_model_that_goes_to_another_number_type(compact: bool) -> None:
    masked, small, masks, x, y = both("mlp")
    plant = small if compact else masked
    assert plant.optimizer is not None
    plant.optimizer.state.clear()
    plant.model.to(torch.float64)
    for _ in range(2):
        train(plant, x.double(), y)
    before = plant.model(x.double())
    plant.apply(masks, compact=not compact)
    torch.testing.assert_close(plant.model(x.double()), before)
    plant.release()
    assert {p.dtype for p in plant.model.parameters()} == {torch.float64}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(30, 12, sparse=True, mode="sum")
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.words(x))))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_and_their_momentum_travel(momentum: float) -> None:
    """Masked, shrunk and expanded amid a step: as a run in which nothing moves but the masks."""
    torch.manual_seed(0)
    model, x = Words(), torch.randint(0, 30, (8, 4))
    y = x.sum(1) % 3
    structure: Structure = analyse(model, (x,))
    ends = []
    for layouts in ((False, False, False, False), (True, True, True, True), (False, True, False, True)):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=momentum)
        plant = Plant(twin, optimizer, structure)
        train(plant, x, y)
        masks = half(structure)
        for compact in layouts:
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            plant.apply(masks, compact=compact)
            assert twin.words.weight.grad is not None
            assert twin.words.weight.grad.is_sparse
            optimizer.step()
        plant.release()
        ends.append({name: value.clone() for name, value in twin.state_dict().items()})
    for end in ends[1:]:
        for name, value in end.items():
            torch.testing.assert_close(value, ends[0][name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_a_masked_model_says_why_it_cannot_be() -> None:
    masked, _, masks, x, _ = both("mlp")
    for model in (masked.model, copy.deepcopy(masked.model)):
        with pytest.raises(AttributeError, match=re.escape("torch.jit.script cannot take a model that has")):
            torch.jit.script(model)
    masked.apply(masks, compact=True)
    torch.testing.assert_close(torch.jit.script(masked.model)(x), masked.model(x))
