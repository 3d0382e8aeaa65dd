"""Small models, one per awkward case: what real code does that a layer table would miss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

__all__ = ["CASES"]


class PermuteFlatten(nn.Module):
    """Channels last, then flattened: units are the inner factor of the reader's columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).relu().permute(0, 2, 3, 1).flatten(1))


class ChannelShuffle(nn.Module):
    """Grouped convolutions with a shuffle between (2 groups of 8, then 2 of 8 again)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 16, 1, groups=2), nn.Conv2d(16, 12, 1, groups=2)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.out(self.second(x).relu())


class Flipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu().flip(-1)).relu())


class Twice(nn.Module):
    """One linear used twice: its rows and columns are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.same, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.out(self.same(self.same(x).relu()).relu())


class RawParameters(nn.Module):
    """einsum and matmul on parameters that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 3, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.last = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,ihk->bhk", x, self.up).sigmoid()
        return (torch.einsum("bhk,hkm->bm", hidden, self.down) * self.scale).tanh() @ self.last


class GroupedQuery(nn.Module):
    """Four query heads on two key/value heads, by repeat_interleave or by `enable_gqa`."""

    def __init__(self, native: bool) -> None:
        super().__init__()
        self.native, self.heads, self.kv_heads, self.head_dim, self.repeats = native, 4, 2, 6, 2
        self.q, self.k, self.v = nn.Linear(10, 24), nn.Linear(10, 12), nn.Linear(10, 12)
        self.o = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        if self.native:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (z.repeat_interleave(self.repeats, dim=1) for z in (k, v))
            scores = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1)
            out = scores @ v
        return self.o(out.transpose(1, 2).reshape(b, t, -1))


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class SqueezeExcite(nn.Module):
    """Inverted residual: expand, depthwise, squeeze-excite, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.reduce, self.restore = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.norm(self.expand(x)).relu())
        gate = self.restore(self.reduce(F.adaptive_avg_pool2d(y, 1)).relu())
        return x + self.project(y * gate.sigmoid())


class PreNorm(nn.Module):
    """LayerNorm on a residual stream: the stream stays, the inner width goes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.out(x + self.down(F.gelu(self.up(self.norm(x)))))


class Grouped(nn.Module):
    """GroupNorm: members share statistics, whole groups may go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.first(x)).relu())


class SoftUnits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).softmax(-1)).relu())


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(5, 8))
        self.second = parametrizations.weight_norm(nn.Conv1d(8, 6, 3, padding=1))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu().transpose(1, 2)).relu().mean(-1))


class FrozenBranch(nn.Module):
    """Concatenation of a trained branch with a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen, self.out = nn.Linear(5, 8), nn.Linear(5, 6), nn.Linear(14, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.trained(x), self.frozen(x)], -1).relu())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.cells = kind(5, 8, batch_first=True, **options)  # type: ignore[arg-type]
        wide = 8 * (2 if self.cells.bidirectional else 1)
        self.hidden, self.out = nn.Linear(wide, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.cells(x)[0]).relu())


class ProjectedLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(5, 8, proj_size=4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0])


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.attend, self.up = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 9)
        self.out = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.out(self.up(x + self.attend(x, x, x, need_weights=False)[0]).relu())


class TorchEncoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=norm_first)
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x))


class Lora(nn.Module):
    """A frozen weight and a trained low-rank update of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.base, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.b @ self.a
        return self.out(F.linear(self.first(x).relu(), weight, self.base.bias).relu())


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.down(self.up(x).relu()))


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).sigmoid() @ self.weight


