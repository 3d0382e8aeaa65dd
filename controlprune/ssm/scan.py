"""The linear recurrence, in chunks.

    x_t = a_t x_{t−1} + v_t,   x_{−1} = 0      v: [T, …] real or complex; a: of v's shape, [1, …] if constant
    dL/dv_t = G_t = dL/dx_t + ā_{t+1} G_{t+1},   dL/da_t = x̄_{t−1} G_t         (the same scan, from the end)

One operator for autograd, torch.compile and FLOP counters. Inside, T = K Q: all K chunks of Q steps run side
by side from zero, the last states of the chunks follow one another, and what came before a chunk is added to
it. That is Q + K dependent steps in place of T (Q ≈ √T where the state is small or the device wide), at twice
the work; where one step fills the machine by itself (a CPU's caches), Q = T is the plain loop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_scan"]

BUSY = 8192  # numbers in one step from which a CPU thread computes longer than it dispatches (about 4 µs)


def linear_scan(a: Tensor, v: Tensor) -> Tensor:
    """x_t for all t, along the first dimension; differentiable in both, any number of times."""
    if a.shape[1:] != v.shape[1:]:
        a = a.expand(len(a), *v.shape[1:])
    return _scan(a, v, False)


@torch.library.custom_op("controlprune::linear_scan", mutates_args=())
def _scan(a: Tensor, v: Tensor, reverse: bool) -> Tensor:
    chunk = _chunk(v)
    if chunk == len(v):
        return _one_by_one(a, v, reverse)
    if not reverse:
        return _chunked(a, v, chunk)
    ahead = torch.cat([a[:1], a[1:].flip(0)])  # x_t = a_{t+1} x_{t+1} + v_t, read from the end
    return _chunked(ahead, v.flip(0), chunk).flip(0)


@_scan.register_fake
def _(a: Tensor, v: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.reverse = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
    a, x = ctx.saved_tensors
    back = _scan(a.conj().resolve_conj(), grad, not ctx.reverse)
    if not ctx.needs_input_grad[0]:
        return None, back, None
    early, late = (back[:-1], x[1:]) if ctx.reverse else (back[1:], x[:-1])
    if len(a) == 1:
        return (late.conj() * early).sum(0, keepdim=True), back, None
    return torch.cat([torch.zeros_like(back[:1]), late.conj() * early]), back, None


_scan.register_autograd(_backward, setup_context=_remember)


def _chunk(v: Tensor) -> int:
    length, width = len(v), v[:1].numel()
    if length < 4 or (v.device.type == "cpu" and width >= BUSY):
        return length
    return math.isqrt(length - 1) + 1


def _one_by_one(a: Tensor, v: Tensor, reverse: bool) -> Tensor:
    """Step after step, in place; in reverse x_t = a_{t+1} x_{t+1} + v_t."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    factors, inputs, states = a.unbind(0), v.unbind(0), out.unbind(0)
    order = range(len(v) - 1, -1, -1) if reverse else range(len(v))
    before = None
    for t in order:
        if before is None:
            states[t].copy_(inputs[t])
        else:
            factor = factors[(t + 1 if reverse else t) if len(a) > 1 else 0]
            torch.addcmul(inputs[t], factor, before, out=states[t])
        before = states[t]
    return out


def _chunked(a: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Chunks side by side from zero, then their last states one after another, then both together."""
    length = len(v)
    short = -length % chunk
    x = torch.cat([v, v.new_zeros(short, *v.shape[1:])]).unflatten(0, (-1, chunk)).transpose(0, 1)
    if len(a) == 1:
        a = a[:, None].expand(chunk, 1, *a.shape[1:])
    else:
        a = torch.cat([a, a.new_ones(short, *a.shape[1:])]).unflatten(0, (-1, chunk)).transpose(0, 1)
    x = _one_by_one(a, x, reverse=False)  # [Q, K, …]
    decay = a.cumprod(0)
    carry = _one_by_one(decay[-1], x[-1], reverse=False)
    x[:, 1:].addcmul_(decay if len(decay[-1]) == 1 else decay[:, 1:], carry[:-1])
    return x.transpose(0, 1).flatten(0, 1)[:length].contiguous()
