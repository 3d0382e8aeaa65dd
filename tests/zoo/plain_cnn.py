"""Families of convolutional image models, in our own words and at toy width.

The point is the wiring (what is added to, concatenated with, or split from what), not the accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import CLASSES, Branches, Factory, Residual, SqueezeExcite, chain, conv, image


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 64, 64), nn.Tanh(), nn.Linear(64, CLASSES)),
    )


class AlexNet(nn.Module):
    """Local response norm, adaptive pool to 3×3, view into three linears."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 48, 3, padding=1), nn.ReLU()),
        )
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(48 * 9, 128), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x))
        return self.classifier(x.view(x.size(0), -1))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for width in (16, 0, 32, 32, 0, 64, 64, 0):
        layers.append(conv(before, width) if width else nn.MaxPool2d(2))
        before = width or before
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 96), nn.ReLU(), nn.Linear(96, CLASSES))


def _shortcut(before: int, after: int, stride: int) -> nn.Module | None:
    if before == after and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


def _basic(before: int, after: int, stride: int) -> nn.Module:
    branch = nn.Sequential(conv(before, after, 3, stride), conv(after, after, act=nn.Identity))
    return Residual(branch, _shortcut(before, after, stride), nn.ReLU())


def _bottleneck(before: int, after: int, stride: int, groups: int = 1, squeeze: bool = False) -> nn.Module:
    inner = after // 2
    branch = nn.Sequential(
        conv(before, inner, 1),
        conv(inner, inner, 3, stride, groups),
        SqueezeExcite(inner, inner // 4) if squeeze else nn.Identity(),
        conv(inner, after, 1, act=nn.Identity),
    )
    return Residual(branch, _shortcut(before, after, stride), nn.ReLU())


def resnet_basic() -> nn.Module:
    parts = [conv(3, 16), _basic(16, 16, 1), _basic(16, 32, 2), _basic(32, 32, 1), _basic(32, 64, 2)]
    return chain(parts, 64)


def resnet_bottleneck() -> nn.Module:
    parts = [conv(3, 16), nn.MaxPool2d(3, 2, 1)]
    parts += [_bottleneck(16, 64, 1), _bottleneck(64, 64, 1), _bottleneck(64, 128, 2)]
    return chain(parts, 128)


def resnext() -> nn.Module:
    parts = [conv(3, 16), _bottleneck(16, 64, 1, 8), _bottleneck(64, 128, 2, 8), _bottleneck(128, 128, 1, 8)]
    return chain(parts, 128)


def seresnet() -> nn.Module:
    return chain([conv(3, 16), _bottleneck(16, 64, 1, 1, True), _bottleneck(64, 64, 1, 1, True)], 64)


def regnet() -> nn.Module:
    parts = [conv(3, 16, 3, 2), _bottleneck(16, 48, 2, 3, True), _bottleneck(48, 96, 2, 6, True)]
    return chain([*parts, _bottleneck(96, 96, 1, 6, True)], 96)


class PreAct(nn.Module):
    """BiT-style: norm and activation first, the shortcut taken after them when the width changes."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, before)
        self.first = nn.Conv2d(before, after // 2, 3, stride, 1)
        self.middle = nn.GroupNorm(8, after // 2)
        self.second = nn.Conv2d(after // 2, after, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, after, 1, stride) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm(x))
        skip = x if self.shortcut is None else self.shortcut(inner)
        return skip + self.second(F.relu(self.middle(self.first(inner))))


def bit() -> nn.Module:
    parts = [nn.Conv2d(3, 32, 3, padding=1), PreAct(32, 64, 2), PreAct(64, 64, 1), PreAct(64, 128, 2)]
    return chain([*parts, nn.GroupNorm(8, 128), nn.ReLU()], 128)


class DenseLayer(nn.Module):
    """x ↦ (x, g(x)) concatenated, pre-activated."""

    def __init__(self, before: int, growth: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(4 * growth)
        self.squeeze = nn.Conv2d(before, 4 * growth, 1, bias=False)
        self.grow = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.squeeze(F.relu(self.norm1(x)))
        return torch.cat([x, self.grow(F.relu(self.norm2(inner)))], 1)


def densenet() -> nn.Module:
    block1 = [DenseLayer(16 + 8 * i, 8) for i in range(4)]
    between = [nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 24, 1, bias=False), nn.AvgPool2d(2)]
    block2 = [DenseLayer(24 + 8 * i, 8) for i in range(4)]
    return chain([conv(3, 16), *block1, *between, *block2, nn.BatchNorm2d(56), nn.ReLU()], 56)


def _inception(before: int) -> nn.Module:
    return Branches(
        conv(before, 16, 1),
        nn.Sequential(conv(before, 16, 1), conv(16, 24, 3)),
        nn.Sequential(conv(before, 8, 1), conv(8, 16, (1, 5)), conv(16, 16, (5, 1))),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(before, 8, 1)),
    )


def inception() -> nn.Module:
    reduce = Branches(nn.MaxPool2d(3, 2, 1), conv(64, 32, 3, 2))
    return chain([conv(3, 32), _inception(32), _inception(64), reduce, _inception(96)], 64)


def _fire(before: int, squeeze: int, expand: int) -> nn.Module:
    wide = Branches(
        nn.Sequential(nn.Conv2d(squeeze, expand, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(squeeze, expand, 3, padding=1), nn.ReLU()),
    )
    return nn.Sequential(nn.Conv2d(before, squeeze, 1), nn.ReLU(), wide)


class SqueezeNet(nn.Module):
    """Fire modules; the classifier is a convolution, pooled last."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(_fire(32, 8, 32), _fire(64, 16, 32), nn.MaxPool2d(3, 2, ceil_mode=True), _fire(64, 16, 64)),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(128, CLASSES, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(F.adaptive_avg_pool2d(self.classifier(self.features(x)), 1), 1)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle: (G, C/G) -> (C/G, G)."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit1(nn.Module):
    """Grouped 1×1, shuffle, depthwise, grouped 1×1; a strided unit concatenates its pooled input."""

    def __init__(self, before: int, after: int, stride: int, groups: int = 4):
        super().__init__()
        outputs = after - before if stride == 2 else after
        self.groups, self.stride = groups, stride
        self.squeeze = conv(before, after // 2, 1, groups=groups)
        self.depthwise = conv(after // 2, after // 2, 3, stride, after // 2, nn.Identity)
        self.expand = conv(after // 2, outputs, 1, groups=groups, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(self.depthwise(shuffle(self.squeeze(x), self.groups)))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), inner], 1))
        return F.relu(x + inner)


def shufflenet_v1() -> nn.Module:
    return chain(
        [conv(3, 32), ShuffleUnit1(32, 96, 2), ShuffleUnit1(96, 96, 1), ShuffleUnit1(96, 192, 2)], 192
    )


class ShuffleUnit2(nn.Module):
    """Half of the channels pass by, the other half is transformed, then both are shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv(half, half, 1), conv(half, half, 3, 1, half, nn.Identity), conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return shuffle(torch.cat([left, self.branch(right)], 1), 2)


class ShuffleDown2(nn.Module):
    """Both branches see everything; the width doubles."""

    def __init__(self, before: int, half: int):
        super().__init__()
        self.left = nn.Sequential(conv(before, before, 3, 2, before, nn.Identity), conv(before, half, 1))
        self.right = nn.Sequential(
            conv(before, half, 1), conv(half, half, 3, 2, half, nn.Identity), conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)


def shufflenet_v2() -> nn.Module:
    parts = [conv(3, 16), ShuffleDown2(16, 24), ShuffleUnit2(48), ShuffleUnit2(48), ShuffleDown2(48, 48)]
    return chain([*parts, ShuffleUnit2(96), conv(96, 128, 1)], 128)


def _inverted(
    before: int,
    after: int,
    stride: int,
    ratio: int,
    act: type[nn.Module] = nn.ReLU6,
    squeeze: int = 0,
    gate: type[nn.Module] = nn.Sigmoid,
) -> nn.Module:
    """MobileNetV2's block: widen, depthwise, (squeeze-excite,) project; a sum where shapes agree."""
    wide = before * ratio
    parts = [conv(before, wide, 1, act=act), conv(wide, wide, 3, stride, wide, act)]
    if squeeze:
        parts.append(SqueezeExcite(wide, squeeze, act, gate))
    branch = nn.Sequential(*parts, conv(wide, after, 1, act=nn.Identity))
    return Residual(branch) if before == after and stride == 1 else branch


def mobilenet_v1() -> nn.Module:
    parts = [conv(3, 16, 3, 2)]
    for before, after, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        parts += [conv(before, before, 3, stride, before), conv(before, after, 1)]
    return chain(parts, 128)


def mobilenet_v2() -> nn.Module:
    parts = [conv(3, 16, act=nn.ReLU6), _inverted(16, 16, 1, 1), _inverted(16, 24, 2, 4)]
    parts += [_inverted(24, 24, 1, 4), _inverted(24, 32, 2, 4), _inverted(32, 32, 1, 4)]
    return chain([*parts, conv(32, 128, 1, act=nn.ReLU6)], 128)


def mobilenet_v3() -> nn.Module:
    parts = [conv(3, 16, act=nn.Hardswish), _inverted(16, 16, 1, 2, nn.ReLU, 8, nn.Hardsigmoid)]
    parts += [_inverted(16, 24, 2, 4, nn.ReLU), _inverted(24, 24, 1, 4, nn.Hardswish, 24, nn.Hardsigmoid)]
    top = nn.Sequential(nn.Linear(96, 128), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(128, CLASSES))
    return nn.Sequential(*parts, conv(24, 96, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), top)


def efficientnet() -> nn.Module:
    parts = [
        conv(3, 16, act=nn.SiLU),
        _inverted(16, 16, 1, 1, nn.SiLU, 4),
        _inverted(16, 24, 2, 6, nn.SiLU, 4),
    ]
    parts += [_inverted(24, 24, 1, 6, nn.SiLU, 8), _inverted(24, 40, 2, 6, nn.SiLU, 8)]
    return chain([*parts, conv(40, 160, 1, act=nn.SiLU)], 160)


def mnasnet() -> nn.Module:
    first = [conv(3, 16, 3, 2), conv(16, 16, 3, 1, 16), conv(16, 8, 1, act=nn.Identity)]
    parts = [
        _inverted(8, 16, 2, 3, nn.ReLU),
        _inverted(16, 16, 1, 3, nn.ReLU),
        _inverted(16, 40, 2, 6, nn.ReLU),
    ]
    return chain([*first, *parts, conv(40, 128, 1)], 128)


def _separable(before: int, after: int, stride: int = 1) -> nn.Module:
    depthwise = nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)
    return nn.Sequential(depthwise, conv(before, after, 1))


def xception() -> nn.Module:
    entry = Residual(
        nn.Sequential(_separable(32, 64), _separable(64, 64), nn.MaxPool2d(3, 2, 1)), _shortcut(32, 64, 2)
    )
    middle = Residual(nn.Sequential(nn.ReLU(), _separable(64, 64), _separable(64, 64), _separable(64, 64)))
    return chain([conv(3, 32), entry, middle, _separable(64, 128)], 128)


CNN: dict[str, Factory] = {
    build.__name__.lower(): lambda build=build: (build(), image())
    for build in (
        *(lenet, AlexNet, vgg, resnet_basic, resnet_bottleneck, resnext, seresnet, regnet, bit, densenet),
        *(inception, SqueezeNet, shufflenet_v1, shufflenet_v2, mobilenet_v1, mobilenet_v2, mobilenet_v3),
        *(efficientnet, mnasnet, xception),
    )
}
