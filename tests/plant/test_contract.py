"""The contract, as one property: masked = shrunk = the dumb oracle, over any sequence of masks.

The oracle keeps a dense truth, cuts a plain small model and a fresh optimizer out of it for every phase,
trains those, and writes the live entries back. The plant goes through the same phases in either layout.
`CONTROLPRUNE_EXAMPLES=2000 pytest tests/plant/test_contract.py` for the long run.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from controlprune.plant.plant import Plant
from controlprune.structure.extents import size
from controlprune.structure.groups import Group, Structure

EXAMPLES = int(os.environ.get("CONTROLPRUNE_EXAMPLES", "60"))

Parameters = list[dict[str, object]]
OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd weight decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.05),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01, weight_decay=0.1),
    "adagrad initial": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}
ONLY_COMPACT = {"adafactor"}  # normalises by whole tensors, so dormant zeros show while masked
CLIPPING: dict[str, Callable[[nn.Module], object]] = {
    "none": lambda model: None,
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.3),
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
}


@dataclass(frozen=True)
class Phase:
    masks: tuple[tuple[bool, ...], ...]
    compact: bool
    steps: int


@dataclass(frozen=True)
class Case:
    net: str
    seed: int
    optimizer: str
    clipping: str
    set_to_none: bool
    phases: tuple[Phase, ...]


def live_units(group: Group) -> st.SearchStrategy[tuple[bool, ...]]:
    least = max(group.least, 1)
    return st.tuples(*[st.booleans()] * group.size).filter(lambda mask: sum(mask) >= least)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    net = draw(st.sampled_from(sorted(oracle.SHAPES)))
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS)))
    masks = st.tuples(*map(live_units, oracle.structure_of(net).groups))
    compact = st.just(True) if optimizer in ONLY_COMPACT else st.booleans()
    phases = st.lists(st.builds(Phase, masks, compact, st.integers(0, 3)), min_size=1, max_size=4)
    return Case(
        net,
        draw(st.integers(0, 1000)),
        optimizer,
        draw(st.sampled_from(sorted(CLIPPING))),
        draw(st.booleans()),
        tuple(draw(phases)),
    )


def two_groups(model: nn.Module) -> Parameters:
    """Two parameter groups with different learning rates relative to the default."""
    parameters = list(model.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.01}]


def train_step(
    model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, case: Case
) -> tuple[Tensor, Tensor]:
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, y)
    optimizer.zero_grad(set_to_none=case.set_to_none)
    loss.backward()
    CLIPPING[case.clipping](model)
    optimizer.step()
    return loss, logits


def assert_close(a: Tensor, b: Tensor, what: str) -> None:
    """float64 nets; the sides sum in different orders."""
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text: f"{what}: {text}")


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        out = model(x)
    model.train()
    return out


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every bit of a model and its optimizer."""
    found = {name: t.detach().clone() for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}/{key}"] = value.clone()
    return found


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].shape == b[key].shape, key
        assert a[key].stride() == b[key].stride(), key
        assert torch.equal(a[key], b[key]), key


def assert_flops(model: nn.Module, structure: Structure, masks: list[Tensor], x: Tensor) -> None:
    widths = [int(m.sum()) for m in masks]
    predicted = 0
    for work in structure.work:
        factor = work.coefficient
        for extent in work.factors:
            factor *= size(extent, widths)
        predicted += factor
    with FlopCounterMode(display=False) as counter:
        outputs(model, x)
    assert counter.get_total_flops() == predicted


def run_phase(plant: Plant, truth: oracle.Truth, phase: Phase, x: Tensor, y: Tensor, case: Case) -> None:
    """One phase on both sides; the parked must keep its bits."""
    masks = [torch.tensor(mask) for mask in phase.masks]
    model, optimizer = plant.model, plant.optimizer
    assert optimizer is not None
    small, small_optimizer = truth.cut(masks)
    plant.apply(masks, compact=phase.compact)
    assert_close(outputs(model, x), outputs(small, x), "outputs")
    parked = plant.state_dict()
    alive = []  # the user's names stay alive
    for _ in range(phase.steps):
        alive.append(train_step(model, optimizer, x, y, case))
        train_step(small, small_optimizer, x, y, case)
    assert_close(outputs(model, x), outputs(small, x), "outputs")
    after = plant.state_dict()
    for key in parked:
        assert torch.equal(parked[key], after[key]), key
    if phase.compact:
        assert_flops(model, plant.structure, masks, x)
        for p, q in zip(model.parameters(), small.parameters(), strict=True):
            assert p.shape == q.shape
            assert p.stride() == q.stride()
    truth.absorb(small, small_optimizer, masks)
    if not phase.compact:
        truth.take_buffers(model, masks)  # statistics of dormant channels move while masked


def run_phases(plant: Plant, truth: oracle.Truth, x: Tensor, y: Tensor, case: Case) -> None:
    for phase in case.phases:
        run_phase(plant, truth, phase, x, y, case)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(cases())
def test_contract(case: Case) -> None:
    torch.set_num_threads(1)
    model, structure, x, y = oracle.make(case.net, case.seed)
    optimizer = OPTIMIZERS[case.optimizer](two_groups(model))
    truth_model = copy.deepcopy(model)
    truth_optimizer = OPTIMIZERS[case.optimizer](two_groups(truth_model))
    truth = oracle.Truth(truth_model, truth_optimizer, structure)
    identities = [id(p) for p in model.parameters()]
    plant = Plant(model, optimizer, structure)
    run_phases(plant, truth, x, y, case)

    plant.release()
    dense = snapshot(model, optimizer)
    expected = snapshot(truth_model, truth_optimizer)
    assert dense.keys() == expected.keys()
    for key in dense:
        assert_close(dense[key], expected[key], key)

    for phase in case.phases:
        plant.apply([torch.tensor(mask) for mask in phase.masks], compact=phase.compact)
    plant.release()
    assert_same_bits(snapshot(model, optimizer), dense)
    assert [id(p) for p in model.parameters()] == identities
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_post_hooks


def test_the_property_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keeping dormant rows at rest, weight decay moves what is parked: the outputs tell on return."""
    monkeypatch.setattr(Plant, "_hook", lambda self, tensors: None)
    on, off = (True,) * 7, (True, False) * 3 + (True,)
    phases = (Phase((off, (True,) * 6), False, 3), Phase((on, (True,) * 6), False, 1))
    model, structure, x, y = oracle.make("mlp", 0)
    case = Case("mlp", 0, "sgd momentum", "none", True, phases)
    truth_model = copy.deepcopy(model)
    make = OPTIMIZERS[case.optimizer]
    truth = oracle.Truth(truth_model, make(two_groups(truth_model)), structure)
    plant = Plant(model, make(two_groups(model)), structure)
    with pytest.raises(AssertionError, match=r"parked|outputs"):
        run_phases(plant, truth, x, y, case)
