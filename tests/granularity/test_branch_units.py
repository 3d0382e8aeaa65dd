"""Residual branches as units: found, skipped exactly, weighed against channels, gone in what is finalized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import bits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import controlprune as cp
from controlprune.granularity.layers import Layers
from controlprune.plant.plant import Plant
from controlprune.structure.skipping import Removed

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


class Block(nn.Module):
    """A ResNet block whose shortcut is the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(width)
        self.c2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.b2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b2(self.c2(torch.relu(self.b1(self.c1(x))))))


def resnet() -> nn.Module:
    blocks = (Block(16) for _ in range(3))
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *blocks, *ends)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(4, 16), stack, nn.Flatten(), nn.Linear(64, 4))


NETS: dict[str, Any] = {"resnet": (resnet, (1, 4, 4), 3), "encoder": (encoder, (4, 4), 6)}


def made(net: str) -> tuple[nn.Module, Tensor, Tensor, int]:
    torch.manual_seed(0)
    make, shape, branches = NETS[net]
    x = torch.randn(8, *shape)
    return make(), x, x.flatten(1)[:, :4].argmax(1), branches


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_masked_is_skipped_is_zero(net: str, channels: bool) -> None:
    """Each branch off, alone and with others and with channels: both layouts give the same outputs."""
    model, x, _, branches = made(net)
    model.eval()
    granularity = Layers(channels=channels)
    structure = granularity.units(model, granularity.trace(model, (x,)))
    layers = [g for g, group in enumerate(structure.groups) if group.kind == "layer"]
    assert len(layers) == branches
    assert not any("cannot be skipped" in r.reason for r in structure.refused)
    plant = Plant(model, None, structure)
    dense, whole = model(x), bits(model)
    draw = torch.Generator().manual_seed(0)
    for trial in range(branches + 4):
        masks = [torch.rand(g.size, generator=draw) < 0.7 for g in structure.groups]
        for g, group in enumerate(structure.groups):
            if g in layers:
                masks[g] = torch.tensor(
                    [layers.index(g) != trial if trial < branches else bool(masks[g].any())]
                )
            elif not masks[g].any() or trial < branches:
                masks[g] = torch.ones(group.size, dtype=torch.bool)
        if all(bool(m.all()) for m in masks):
            continue
        plant.apply(masks, compact=False)
        masked = model(x)
        plant.apply(masks, compact=True)
        torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(masked, dense, atol=1e-4)
        plant.apply([torch.ones_like(m) for m in masks], compact=False)
        assert torch.equal(model(x), dense)
        assert bits(model).keys() == whole.keys()
        assert all(torch.equal(v, whole[k]) for k, v in bits(model).items() if isinstance(v, Tensor))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_steps_masked_are_steps_skipped(net: str, optimizer: str) -> None:
    """k steps in either layout leave the same live weights, and of what is away every bit."""
    found = []
    for compact in (False, True):
        model, x, y, _ = made(net)
        stepper = OPTIMIZERS[optimizer](model.parameters())
        structure = Layers().trace(model, (x,))
        for _ in range(2):
            train(model, stepper, x, y)
        before = bits(model, stepper)
        plant = Plant(model, stepper, structure)
        masks = [torch.tensor([g != 1]) for g in range(len(structure.groups))]
        plant.apply(masks, compact=compact)
        for _ in range(3):
            train(model, stepper, x, y)
        plant.release()
        after = bits(model, stepper)
        away = {part.tensor for part in structure.groups[1].slices if part.tensor in structure.parameters}
        for name in away:
            for key in (k for k in after if name in k.split() and not k.startswith(("grad", "trained"))):
                if isinstance(after[key], Tensor) and after[key].numel() > 1:
                    assert torch.equal(after[key], before[key]), key
        statistics = ("running", "num_batches")  # they move while masked
        found.append(
            {k: v for k, v in after.items() if k.startswith("state") and not any(s in k for s in statistics)}
        )
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-3, atol=1e-4, msg=key)


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, controller: Any = None) -> None:
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    if controller is not None:
        controller.step(loss)
    optimizer.zero_grad()


