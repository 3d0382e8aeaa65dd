"""More convolutional families: aggregation, multi-scale, re-parametrised and encoder–decoder nets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import CLASSES, ChannelNorm, Factory, Residual, SqueezeExcite, chain, conv, image


class ConvNextBlock(nn.Module):
    """Depthwise 7×7, LayerNorm over channels, two linears, layer scale."""

    def __init__(self, channels: int, global_response: bool = False):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.response = nn.Parameter(torch.zeros(2, 4 * channels)) if global_response else None

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.widen(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        if self.response is not None:
            strength = inner.norm(dim=(1, 2), keepdim=True)
            strength = strength / (strength.mean(-1, keepdim=True) + 1e-6)
            inner = self.response[0] * (inner * strength) + self.response[1] + inner
        return x + (self.scale * self.narrow(inner)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    stem = [nn.Conv2d(3, 32, 4, 4), ChannelNorm(32)]
    down = [ChannelNorm(32), nn.Conv2d(32, 64, 2, 2)]
    return chain([*stem, ConvNextBlock(32), ConvNextBlock(32), *down, ConvNextBlock(64), ChannelNorm(64)], 64)


def convnext_v2() -> nn.Module:
    return chain(
        [nn.Conv2d(3, 32, 4, 4), ConvNextBlock(32, True), ConvNextBlock(32, True), ChannelNorm(32)], 32
    )


def _basic(channels: int) -> nn.Module:
    return Residual(
        nn.Sequential(conv(channels, channels), conv(channels, channels, act=nn.Identity)), None, nn.ReLU()
    )


class HRNet(nn.Module):
    """Three resolutions in parallel, exchanged by sums of strided and upsampled 1×1 paths."""

    widths = (16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.down = nn.ModuleList([conv(16, 32, 3, 2), conv(32, 64, 3, 2)])
        self.levels = nn.ModuleList([nn.Sequential(_basic(w), _basic(w)) for w in self.widths])
        self.up = nn.ModuleDict()
        for fine in range(3):
            for coarse in range(fine + 1, 3):
                self.up[f"{coarse}{fine}"] = conv(self.widths[coarse], self.widths[fine], 1, act=nn.Identity)
        self.fuse = conv(sum(self.widths), 64, 1)
        self.classify = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        maps = [level(m) for level, m in zip(self.levels, maps, strict=True)]
        mixed = []
        for fine, fine_map in enumerate(maps):
            total = fine_map
            for coarse in range(fine + 1, 3):
                lifted = self.up[f"{coarse}{fine}"](maps[coarse])
                total = total + F.interpolate(lifted, scale_factor=2 ** (coarse - fine), mode="nearest")
            mixed.append(F.relu(total))
        size = mixed[0].shape[-2:]
        same = [
            mixed[0],
            *(F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in mixed[1:]),
        ]
        return self.classify(self.fuse(torch.cat(same, 1)).mean((2, 3)))


class UNet(nn.Module):
    """Encoder, decoder with transposed convolutions, skip concatenations, dense output."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.ModuleList([self._double(3, 16), self._double(16, 32), self._double(32, 64)])
        self.lift = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.decode = nn.ModuleList([self._double(64, 32), self._double(32, 16)])
        self.out = nn.Conv2d(16, 4, 1)

    @staticmethod
    def _double(before: int, after: int) -> nn.Module:
        return nn.Sequential(conv(before, after), conv(after, after))

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, encode in enumerate(self.encode):
            x = encode(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for lift, decode in zip(self.lift, self.decode, strict=True):
            x = decode(torch.cat([skips.pop(), lift(x)], 1))
        return self.out(x)


class GhostConv(nn.Module):
    """Half of the maps computed, the other half cheaply derived from them (depthwise)."""

    def __init__(self, before: int, after: int, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.primary = conv(before, after // 2, 1, act=act)
        self.cheap = conv(after // 2, after // 2, 3, 1, after // 2, act)
        self.outputs = after

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], 1)[:, : self.outputs]


def _ghost(before: int, wide: int, after: int, stride: int) -> nn.Module:
    middle = (
        [conv(wide, wide, 3, 2, wide, nn.Identity), SqueezeExcite(wide, wide // 4)] if stride == 2 else []
    )
    branch = nn.Sequential(GhostConv(before, wide), *middle, GhostConv(wide, after, nn.Identity))
    if before == after and stride == 1:
        return Residual(branch)
    shortcut = nn.Sequential(
        conv(before, before, 3, stride, before, nn.Identity), conv(before, after, 1, act=nn.Identity)
    )
    return Residual(branch, shortcut)


def ghostnet() -> nn.Module:
    return chain(
        [conv(3, 16), _ghost(16, 32, 16, 1), _ghost(16, 64, 32, 2), _ghost(32, 96, 32, 1), conv(32, 96, 1)],
        96,
    )


class CrossStage(nn.Module):
    """CSP: one path goes through the blocks, one passes by; both are concatenated and mixed."""

    def __init__(self, before: int, after: int, depth: int, split: bool = False):
        super().__init__()
        self.split = split
        self.down = conv(before, after, 3, 2, act=nn.SiLU)
        half = after // 2
        self.enter = conv(after, after, 1, act=nn.SiLU) if split else conv(after, half, 1, act=nn.SiLU)
        self.by = nn.Identity() if split else conv(after, half, 1, act=nn.SiLU)
        self.blocks = nn.Sequential(
            *(
                Residual(nn.Sequential(conv(half, half, 1, act=nn.SiLU), conv(half, half, act=nn.SiLU)))
                for _ in range(depth)
            )
        )
        self.mix = conv(after, after, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        if self.split:
            passing, entering = self.enter(x).split(x.size(1) // 2, 1)
        else:
            passing, entering = self.by(x), self.enter(x)
        return self.mix(torch.cat([self.blocks(entering), passing], 1))


def csp_darknet() -> nn.Module:
    return chain([conv(3, 16, act=nn.SiLU), CrossStage(16, 32, 1), CrossStage(32, 64, 2)], 64)


def csp_split() -> nn.Module:
    return chain([conv(3, 16, act=nn.SiLU), CrossStage(16, 32, 1, True), CrossStage(32, 64, 2, True)], 64)


class YoloC2f(nn.Module):
    """Chunk in two, each block's output is kept, everything concatenated."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.enter = conv(channels, channels, 1, act=nn.SiLU)
        self.blocks = nn.ModuleList(
            [Residual(conv(channels // 2, channels // 2, act=nn.SiLU)) for _ in range(depth)]
        )
        self.leave = conv((2 + depth) * channels // 2, channels, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        kept = list(self.enter(x).chunk(2, 1))
        kept.extend(block(kept[-1]) for block in self.blocks)
        return self.leave(torch.cat(kept, 1))


class SpatialPyramid(nn.Module):
    """SPPF: max pools of max pools, concatenated."""

    def __init__(self, channels: int):
        super().__init__()
        self.enter = conv(channels, channels // 2, 1, act=nn.SiLU)
        self.leave = conv(2 * channels, channels, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        pools = [self.enter(x)]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        return self.leave(torch.cat(pools, 1))


class Yolo(nn.Module):
    """Backbone, top-down neck with concatenation, two detection maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3, 2, act=nn.SiLU), YoloC2f(16, 1))
        self.deep = nn.Sequential(conv(16, 32, 3, 2, act=nn.SiLU), YoloC2f(32, 2), SpatialPyramid(32))
        self.neck = nn.Sequential(conv(48, 32, 1, act=nn.SiLU), YoloC2f(32, 1))
        self.fine, self.coarse = nn.Conv2d(32, 12, 1), nn.Conv2d(32, 12, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stem = self.stem(x)
        deep = self.deep(stem)
        neck = self.neck(torch.cat([F.interpolate(deep, scale_factor=2.0), stem], 1))
        return {"fine": self.fine(neck), "coarse": self.coarse(deep).flatten(2)}


class DeepTree(nn.Module):
    """DLA: two blocks whose outputs (and the input) are aggregated by a 1×1 root."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.left = Residual(
            nn.Sequential(conv(before, after, 3, 2), conv(after, after, act=nn.Identity)),
            conv(before, after, 1, 2, act=nn.Identity),
            nn.ReLU(),
        )
        self.right = _basic(after)
        self.root = conv(2 * after + before, after, 1, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        right = self.right(left)
        aggregate = self.root(torch.cat([right, left, F.max_pool2d(x, 2)], 1))
        return F.relu(aggregate + right)


def dla() -> nn.Module:
    return chain([conv(3, 16), DeepTree(16, 32), DeepTree(32, 64)], 64)


class OneShot(nn.Module):
    """VoVNet: a chain of convolutions, all of them concatenated once, gated, added to the input."""

    def __init__(self, before: int, inner: int, after: int, depth: int = 3):
        super().__init__()
        self.layers = nn.ModuleList([conv(before if i == 0 else inner, inner) for i in range(depth)])
        self.mix = conv(before + depth * inner, after, 1)
        self.gate = nn.Linear(after, after)
        self.add = before == after

    def forward(self, x: Tensor) -> Tensor:
        kept = [x]
        for layer in self.layers:
            kept.append(layer(kept[-1]))
        mixed = self.mix(torch.cat(kept, 1))
        gate = F.hardsigmoid(self.gate(mixed.mean((2, 3))))
        mixed = mixed * gate[:, :, None, None]
        return mixed + x if self.add else mixed


def vovnet() -> nn.Module:
    return chain([conv(3, 16), OneShot(16, 16, 48), nn.MaxPool2d(2), OneShot(48, 24, 48)], 48)


class Res2Block(nn.Module):
    """The inner width split in four; each part also sees the part before it."""

    def __init__(self, channels: int, part: int):
        super().__init__()
        self.enter, self.leave = conv(channels, 4 * part, 1), conv(4 * part, channels, 1, act=nn.Identity)
        self.steps = nn.ModuleList([conv(part, part) for _ in range(3)])
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.enter(x), self.part, 1)
        done = [parts[0]]
        for i, step in enumerate(self.steps):
            done.append(step(parts[i + 1] if i == 0 else parts[i + 1] + done[-1]))
        return F.relu(x + self.leave(torch.cat(done, 1)))


def res2net() -> nn.Module:
    return chain([conv(3, 32), Res2Block(32, 8), conv(32, 64, 3, 2), Res2Block(64, 16)], 64)


class ScaledConv(nn.Conv2d):
    """NFNet: weight-standardised per output channel, with a gain."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(before, after, kernel, stride, kernel // 2, groups=groups)
        self.gain = nn.Parameter(torch.ones(after, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fan = self.weight[0].numel()
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(torch.clamp(variance * fan, min=1e-4)) * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormFree(nn.Module):
    """Residual block without norms: α·branch(β·gelu(x)) + x."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.first, self.last = ScaledConv(channels, inner, 1), ScaledConv(inner, channels, 1)
        self.middle = ScaledConv(inner, inner, 3, groups=2)
        self.squeeze = SqueezeExcite(channels, channels // 4)
        self.skip_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(F.gelu(x) * 1.7)
        inner = self.last(F.gelu(self.middle(F.gelu(inner) * 1.7)) * 1.7)
        return x + self.squeeze(inner) * 2.0 * 0.2 * (1 + self.skip_gain)


def nfnet() -> nn.Module:
    parts = [ScaledConv(3, 32, 3, 2), NormFree(32, 32), NormFree(32, 32), nn.GELU(), ScaledConv(32, 64, 3, 2)]
    return chain([*parts, NormFree(64, 32), nn.GELU()], 64)


class RepBlock(nn.Module):
    """RepVGG in training form: 3×3, 1×1 and identity branches, each with its BatchNorm, summed."""

    def __init__(self, before: int, after: int, stride: int = 1):
        super().__init__()
        self.wide = conv(before, after, 3, stride, act=nn.Identity)
        self.point = conv(before, after, 1, stride, act=nn.Identity)
        self.same = nn.BatchNorm2d(after) if before == after and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        total = self.wide(x) + self.point(x)
        return F.relu(total if self.same is None else total + self.same(x))


def repvgg() -> nn.Module:
    return chain([RepBlock(3, 32), RepBlock(32, 32), RepBlock(32, 64, 2), RepBlock(64, 64)], 64)


class SelectiveKernel(nn.Module):
    """SKNet: two kernels, softmax over the branches per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.paths = nn.ModuleList([conv(channels, channels, 3), conv(channels, channels, 5)])
        self.reduce = nn.Linear(channels, channels // 2)
        self.choose = nn.ModuleList([nn.Linear(channels // 2, channels) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack([path(x) for path in self.paths], 1)
        code = F.relu(self.reduce(maps.sum(1).mean((2, 3))))
        weights = torch.stack([choose(code) for choose in self.choose], 1).softmax(1)
        return (maps * weights[..., None, None]).sum(1)


def sknet() -> nn.Module:
    parts = [
        conv(3, 32),
        Residual(nn.Sequential(conv(32, 16, 1), SelectiveKernel(16), conv(16, 32, 1)), None, nn.ReLU()),
    ]
    return chain([*parts, conv(32, 64, 3, 2), SelectiveKernel(64)], 64)


class DualPath(nn.Module):
    """DPN: some outputs are added to a residual path, the others concatenated to a dense path."""

    def __init__(self, before: int, shared: int, growth: int):
        super().__init__()
        self.branch = nn.Sequential(
            conv(before, 32, 1), conv(32, 32, 3, groups=4), conv(32, shared + growth, 1)
        )
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        added = x[:, : self.shared] + out[:, : self.shared]
        return torch.cat([added, x[:, self.shared :], out[:, self.shared :]], 1)


def dpn() -> nn.Module:
    return chain(
        [conv(3, 32), DualPath(32, 32, 8), DualPath(40, 32, 8), DualPath(48, 32, 8), conv(56, 64, 1)], 64
    )


class SuperResolution(nn.Module):
    """ESPCN: convolutions, then pixel shuffle to the output; a bilinear skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.body = conv(3, 32, 5, act=nn.Tanh), nn.Sequential(_basic(32), conv(32, 32))
        self.lift = nn.Sequential(nn.Conv2d(32, 16 * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(16))
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return skip + self.out(self.lift(self.body(self.enter(x))))


CNN2: dict[str, Factory] = {
    build.__name__.lower(): lambda build=build: (build(), image())
    for build in (
        *(convnext, convnext_v2, HRNet, UNet, ghostnet, csp_darknet, csp_split, Yolo, dla, vovnet, res2net),
        *(nfnet, repvgg, sknet, dpn, SuperResolution),
    )
}
