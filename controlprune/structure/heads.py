"""nn.MultiheadAttention whose heads have a size of their own.

torch takes the size of a head from embed_dim / num_heads, so that neither a head nor a unit of the width
around it can leave. Here H heads of D numbers each read a width E and write one, whatever H·D and E are::

    q, k, v = x W_q, x W_k, x W_v     each (B, H, L, D)
    y = softmax(q kᵀ / √D + mask) v   (B, H, L, D)  ->  (B, L, H·D) W_o

Same parameters under the same names, same arguments and answers; `num_heads` and `embed_dim` say what is
there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .standins import StandIn

__all__ = ["OwnHeads"]


class OwnHeads(StandIn):
    """Stands in for nn.MultiheadAttention."""

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    _qkv_same_embed_dim: bool
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    out_proj: nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint on attn_mask: give that as well")
        batched = query.dim() == 3
        q, k, v = (self._by_head(x, batched) for x in self._projected(query, key, value))
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        mask = _merged(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) * math.sqrt(1.0 / self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
        else:
            weights = None
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _by_head(self, x: Tensor, batched: bool) -> Tensor:
        """(…, H·D) in the caller's layout -> (B, H, L, D)."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as numbers to add to scores (B, H, L, S); torch's give one for all, or B·H of them."""
    parts = []
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, q.dtype)
        parts.append(attn_mask.unflatten(0, (-1, q.shape[1])) if _per_head(attn_mask) else attn_mask)
    if key_padding_mask is not None:
        parts.append(_additive(key_padding_mask, q.dtype).view(-1, 1, 1, key_padding_mask.shape[-1]))
    return sum(parts[1:], parts[0]) if parts else None


def _per_head(mask: Tensor) -> bool:
    return mask.dim() == 3 and mask.shape[0] > 1


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True = not to be looked at, as torch has it."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
