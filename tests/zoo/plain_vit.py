"""Families of image models with attention or token mixing, in our own words and at toy width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import CLASSES, Branches, ChannelNorm, Factory, Residual, SqueezeExcite, chain, conv, image


class Attention(nn.Module):
    """Fused qkv, `reshape(B, N, 3, h, d)`, optional norm of queries and keys, fused softmax or not."""

    def __init__(self, width: int, heads: int, fused: bool = True, norm: bool = False):
        super().__init__()
        self.heads, self.head_dim, self.fused = heads, width // heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


class Mlp(nn.Module):
    """Two linears around GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.gelu(self.enter(x)))


class LayerScale(nn.Module):
    """x ↦ γ x, one γ per channel (last dimension)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, mixer: nn.Module, hidden: int, scale: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer, self.mlp = mixer, Mlp(width, hidden)
        self.scale1 = LayerScale(width) if scale else nn.Identity()
        self.scale2 = LayerScale(width) if scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.mixer(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    """Strided convolution, flattened to (B, N, C)."""

    def __init__(self, width: int, patch: int = 8):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Class token (and a distillation token with its own head), learned positions, blocks."""

    def __init__(self, fused: bool = True, norm: bool = False, scale: bool = False, tokens: int = 1):
        super().__init__()
        self.patches = Patches(64)
        self.tokens = nn.Parameter(torch.zeros(1, tokens, 64))
        self.positions = nn.Parameter(torch.randn(1, 16 + tokens, 64) * 0.02)
        self.blocks = nn.Sequential(*(Block(64, Attention(64, 4, fused, norm), 128, scale) for _ in range(2)))
        self.norm = nn.LayerNorm(64)
        self.heads = nn.ModuleList([nn.Linear(64, CLASSES) for _ in range(tokens)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.norm(self.blocks(x))
        return torch.stack([h(x[:, i]) for i, h in enumerate(self.heads)]).mean(0)


def vit() -> nn.Module:
    return ViT()


def vit_qk_norm() -> nn.Module:
    return ViT(norm=True, scale=True)


def deit() -> nn.Module:
    return ViT(fused=False, tokens=2)


class TalkingHeads(nn.Module):
    """CaiT: the attention maps of all heads are mixed before and after the softmax."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(2)
        scores = self.after(scores).permute(0, 3, 1, 2)
        return self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, -1))


def cait() -> nn.Module:
    blocks = [Block(64, TalkingHeads(64, 4), 128, True) for _ in range(2)]
    return nn.Sequential(Patches(64), *blocks, nn.LayerNorm(64), TokenMean(), nn.Linear(64, CLASSES))


class CrossCovariance(nn.Module):
    """XCiT: attention between the channels of a head; queries and keys normalised over tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 4, 1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((scores @ v).permute(0, 3, 1, 2).reshape(batch, tokens, -1))


def xcit() -> nn.Module:
    blocks = [Block(64, CrossCovariance(64, 4), 128, True) for _ in range(2)]
    return nn.Sequential(Patches(64), *blocks, nn.LayerNorm(64), TokenMean(), nn.Linear(64, CLASSES))


class TokenMean(nn.Module):
    """(B, N, C) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class WindowAttention(nn.Module):
    """Attention inside 4×4 windows with a relative position table, over (B, H, W, C)."""

    def __init__(self, width: int, heads: int, shift: int):
        super().__init__()
        self.heads, self.shift, self.side = heads, shift, 4
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(49, heads) * 0.02)
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + 3
        self.register_buffer("index", (offset[0] * 7 + offset[1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        s, rows, columns = self.side, height // self.side, width // self.side
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, rows, s, columns, s, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, s * s, channels)
        q, k, v = self.qkv(x).reshape(-1, s * s, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(s * s, s * s, -1).permute(2, 0, 1)
        scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        x = self.proj((scores @ v).transpose(1, 2).reshape(-1, s * s, q.shape[1] * q.shape[3]))
        x = x.view(batch, rows, columns, s, s, -1).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, height, width, -1)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class PatchMerging(nn.Module):
    """Four neighbours concatenated, normed, projected to twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduce(self.norm(x))


class Swin(nn.Module):
    """Two stages of shifted windows."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.stage1 = nn.Sequential(*(Block(32, WindowAttention(32, 4, s), 64) for s in (0, 2)))
        self.merge = PatchMerging(32)
        self.stage2 = nn.Sequential(*(Block(64, WindowAttention(64, 4, s), 128) for s in (0, 2)))
        self.norm, self.classify = nn.LayerNorm(64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.patches(x).permute(0, 2, 3, 1))
        return self.classify(self.norm(self.stage2(self.merge(x))).mean((1, 2)))


class TokenMix(nn.Module):
    """An MLP across tokens, channel by channel."""

    def __init__(self, tokens: int, hidden: int):
        super().__init__()
        self.mlp = Mlp(tokens, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


def mixer() -> nn.Module:
    blocks = [Block(64, TokenMix(16, 32), 128) for _ in range(2)]
    return nn.Sequential(Patches(64), *blocks, nn.LayerNorm(64), TokenMean(), nn.Linear(64, CLASSES))


class Affine(nn.Module):
    """ResMLP's replacement for a norm: α x + β."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class ResMlpBlock(nn.Module):
    """Linear across tokens, MLP across channels, both scaled."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.norm1, self.norm2 = Affine(width), Affine(width)
        self.across, self.mlp = nn.Linear(tokens, tokens), Mlp(width, 2 * width)
        self.scale = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale(self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.mlp(self.norm2(x))


def resmlp() -> nn.Module:
    return nn.Sequential(
        *(
            Patches(64),
            ResMlpBlock(64, 16),
            ResMlpBlock(64, 16),
            Affine(64),
            TokenMean(),
            nn.Linear(64, CLASSES),
        )
    )


class GatedMlp(nn.Module):
    """gMLP: half of the hidden units gate the other half after a linear across tokens."""

    def __init__(self, width: int, hidden: int, tokens: int):
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.gate_norm, self.across = nn.LayerNorm(hidden // 2), nn.Linear(tokens, tokens)
        self.leave = nn.Linear(hidden // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = F.gelu(self.enter(self.norm(x))).chunk(2, -1)
        gate = self.across(self.gate_norm(gate).transpose(-1, -2)).transpose(-1, -2)
        return x + self.leave(value * gate)


def gmlp() -> nn.Module:
    blocks = [GatedMlp(64, 192, 16) for _ in range(2)]
    return nn.Sequential(Patches(64), *blocks, nn.LayerNorm(64), TokenMean(), nn.Linear(64, CLASSES))


class LevitAttention(nn.Module):
    """Linear–BatchNorm projections; keys narrower than values; a bias per head and offset."""

    def __init__(self, width: int, heads: int, key: int):
        super().__init__()
        self.heads, self.key, self.value = heads, key, 2 * key
        self.qkv = nn.Linear(width, heads * 4 * key, bias=False)
        self.norm = nn.BatchNorm1d(heads * 4 * key)
        self.proj, self.proj_norm = nn.Linear(heads * 2 * key, width, bias=False), nn.BatchNorm1d(width)
        self.biases = nn.Parameter(torch.randn(heads, 16) * 0.1)
        place = torch.arange(16)
        self.register_buffer("offsets", (place[:, None] - place[None]).abs())

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x)
        qkv = self.norm(qkv.flatten(0, 1)).reshape_as(qkv).view(batch, tokens, self.heads, -1)
        q, k, v = qkv.split([self.key, self.key, self.value], 3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        scores = (q @ k * self.key**-0.5 + self.biases[:, self.offsets]).softmax(-1)
        mixed = (scores @ v).transpose(1, 2).reshape(batch, tokens, self.heads * self.value)
        out = self.proj(F.hardswish(mixed))
        return x + self.proj_norm(out.flatten(0, 1)).reshape_as(out)


def levit() -> nn.Module:
    stem = [conv(3, 16, 3, 2, act=nn.Hardswish), conv(16, 32, 3, 2, act=nn.Hardswish), conv(32, 64, 3, 2)]
    body = [
        nn.Flatten(2),
        Transpose(),
        LevitAttention(64, 4, 8),
        Residual(Mlp(64, 128)),
        LevitAttention(64, 4, 8),
    ]
    return nn.Sequential(*stem, *body, TokenMean(), nn.BatchNorm1d(64), nn.Linear(64, CLASSES))


class Transpose(nn.Module):
    """(B, C, N) -> (B, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class PoolMixer(nn.Module):
    """avgpool(x) − x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


class PoolBlock(nn.Module):
    """PoolFormer: GroupNorm(1), pooling, convolutional MLP, layer scale."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2, self.pool = nn.GroupNorm(1, width), nn.GroupNorm(1, width), PoolMixer()
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))
        self.scale = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.unsqueeze(-1).unsqueeze(-1)
        x = x + scale * self.pool(self.norm1(x))
        return x + scale * self.mlp(self.norm2(x))


def poolformer() -> nn.Module:
    down = nn.Conv2d(32, 64, 3, 2, 1)
    return chain(
        [nn.Conv2d(3, 32, 7, 4, 2), PoolBlock(32), PoolBlock(32), down, PoolBlock(64), nn.GroupNorm(1, 64)],
        64,
    )


class SplitDepthwise(nn.Module):
    """EdgeNeXt's encoder: splits through a chain of depthwise convolutions, then channel attention."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        part = width // 4
        self.steps = nn.ModuleList([nn.Conv2d(part, part, 3, 1, 1, groups=part) for _ in range(3)])
        self.norm, self.mixer = nn.LayerNorm(width), CrossCovariance(width, heads)
        self.norm2, self.mlp, self.part = nn.LayerNorm(width), Mlp(width, 2 * width), part

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.part, 1)
        done, last = [], None
        for step, part in zip(self.steps, parts, strict=False):
            last = step(part if last is None else last + part)
            done.append(last)
        y = torch.cat([*done, parts[3]], 1)
        batch, channels, height, width = y.shape
        y = y.reshape(batch, channels, height * width).permute(0, 2, 1)
        y = y + self.mixer(self.norm(y))
        y = self.mlp(self.norm2(y)).transpose(1, 2).reshape(batch, channels, height, width)
        return x + y


def edgenext() -> nn.Module:
    return chain(
        [
            nn.Conv2d(3, 32, 4, 4),
            ChannelNorm(32),
            SplitDepthwise(32),
            nn.Conv2d(32, 64, 2, 2),
            SplitDepthwise(64),
        ],
        64,
    )


class MapAttention(nn.Module):
    """Multi-head self-attention over an NCHW map with 1×1 projections (CoAtNet, U-Net bottlenecks)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(1, width), heads
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        inner = self.norm(x)
        q, k, v = (f(inner).view(batch, self.heads, -1, height * width) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bhcn,bhcm->bhnm", q, k).softmax(-1)
        mixed = torch.einsum("bhnm,bhcm->bhcn", scores, v)
        return x + self.proj(mixed.reshape(batch, -1, height, width))


def coatnet() -> nn.Module:
    wide = nn.Sequential(
        *(nn.BatchNorm2d(32), conv(32, 128, 1, act=nn.GELU), conv(128, 128, 3, 1, 128, nn.GELU)),
        *(SqueezeExcite(128, 8, nn.SiLU), nn.Conv2d(128, 32, 1)),
    )
    return chain(
        [conv(3, 32, 3, 2), Residual(wide), conv(32, 64, 3, 2), MapAttention(64, 4), MapAttention(64, 4)], 64
    )


class MobileVitBlock(nn.Module):
    """Convolve, unfold into patches, attend across patches, fold back, fuse with the input."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.enter = nn.Sequential(
            conv(channels, channels, act=nn.SiLU), nn.Conv2d(channels, width, 1, bias=False)
        )
        self.blocks = nn.Sequential(Block(width, Attention(width, 4), 2 * width), nn.LayerNorm(width))
        self.leave, self.fuse = (
            conv(width, channels, 1, act=nn.SiLU),
            conv(2 * channels, channels, act=nn.SiLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        batch, width, rows, columns = y.shape
        y = y.reshape(batch * width * (rows // 2), 2, columns // 2, 2).transpose(1, 2)
        y = y.reshape(batch, width, rows * columns // 4, 4).transpose(1, 3).reshape(batch * 4, -1, width)
        y = self.blocks(y).contiguous().view(batch, 4, rows * columns // 4, -1)
        y = y.transpose(1, 3).reshape(batch * width * (rows // 2), columns // 2, 2, 2)
        y = y.transpose(1, 2).reshape(batch, width, rows, columns)
        return self.fuse(torch.cat([x, self.leave(y)], 1))


def mobilevit() -> nn.Module:
    return chain(
        [conv(3, 16, 3, 2, act=nn.SiLU), conv(16, 32, 3, 2), MobileVitBlock(32, 48), conv(32, 96, 1)], 96
    )


class ReducedAttention(nn.Module):
    """PVT: keys and values from a strided convolution of the map."""

    def __init__(self, width: int, heads: int, reduction: int):
        super().__init__()
        self.heads, self.q, self.kv = heads, nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.reduce, self.norm = nn.Conv2d(width, width, reduction, reduction), nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        side = int(tokens**0.5)
        q = self.q(x).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
        short = self.reduce(x.transpose(1, 2).reshape(batch, width, side, side)).flatten(2).transpose(1, 2)
        k, v = (
            self.kv(self.norm(short))
            .reshape(batch, -1, 2, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.proj(mixed)


def pvt() -> nn.Module:
    blocks = [Block(48, ReducedAttention(48, 3, 2), 96) for _ in range(2)]
    return nn.Sequential(Patches(48, 4), *blocks, nn.LayerNorm(48), TokenMean(), nn.Linear(48, CLASSES))


def convmixer() -> nn.Module:
    mix = [
        nn.Sequential(
            Residual(
                nn.Sequential(nn.Conv2d(48, 48, 5, padding=2, groups=48), nn.GELU(), nn.BatchNorm2d(48))
            ),
            *(nn.Conv2d(48, 48, 1), nn.GELU(), nn.BatchNorm2d(48)),
        )
        for _ in range(2)
    ]
    return chain([nn.Conv2d(3, 48, 4, 4), nn.GELU(), nn.BatchNorm2d(48), *mix], 48)


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder over patches (MHA's and the layer's fused fast paths in eval)."""

    def __init__(self, norm_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.1, "gelu", batch_first=True, norm_first=norm_first)
        self.patches = Patches(64)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classify = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.encoder(self.patches(x)).mean(1))


def torch_encoder() -> nn.Module:
    return TorchEncoder(norm_first=False)


def torch_encoder_prenorm() -> nn.Module:
    return TorchEncoder(norm_first=True)


class Detr(nn.Module):
    """A convolutional backbone, nn.Transformer with learned queries, two heads; a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 32, 3, 2), conv(32, 64, 3, 2), nn.Conv2d(64, 48, 1))
        self.queries = nn.Embedding(5, 48)
        self.positions = nn.Parameter(torch.randn(1, 64, 48))
        self.transformer = nn.Transformer(48, 4, 1, 1, 96, batch_first=True)
        self.classify, self.box = nn.Linear(48, CLASSES), nn.Sequential(Mlp(48, 64), nn.Linear(48, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        memory = self.backbone(x).flatten(2).permute(0, 2, 1) + self.positions
        out = self.transformer(memory, self.queries.weight.unsqueeze(0).repeat(x.size(0), 1, 1))
        return {"logits": self.classify(out), "boxes": self.box(out).sigmoid()}


class HybridStem(nn.Module):
    """Parallel convolution and attention branches, concatenated (MixFormer, iFormer)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32, 3, 4)
        self.mix = Branches(
            nn.Conv2d(32, 32, 3, padding=1, groups=32), MapAttention(32, 4), nn.MaxPool2d(3, 1, 1)
        )
        self.fuse = conv(96, 64, 1, act=nn.GELU)
        self.classify = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.fuse(self.mix(self.stem(x))).amax((2, 3)))


VIT: dict[str, Factory] = {
    build.__name__.lower(): lambda build=build: (build(), image())
    for build in (
        *(
            vit,
            vit_qk_norm,
            deit,
            cait,
            xcit,
            Swin,
            mixer,
            resmlp,
            gmlp,
            levit,
            poolformer,
            edgenext,
            coatnet,
        ),
        *(mobilevit, pvt, convmixer, torch_encoder, torch_encoder_prenorm, Detr, HybridStem),
    )
}