class ChannelBuffer(nn.Module):
    """A buffer with one entry per channel, and a table of relative positions per head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)
        self.register_buffer("offset", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) + self.offset).relu())


class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 8, dtype=torch.cfloat))
        self.down = nn.Parameter(torch.randn(8, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.to(torch.cfloat) @ self.up
        return ((hidden * hidden.abs()) @ self.down).real


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(
            checkpoint(lambda z: self.second(self.first(z).relu()).relu(), x, use_reentrant=False)
        )


class Routed(nn.Module):
    """Mixture of experts: tokens are picked by index, experts run on what they got."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(3)
        )

    @staticmethod
    def _expert() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, choice = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (choice == number).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, expert(flat[token]) * weight[token, slot, None])
        return out.view_as(x)


class Scan(nn.Module):
    """A diagonal recurrence written as a loop (an SSM in plain torch)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = 8
        self.enter, self.out = nn.Linear(5, 16), nn.Linear(8, 3)
        self.log_decay, self.skip = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.enter(x).split([self.inner, self.inner], dim=-1)
        state = torch.zeros(x.shape[0], self.inner)
        states = []
        for t in range(x.shape[1]):
            state = torch.exp(-self.log_decay.exp()) * state + value[:, t]
            states.append(state + self.skip * value[:, t])
        return self.out(torch.stack(states, 1) * F.silu(gate))


class HeadsByShape(nn.Module):
    """Heads from an attribute, the width of the stream written into the last reshape: can't be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 7), nn.Linear(7, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))
        return x + self.down(self.up(x).relu())


class FusedHeads(nn.Module):
    """The same with the width left to the reshape: heads can go."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 3
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(out.reshape(b, t, self.heads * self.head_dim))


@torch.library.custom_op("controlprune_test::blur", mutates_args=())
def blur(x: Tensor) -> Tensor:
    """Somebody's kernel."""
    return x + x.roll(1, -1)


class Unknown(nn.Module):
    """An operator without a rule on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(blur(self.first(x))).relu())


class AuxiliaryHead(nn.Module):
    """In training mode a second head reads the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.aux = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.out(x) + self.aux(x) if self.training else self.out(x)


class AuxiliaryWritten(nn.Module):
    """The same with the hidden width written into the training branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 6)
        self.out, self.aux = nn.Linear(6, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        side = self.aux(x.view(-1, 2, 4)).sum(1) if self.training else 0.0
        return self.out(self.second(x).relu()) + side


class FixedFilter(nn.Module):
    """A blur per channel from a buffer, the number of groups written as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("blur", torch.randn(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.conv2d(self.first(x), self.blur, groups=8, padding=1))


class FreeFilter(FixedFilter):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.out(F.conv2d(x, self.blur, groups=x.shape[1], padding=1))


class Maxout(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.first, self.out = width, nn.Linear(5, 16), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        width = 8 if self.width < 0 else -1
        return self.out(self.first(x).view(len(x), width, 2).amax(-1))


class SpectralNorm(nn.Module):
    """σ of the weight depends on every row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(5, 8))
        self.second, self.out = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu()).relu())


class BilinearPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pair = nn.Linear(5, 8), nn.Linear(5, 6), nn.Bilinear(8, 6, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pair(self.a(x).relu(), self.b(x).tanh()).relu())


class LinearAttention(nn.Module):
    """States of keys × values, updated in a loop: the key width is summed, the value width is free."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.q, self.k = 2, nn.Linear(6, 8), nn.Linear(6, 8)
        self.v, self.o = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1) for f in (self.q, self.k, self.v))
        state = torch.zeros(b, self.heads, k.shape[-1], v.shape[-1])
        out = []
        for i in range(t):
            state = state + k[:, i, :, :, None].exp() * v[:, i, :, None, :]
            out.append((q[:, i, :, :, None] * state).sum(-2))
        return self.o(torch.stack(out, 1).flatten(2))


