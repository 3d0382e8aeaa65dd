"""Branches in code that writes in place, as torchvision's ResNets do: off, they touch nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from controlprune.granularity.layers import Layers
from controlprune.plant.plant import Plant
from controlprune.structure import Structure

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


class BasicBlock(nn.Module):
    """torchvision's, word for word: one ReLU in place, used twice, and `out += identity`."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Linear(nn.Module):
    """MobileNet's: nothing after the sum, so that the stream has both signs; one activation for all blocks,
    a dropout in place that only training runs, and the sum written into the stream."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.expand, self.bn = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.drop = nn.Dropout(0.0, inplace=True)
        self.project, self.end = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn(self.expand(x)))
        out = self.end(self.project(self.drop(out)))
        out += x
        return out


class Late(nn.Module):
    """Its first module is a branch's only norm; what follows in its own code halves in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        out *= 0.5
        out.clamp_(min=-0.1)
        return self.conv(out).add_(x)


def resnet() -> nn.Module:
    blocks = BasicBlock(8, 8), BasicBlock(8, 8), BasicBlock(8, 12, 2), BasicBlock(12, 12)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), *blocks
    )


def mobilenet() -> nn.Module:
    act = nn.LeakyReLU(0.3, inplace=True)
    blocks = (Linear(12, act) for _ in range(3))
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), *blocks)


def late() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.Tanh(), *(Late(12) for _ in range(3)))


NETS = {"resnet": (resnet, 3), "mobilenet": (mobilenet, 3), "late": (late, 3)}


def made(net: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(NETS[net][0](), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(8, 1, 8, 8)
    return model, x, x.flatten(1)[:, :4].argmax(1)


@functools.cache
def traced(net: str) -> Structure:
    model, x, _ = made(net)
    structure = Layers().trace(model, (x,))
    assert len(structure.branches) == NETS[net][1]
    assert not any(branch.stays for branch in structure.branches)
    return structure


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, n: int) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("which", [1, "all"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_steps_with_blocks_off_are_the_same_in_every_form(net: str, optimizer: str, which: Any) -> None:
    """k steps masked = k steps skipped = k steps of what is finalized, the stem's with them."""
    found = {}
    for form in ("masked", "skipped", "finalized"):
        model, x, y = made(net)
        stepper = OPTIMIZERS[optimizer](model.parameters())
        structure = traced(net)
        steps(model, stepper, x, y, 2)
        plant = Plant(model, stepper, structure)
        masks = [torch.tensor([which not in (g, "all")]) for g in range(len(structure.groups))]
        plant.apply(masks, compact=form != "masked")
        if form == "finalized":
            plant.harden()
        steps(model, stepper, x, y, 4)
        with torch.no_grad():
            outputs = [model.train(mode)(x) for mode in (True, False)]
        found[form] = [*outputs, *(p.detach().clone() for n, p in _live(model, structure, masks))]
    for form in ("skipped", "finalized"):
        for a, b in zip(found["masked"], found[form], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def _live(model: nn.Module, structure: Structure, masks: list[Tensor]) -> list[tuple[str, nn.Parameter]]:
    away = {
        part.tensor
        for group, mask in zip(structure.groups, masks, strict=True)
        for part in group.slices
        if not bool(mask.any())
    }
    return [(name, p) for name, p in model.named_parameters() if name not in away]


@pytest.mark.parametrize("net", NETS)
def test_a_block_that_is_off_is_as_if_it_were_not_there(net: str) -> None:
    """Against the same net written without the block."""
    model, x, y = made(net)
    stepper = OPTIMIZERS["sgd"](model.parameters())
    structure = traced(net)
    shorter, _, _ = made(net)
    at = next(n for n, block in enumerate(shorter[0]) if isinstance(block, BasicBlock | Linear | Late))
    del shorter[0][at]
    other = OPTIMIZERS["sgd"](shorter.parameters())
    plant = Plant(model, stepper, structure)
    plant.apply([torch.tensor([g != 0]) for g in range(len(structure.groups))], compact=True)
    plant.harden()
    for one, by in ((model, stepper), (shorter, other)):
        steps(one, by, x, y, 5)
    for a, b in zip(model.parameters(), shorter.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model.eval()(x), shorter.eval()(x))
