"""Attention: grouped queries, fused projections, torch's own modules, linear attention, kept biases."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import SEQUENCE, Cases

__all__ = ["CASES"]


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


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.attend, self.up = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 9)
        self.out = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.out(self.up(x + self.attend(x, x, x, need_weights=False)[0]).relu())


class KeysOfItsOwn(TorchAttention):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)


class TorchEncoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=norm_first)
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x))


class HeadsByShape(nn.Module):
    """Heads from an attribute, the width of the stream written into the last reshape."""

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


class FusedGroupedQuery(nn.Module):
    """As Phi-3 has it: the queries of one product are as many numbers as its keys and values together."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.repeats = 4, 2, 6, 2
        self.qkv, self.o = nn.Linear(10, 48), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv, width = self.qkv(x), self.heads * self.head_dim
        inner = width + self.kv_heads * self.head_dim
        q, k, v = (
            z.view(b, t, -1, self.head_dim).transpose(1, 2)
            for z in (qkv[..., :width], qkv[..., width:inner], qkv[..., inner:])
        )
        k, v = (z.repeat_interleave(self.repeats, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


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


class CachedBias(nn.Module):
    """Attention biases by offset, gathered in eval mode and kept until the next training mode (LeViT)."""

    offsets: Tensor

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


CASES: Cases = {
    "gqa_repeat_interleave": (lambda: GroupedQuery(False), (2, 5, 10), [2, 2]),
    "gqa_native": (lambda: GroupedQuery(True), (2, 5, 10), [2, 2]),
    "gqa_fused": (FusedGroupedQuery, (2, 5, 10), [2, 2]),
    "multihead_attention": (TorchAttention, SEQUENCE, [3, 9, 12]),
    "multihead_keys": (KeysOfItsOwn, SEQUENCE, [9]),
    "encoder_layer": (lambda: TorchEncoder(False), (2, 5, 12), [3, 20]),
    "encoder_layer_prenorm": (lambda: TorchEncoder(True), (2, 5, 12), [3, 20]),
    "heads_by_shape": (HeadsByShape, (2, 5, 12), [4, 7]),
    "fused_heads": (FusedHeads, (2, 5, 12), [4]),
    "linear_attention": (LinearAttention, (2, 7, 6), [2, 5]),
    "cached_bias": (CachedBias, SEQUENCE, [4]),
}