class Halves(nn.Module):
    """chunk and concat again, as detection networks do: the halves have one width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.a(x).chunk(2, 1))
        return self.out(torch.cat([*parts, self.m(parts[-1]).relu()], 1))


class PaddedShortcut(nn.Module):
    """Strided slice and zero channels on both sides (ResNet, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out((self.b(y.relu()) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).relu())


class Written(nn.Module):
    """A buffer filled piece by piece in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        both = x.new_empty(len(x), a.shape[1] + b.shape[1])
        both[:, : a.shape[1]] = a
        both[:, a.shape[1] :] = b
        return self.out(both.relu_())


class ScaledByWidth(nn.Module):
    """The width enters the values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out(x * x.shape[-1] ** -0.5)


class CachedBias(nn.Module):
    """Attention biases by offset, gathered in eval mode and kept until the next training mode (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, tokens = 4, 3, 7
        self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 5)
        self.biases, self.kept = nn.Parameter(torch.randn(4, tokens)), {}
        places = torch.arange(tokens)
        self.register_buffer("offsets", (places[:, None] - places).abs(), persistent=False)

    @torch.no_grad()
    def train(self, mode: bool = True) -> CachedBias:
        super().train(mode)
        if mode and self.kept:
            self.kept = {}
        return self

    def bias(self) -> Tensor:
        if self.training:
            return self.biases[:, self.offsets]
        if "cpu" not in self.kept:
            self.kept["cpu"] = self.biases[:, self.offsets]
        return self.kept["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, self.heads, -1).split([self.head_dim] * 3, dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        mixed = (q @ k + self.bias()).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))


class KeptFilter(nn.Module):
    """In eval mode the columns that read the first layer are kept too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.kept = nn.Linear(5, 8), nn.Linear(8, 6), None
        self.out = nn.Linear(6, 2)

    def train(self, mode: bool = True) -> KeptFilter:
        self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.training:
            self.kept = self.second.weight * 2
        return self.out(F.linear(self.first(x).relu(), self.kept, self.second.bias).relu())


class CellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.GRUCell(5, 8), nn.LSTMCell(8, 6), nn.Linear(6, 2)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        hidden, state = x.new_zeros(len(x), self.width), None
        for t in range(x.shape[1]):
            hidden = self.first(x[:, t], hidden)
            state = self.second(hidden, state)
        assert state is not None
        return self.out(state[0])


class DynamicWeights(nn.Module):
    """Weights mixed per example, the batch folded into groups (conditional convolution)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mixed = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(4, 6, 8, 3, 3))
        self.route, self.out = nn.Linear(8, 4), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        b, c, h, w = y.shape
        route = self.route(y.mean((2, 3))).softmax(-1)
        weight = (route @ self.mixed.view(4, -1)).view(-1, c, 3, 3)
        return self.out(F.conv2d(y.reshape(1, b * c, h, w), weight, padding=1, groups=b).view(b, -1, h, w))


class Transposed(nn.Module):
    """Encoder, transposed and grouped transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(3, 8, 4, 2, 1), nn.ConvTranspose1d(8, 12, 4, 2, 1)
        self.grouped, self.out = nn.ConvTranspose1d(12, 9, 3, 1, 1, groups=3), nn.Conv1d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return self.out(self.grouped(self.up(self.down(x).relu()).relu()).relu())


class Upscaled(nn.Module):
    """Sub-pixel convolution: (channel, r, r) become space."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 20, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.pixel_shuffle(self.second(self.first(x).relu()), 2).tanh())


class Dense(nn.Module):
    """Concatenations of concatenations, and a slice with numbers in the code: what it shifts stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 4, 3, padding=1)
        self.c, self.out = nn.Conv2d(13, 5, 1), nn.Conv2d(2 + 5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.a(x)], 1).relu()
        y = torch.cat([y, self.b(y)], 1).relu()
        return self.out(torch.cat([y[:, 9:11], self.c(y)], 1))


IMAGE, VECTOR, SEQUENCE = (2, 4, 8, 8), (3, 5), (2, 7, 5)

