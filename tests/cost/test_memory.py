"""Bytes of a training step against what the shrunk model and its optimizer really hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import WORKLOADS
from structure.agreement import shrunk_copy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from controlprune.cost.memory import memory
from controlprune.structure import analyse

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "adafactor": torch.optim.Adafactor,
}


def held(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> dict[str, int]:
    """What a training step holds, counted on its tensors."""
    model.train()
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    F.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
    optimizer.step()
    state = [v for entries in optimizer.state.values() for v in entries.values() if isinstance(v, Tensor)]
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "optimizer": sum(v.numel() * v.element_size() for v in state),
        "buffers": sum(b.numel() * b.element_size() for b in model.buffers()),
        "activations": sum(t.untyped_storage().nbytes() for s, t in kept.items() if s not in owned),
    }


@pytest.mark.parametrize("net", ["mlp", "cnn", "gpt"])
def test_the_shrunk_model_holds_what_the_polynomial_says(net: str) -> None:
    workload = WORKLOADS[net]
    model, (x, y) = workload.build(workload.dense), workload.batch()
    structure = analyse(model, (x,))
    result = memory(structure, model, torch.optim.AdamW(model.parameters()), (x,))
    assert result.unmatched == 0
    for share in (0.2, 0.4, 0.7, 1.0):
        widths = [max(1, round(share * n)) for n in structure.sizes]
        masks = [torch.arange(n) < k for n, k in zip(structure.sizes, widths, strict=True)]
        small = shrunk_copy(model, structure, masks)
        counted = held(small, torch.optim.AdamW(small.parameters()), x, y)
        for part, value in counted.items():
            assert result.parts[part].value(widths) == pytest.approx(value, rel=0.01), part
        assert result.peak.value(widths) == pytest.approx(sum(counted.values()), rel=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_tells_what_it_keeps(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 4))
    x, y = torch.randn(6, 3, 5, 5), torch.randint(4, (6,))
    structure = analyse(net, (x,))
    optimizer = OPTIMIZERS[name](net.parameters())
    known = len(optimizer.state)  # Adagrad makes its state when it is built
    before = memory(structure, net, optimizer, (x,))
    assert len(optimizer.state) == known
    counted = held(net, optimizer, x, y)
    assert before.parts["optimizer"].value([8]) == counted["optimizer"]
    assert memory(structure, net, optimizer, (x,)).parts["optimizer"].value([8]) == counted["optimizer"]


def test_frozen_parameters_have_no_gradient() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net[4].requires_grad_(False)
    x = torch.randn(3, 4)
    structure = analyse(net, (x,))
    adam = torch.optim.Adam(p for p in net.parameters() if p.requires_grad)
    parts = memory(structure, net, adam, (x,)).parts
    dense = {name: part.value(structure.sizes) for name, part in parts.items()}
    assert dense["weights"] - dense["gradients"] == 4 * (8 * 2 + 2)
    assert dense["optimizer"] == 2 * dense["gradients"] + 4 * 4  # and a step count of four parameters


def test_nothing_is_left_behind() -> None:
    """Buffers, random state, gradients, modes, hooks and a scheduler's wrapper: all as before."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 4)
    structure = analyse(net, (x,))
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    steps = scheduler.state_dict()
    memory(structure, net, optimizer, (x,))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    assert not any(module.training for module in net.modules())
    assert not calls
    assert not optimizer.state
    assert scheduler.state_dict() == steps
    assert not getattr(optimizer, "_opt_called", False)


def test_shared_storage_is_counted_once_and_views_count_whole() -> None:
    """A slice that autograd saves holds all of what it is a slice of; two of them hold it once."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 16), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.up(x).chunk(2, -1)
            return self.down(a * b)

    net, x = Gated(), torch.randn(3, 4)
    structure = analyse(net, (x,))
    activations = memory(structure, net, None, (x,)).parts["activations"]
    for n in (8, 3):
        assert activations.value([n]) == 4 * 3 * (4 + 2 * n + n)


def test_recomputed_activations_do_not_count() -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(checkpoint(self.inner, x, use_reentrant=False))

    net, x = Recomputed(), torch.randn(3, 4)
    structure = analyse(net, (x,))
    activations = memory(structure, net, None, (x,)).parts["activations"]
    assert activations.value(structure.sizes) == 4 * 3 * (4 + 4)


def test_what_no_operator_made_is_a_constant_and_told() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(torch.from_numpy(x.detach().numpy().copy()))
            return x * 1

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Opaque.apply(self.a(x)))

    net, x = Net(), torch.randn(3, 4)
    structure = analyse(net, (x,), check=False)
    result = memory(structure, net, None, (x,))
    assert result.unmatched == 4 * 3 * 8


def test_bad_input() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    one = torch.randn(1, 4)
    with pytest.raises(ValueError, match="example_inputs: for a memory budget"):
        memory(analyse(net, (one,)), net, None, (one,))

    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("needs a closure")

    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="Odd keeps per parameter"):
        memory(analyse(net, (x,)), net, Odd(net.parameters(), lr=0.1), (x,))