def attach(model: nn.Module, x: Tensor, budget: float = 0.5, **options: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return optimizer, cp.attach(
        model,
        optimizer,
        **{
            "budget": cp.Budget(flops=budget),
            "example_inputs": (x[:2],),
            "total_steps": 60,
            "granularity": "layer",
            **options,
        },
    )


@pytest.mark.parametrize("granularity", ["layer", "channel+layer"])
@pytest.mark.parametrize("net", NETS)
def test_a_run_ends_inside_its_budget_and_small(net: str, granularity: str, tmp_path: Path) -> None:
    model, x, y, _ = made(net)
    budget = 0.5 if granularity == "layer" else 0.2
    optimizer, controller = attach(model, x, budget, granularity=granularity)
    dense = controller.cost()["flops"].dense
    for _ in range(60):
        train(model, optimizer, x, y, controller)
    model.eval()
    controller.shrink()
    live = model(x)
    cp.save(controller, tmp_path / "small.safetensors")
    small = controller.finalize()
    torch.testing.assert_close(small(x), live, rtol=1e-4, atol=1e-5)
    assert any(active == 0 for active in controller.history[-1].active) or granularity != "layer"
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x[:2])
    torch.backends.mha.set_fastpath_enabled(enabled)
    assert counter.get_total_flops() <= budget * dense
    other = cp.load(tmp_path / "small.safetensors", made(net)[0]).eval()
    torch.testing.assert_close(other(x), live, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(small)
    torch.testing.assert_close(again(x), live, rtol=1e-4, atol=1e-5)
    small.train()
    train(small, optimizer, x, y)


class Peeks(nn.Module):
    """Its code asks its branch for the number type of the weights, as T5's does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)).to(self.down.weight.dtype))


def cut(net: str, tmp_path: Path | None = None) -> tuple[nn.Module, Any, Any, Tensor, Tensor]:
    """The net finalized with its second branch off, and its outputs before that."""
    model, x, y, _ = made(net)
    optimizer, controller = attach(model, x, 0.95)
    train(model, optimizer, x, y, controller)
    name = controller.groups[1].name
    controller.set_masks({n: torch.tensor([n != name]) for n in controller.masks})
    live = copy.deepcopy(model).eval()(x)
    if tmp_path is not None:
        cp.save(controller, tmp_path / "during.safetensors")
    return controller.finalize(), optimizer, controller, x, live


@pytest.mark.parametrize("net", NETS)
def test_a_branch_that_is_off_is_removed(net: str, tmp_path: Path) -> None:
    """Modules, tensors, optimizer entries: none is left, and what is left is a plain model."""
    whole = made(net)[0].state_dict()
    small, optimizer, controller, x, live = cut(net, tmp_path)
    away = set(controller._run.plant.removed)
    assert away
    assert away | small.state_dict().keys() == whole.keys()
    assert not away & small.state_dict().keys()
    assert all(p.numel() for p in small.parameters())
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    assert list(map(id, stepped)) == list(map(id, small.parameters()))
    assert set(optimizer.state) == set(stepped)
    gone = [m for m in small.modules() if isinstance(m, Removed)]
    assert gone
    assert not any(list(m.children()) or list(m.parameters()) for m in gone)
    small.eval()
    torch.testing.assert_close(small(x), live, rtol=1e-4, atol=1e-5)
    cp.save(controller, tmp_path / "after.safetensors")
    torch.save(small, tmp_path / "whole.pt")
    others = [
        copy.deepcopy(small),
        torch.load(tmp_path / "whole.pt", weights_only=False),
        *(cp.load(tmp_path / f"{when}.safetensors", made(net)[0]).eval() for when in ("during", "after")),
    ]
    for other in others:
        other.load_state_dict(small.state_dict())
        assert torch.equal(other(x), small(x))
    fresh = torch.optim.Adam(others[0].parameters(), lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    y = x.flatten(1)[:, :4].argmax(1)
    train(small, optimizer, x, y)
    train(others[0], fresh, x, y)
    for a, b in zip(small.parameters(), others[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter uses what torch deprecates
@pytest.mark.parametrize("net", NETS)
def test_what_is_left_is_exported(net: str, tmp_path: Path) -> None:
    small, _, _, x, live = cut(net)
    small.eval()
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), live, rtol=1e-4, atol=1e-5)
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    written = torch.onnx.export(small, (x,), dynamo=True, verbose=False)
    assert written is not None
    written.save(tmp_path / "small.onnx")
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), live, rtol=1e-3, atol=1e-4)


def test_a_branch_whose_code_would_notice_stays_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(NETS, "peeks", (lambda: nn.Sequential(nn.Linear(4, 16), Peeks(), Peeks()), (4,), 2))
    small, optimizer, controller, x, live = cut("peeks", tmp_path)
    assert [branch.stays for branch in controller._run.plant.structure.branches] == [True, True]
    torch.testing.assert_close(small(x), live)
    assert {p.numel() for p in small[2].parameters()} == {0}
    assert torch.equal(cp.load(tmp_path / "during.safetensors", made("peeks")[0])(x), small(x))
    train(small, optimizer, x, x.argmax(1))


def test_an_emptied_group_of_the_optimizer_stays() -> None:
    """Schedulers count groups; the names of parameters go with them."""
    model, x, y, _ = made("resnet")
    optimizer = torch.optim.SGD(
        [{"params": [*part.named_parameters()], "lr": 0.1} for part in model if [*part.parameters()]]
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    controller = cp.attach(
        model,
        optimizer,
        budget=cp.Budget(flops=0.9),
        example_inputs=(x[:2],),
        total_steps=9,
        granularity="layer",
    )
    train(model, optimizer, x, y, controller)
    name = controller.groups[1].name
    controller.set_masks({n: torch.tensor([n != name]) for n in controller.masks})
    small = controller.finalize()
    groups = optimizer.param_groups
    assert len(groups) == 5
    assert [len(g["param_names"]) for g in groups] == [len(g["params"]) for g in groups]
    assert groups[2]["params"] == []
    train(small, optimizer, x, y)
    scheduler.step()


def test_resumed_it_is_the_same_run() -> None:
    def fresh() -> tuple[nn.Module, Any, Any]:
        model, x, _, _ = made("encoder")
        return model, *attach(model, x)

    _, x, y, _ = made("encoder")
    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(60):
        train(whole[0], whole[1], x, y, whole[2])
    for _ in range(40):
        train(first[0], first[1], x, y, first[2])
    states = [copy.deepcopy(part.state_dict()) for part in first]
    for part, state in zip(reversed(second), reversed(states), strict=True):
        part.load_state_dict(state)
    for _ in range(20):
        train(second[0], second[1], x, y, second[2])
    assert all(torch.equal(m, second[2].masks[n]) for n, m in whole[2].masks.items())
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_where_there_is_no_branch_it_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"no residual branch, x \+ B\(x\), was found"):
        attach(model, torch.randn(4, 8))


def test_a_trace_alone_does_not_tell_branches() -> None:
    model, x, _, _ = made("resnet")
    with pytest.raises(ValueError, match="no residual branch"):
        attach(model, x, example_inputs=cp.trace(model, (x,)))


def test_what_is_heard_elsewhere_or_changes_shape_is_no_branch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.shared, self.head = nn.Linear(8, 8), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            x = x + h  # heard below
            x = x + self.shared(x)
            x = x + self.shared(torch.relu(x))  # twice
            x = x + self.c(torch.relu(self.b(x)))
            return self.head(torch.cat([x, h], 1))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 8)
    _, controller = attach(model, x, 0.8)
    assert list(controller.masks) == ["layer c"]