# name -> (factory, shape of the input or the tensor itself, sizes of the groups expected)
CASES = {
    "permute_flatten": (PermuteFlatten, (2, 3, 8, 8), [8]),
    "channel_shuffle": (ChannelShuffle, IMAGE, [2, 4, 6]),
    "flip": (Flipped, VECTOR, [6]),
    "twice": (Twice, VECTOR, [8]),
    "raw_parameters": (RawParameters, VECTOR, [3, 6, 8]),
    "gqa_repeat_interleave": (lambda: GroupedQuery(False), (2, 5, 10), [2, 2]),
    "gqa_native": (lambda: GroupedQuery(True), (2, 5, 10), [2, 2]),
    "swiglu": (SwiGlu, VECTOR, [8]),
    "squeeze_excite": (SqueezeExcite, IMAGE, [6, 12]),
    "pre_norm": (PreNorm, VECTOR, [12]),
    "group_norm": (Grouped, (2, 3, 8, 8), [4]),
    "softmax_units": (SoftUnits, VECTOR, [6]),
    "weight_norm": (WeightNorm, SEQUENCE, [6, 8]),
    "frozen_branch": (FrozenBranch, VECTOR, [8]),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), SEQUENCE, [6, 8]),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE, [6, 8]),
    "lstm_bidirectional": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), SEQUENCE, [6, 8]),
    "lstm_projected": (ProjectedLstm, SEQUENCE, []),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCE, [6, 8]),
    "multihead_attention": (TorchAttention, SEQUENCE, [9]),
    "encoder_layer": (lambda: TorchEncoder(False), (2, 5, 12), [20]),
    "encoder_layer_prenorm": (lambda: TorchEncoder(True), (2, 5, 12), [20]),
    "lora": (Lora, VECTOR, [4, 6, 8]),
    "tied_embedding": (TiedEmbedding, torch.arange(6).view(2, 3), [9]),
    "tied_autoencoder": (TiedAutoencoder, VECTOR, []),
    "channel_buffer": (ChannelBuffer, VECTOR, [8]),
    "complex": (ComplexWeights, VECTOR, [8]),
    "checkpoint": (Checkpointed, VECTOR, [6, 8]),
    "experts": (Routed, (2, 5, 6), [10, 10, 10]),
    "scan": (Scan, SEQUENCE, [8]),
    "heads_by_shape": (HeadsByShape, (2, 5, 12), [7]),
    "fused_heads": (FusedHeads, (2, 5, 12), [4]),
    "unknown_operator": (Unknown, VECTOR, [6]),
    "auxiliary_head": (AuxiliaryHead, VECTOR, [8]),
    "auxiliary_written": (AuxiliaryWritten, VECTOR, [6]),
    "fixed_filter": (FixedFilter, (2, 3, 8, 8), []),
    "free_filter": (FreeFilter, (2, 3, 8, 8), [8]),
    "maxout": (lambda: Maxout(1), VECTOR, [8]),
    "maxout_written": (lambda: Maxout(-1), VECTOR, []),
    "spectral_norm": (SpectralNorm, VECTOR, [6]),
    "bilinear": (BilinearPair, VECTOR, [6, 7, 8]),
    "linear_attention": (LinearAttention, (2, 7, 6), [2, 5]),
    "halves": (Halves, (2, 3, 8, 8), [8, 8]),
    "padded_shortcut": (PaddedShortcut, (2, 3, 8, 8), [8]),
    "written_in_place": (Written, VECTOR, [4, 8]),
    "scaled_by_width": (ScaledByWidth, VECTOR, []),
    "cached_bias": (CachedBias, SEQUENCE, [4]),
    "kept_filter": (KeptFilter, VECTOR, [6, 8]),
    "cell_loop": (CellLoop, SEQUENCE, [6, 8]),
    "dynamic_weights": (DynamicWeights, (2, 3, 8, 8), [6]),
    "transposed": (Transposed, (2, 3, 4, 4), [3, 3, 4, 8]),
    "pixel_shuffle": (Upscaled, (2, 3, 8, 8), [5, 6]),
    "dense": (Dense, (2, 3, 8, 8), [2, 5]),
}
