"""Contractions: matrix products and convolutions, and the work they cost.

    mm        out[n, m]    = Σ_k x[n, k] w[k, m]                                    2·n·k·m FLOPs
    conv      out[b, (g, o), p] = Σ_{i, q} x[b, (g, i), p + q] w[(g, o), i, q]       2·b·Πp·|w|   FLOPs
    attention out[b, h, t, e] = Σ_s softmax_s(Σ_d q[b, h, t, d] k[b, h, s, d]) v[b, h, s, e]

The summed axis of x and w is one axis, read by the operand that is a view of a parameter. FLOPs are counted
as torch.utils.flop_counter counts them.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ..tape.axes import Axis
from ..tape.dims import ENDS, OFF
from ..tape.tape import Call, Dim, Dims, Operands, Read, Tape
from .elementwise import elementwise
from .table import fresh, rule, taint

COUNTED = {str(packet).replace(".", "::") for packet in flop_registry}  # fused attention on CPUs is not
MIXED = "a window slides over its positions (convolution, pooling)"
EXPERTS = "a router picks whole experts by index: one that is off would still be picked"


def _out(*dims: Dim, weight: bool = False) -> Dims:
    """Dimensions of a product: sources survive in products of parameters only."""
    return [dim if weight else dim.plain for dim in dims]


def _weight_first(call: Call, left: str, right: str) -> bool:
    return call.weight(left) and not call.weight(right)


def _operands(call: Call, left: str, right: str, dims: tuple[int, int] = (-1, -2)) -> Operands:
    """Both tensors, and over which dimension of each is summed."""
    return [
        (tensor, dim)
        for name, dim in zip((left, right), dims, strict=True)
        if isinstance(tensor := call.arguments[name], Tensor)
    ]


def _both_weights(call: Call, left: str, right: str) -> bool:
    return call.weight(left) and call.weight(right)


@rule("mm")
def mm(tape: Tape, call: Call) -> list[Dims]:
    (n, k), (k2, m) = call.dims("self"), call.dims("mat2")
    first, operands = _weight_first(call, "self", "mat2"), _operands(call, "self", "mat2")
    axis = tape.contract(k, k2, weight_first=first, operands=operands)
    tape.count("mm", 2, n.axis, axis, m.axis)
    return [_out(n, m, weight=_both_weights(call, "self", "mat2"))]


def _add_bias(tape: Tape, bias: Dims, out: Dims) -> Dims:
    for b, dim in zip(reversed(bias), reversed(out), strict=False):
        if b.size == dim.size:
            tape.unify(b.axis, dim.axis)
    return [dim.plain for dim in out]


@rule("addmm", "_addmm_activation")
def addmm(tape: Tape, call: Call) -> list[Dims]:
    (n, k), (k2, m) = call.dims("mat1"), call.dims("mat2")
    first, operands = _weight_first(call, "mat1", "mat2"), _operands(call, "mat1", "mat2")
    axis = tape.contract(k, k2, weight_first=first, operands=operands)
    tape.count("addmm", 2, n.axis, axis, m.axis)
    return [_add_bias(tape, call.dims("self"), _out(n, m))]


def _bmm(tape: Tape, call: Call, left: str, right: str, operator: str) -> Dims:
    """Where the slice of a parameter is zero for one of the batch, so is that one's product."""
    (b, n, k), (b2, k2, m) = call.dims(left), call.dims(right)
    first, operands = _weight_first(call, left, right), _operands(call, left, right)
    axis = tape.contract(k, k2, weight_first=first, operands=operands)
    batch = Dim(tape.unify(b.axis, b2.axis), b.computed.sources | b2.computed.sources)
    tape.count(operator, 2, batch.axis, n.axis, axis, m.axis)
    return [batch, *_out(n, m, weight=_both_weights(call, left, right))]


@rule("bmm")
def bmm(tape: Tape, call: Call) -> list[Dims]:
    return [_bmm(tape, call, "self", "mat2", "bmm")]


@rule("baddbmm")
def baddbmm(tape: Tape, call: Call) -> list[Dims]:
    return [_add_bias(tape, call.dims("self"), _bmm(tape, call, "batch1", "batch2", "baddbmm"))]


@rule("addbmm")
def addbmm(tape: Tape, call: Call) -> list[Dims]:
    b, *rest = _bmm(tape, call, "batch1", "batch2", "addbmm")
    tape.pin(b.axis, "matrices are summed over it")
    return [_add_bias(tape, call.dims("self"), rest)]


@rule("dot", "vdot")
def dot(tape: Tape, call: Call) -> list[Dims]:
    other = "tensor" if "tensor" in call.arguments else "other"
    tape.contract(call.dims("self")[0], call.dims(other)[0], weight_first=_weight_first(call, "self", other))
    return [[]]


@rule("mv")
def mv(tape: Tape, call: Call) -> list[Dims]:
    (n, k), (k2,) = call.dims("self"), call.dims("vec")
    tape.contract(k, k2, weight_first=_weight_first(call, "self", "vec"))
    return [_out(n, weight=_both_weights(call, "self", "vec"))]


@rule("addmv")
def addmv(tape: Tape, call: Call) -> list[Dims]:
    (n, k), (k2,) = call.dims("mat"), call.dims("vec")
    tape.contract(k, k2, weight_first=_weight_first(call, "mat", "vec"))
    return [_add_bias(tape, call.dims("self"), _out(n))]


@rule("linear")
def linear(tape: Tape, call: Call) -> list[Dims]:
    """Where torch does not split it into mm or addmm (some backends)."""
    *batch, k = call.dims("input")
    m, k2 = call.dims("weight")
    axis = tape.contract(k, k2)
    tape.count("mm", 2, *(dim.axis for dim in batch), axis, m.axis)
    out = _out(*batch, m)
    return [_add_bias(tape, call.dims("bias"), out) if call.has("bias") else out]


@rule("convolution", "cudnn_convolution", "mkldnn_convolution", "_convolution", "convolution_overrideable")
def convolution(tape: Tape, call: Call) -> list[Dims]:
    """Input channels are (group, i), output channels (group, o); the window mixes positions in space."""
    batch, channels, *space = call.dims("input")
    weight = call.dims("weight")
    groups, transposed = call.integer("groups"), bool(call.arguments.get("transposed", False))
    first, second, *kernel = weight
    group, inner = tape.regroup([channels.axis], [groups, channels.size // groups])
    weight_group, of_weight = tape.regroup([first.axis], [groups, first.size // groups])
    group = tape.unify(group, weight_group)
    read = Dim(of_weight, first.sources) if transposed else second
    made = second.axis if transposed else of_weight
    from_input = Dim(inner, channels.sources)
    tape.contract(from_input, read, weight_first=_weight_first(call, "input", "weight"))
    (out,) = tape.regroup([group, made], [groups * made.size])
    if call.has("bias"):
        tape.unify(out, call.dims("bias")[0].axis)
    tape.pin_dims(space, MIXED)
    tape.pin_dims(kernel, "")
    positions = call.shape[2:] if not transposed else [dim.size for dim in space]
    coefficient = 2 * math.prod(positions) * math.prod(dim.size for dim in kernel)
    tape.count("convolution", coefficient, batch.axis, first.axis, second.axis)
    return [[batch.plain, Dim(out), *fresh(call.shape[2:])]]


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
      "scaled_dot_product_attention")  # fmt: skip
def attention(tape: Tape, call: Call) -> list[Dims]:
    """Query heads are (key/value head, repeat); keys meet queries over the head dimension."""
    (*batch, heads, t, d), (*_, kv, s, dk), (*_, kv2, s2, e) = (
        call.dims(a) for a in ("query", "key", "value")
    )
    tape.contract(d.plain, dk.plain, operands=_operands(call, "query", "key", (-1, -1)))
    tape.unify(s.axis, s2.axis)
    tape.pin(s.axis, "softmax runs over it")
    tape.unify(kv.axis, kv2.axis)
    outer, _ = tape.regroup([heads.axis], [kv.size, heads.size // kv.size])
    tape.unify(outer, kv.axis)
    for other in (call.dims("key"), call.dims("value")):
        for mine, its in zip(batch, other, strict=False):
            tape.unify(mine.axis, its.axis)
    mask = "attn_mask" if call.has("attn_mask") else "attn_bias"
    if call.has(mask):
        for dim, its in zip((*batch, heads, t, s), _padded(call.dims(mask), len(batch) + 3), strict=True):
            if its.size == dim.size:
                tape.unify(dim.axis, its.axis)
    if call.name in COUNTED:
        outside = [dim.axis for dim in batch]
        tape.count("attention", 2, *outside, heads.axis, t.axis, d.axis, s.axis)
        tape.count("attention", 2, *outside, heads.axis, t.axis, s.axis, e.axis)
    return [[dim.plain for dim in (*batch, heads, t, e)]]


def _padded(dims: Dims, ndim: int) -> Dims:
    return [Dim(Axis(1))] * (ndim - len(dims)) + dims


@rule("_grouped_mm")
def grouped_mm(tape: Tape, call: Call) -> list[Dims]:
    """out[t, m] = Σ_k x[t, k] w[expert of t, k, m], rows in steps of 16 bytes; torch counts no FLOPs.

    Each row meets one expert, however many there are. The last product with one's weights is what reads it.
    """
    left, right = call.dims("self"), call.dims("mat2")
    if len(right) != 3:
        return taint(tape, call)
    (*lead, n, k), (expert, k2, m) = left, right
    tape.contract(k, k2, weight_first=_weight_first(call, "self", "mat2"))
    ends = call.dims("offs")[0] if call.has("offs") else Dim(Axis(1))
    if any(dim == ENDS for _, dim in ends.sources):  # no row is of a unit that is off
        axis = tape.unify(expert.axis, ends.axis)
        routers = frozenset((name, OFF) for name, _ in ends.sources)
        tape.picked(Read(axis, expert.parameters | routers), matrix=True)
    else:
        tape.pin(expert.axis, EXPERTS)
    tape.pin_dims(lead, EXPERTS)
    tape.aligned += [k.axis, m.axis]
    return [_add_bias(tape, call.dims("bias") if call.has("bias") else [], _out(*lead, n, m))]


@rule("_trilinear")
def trilinear(tape: Tape, call: Call) -> list[Dims]:
    """Σ i1·i2·i3 over `sumdim`, each unsqueezed at its `expand` dims (nn.Bilinear: i2 is the weight)."""
    columns: list[list[Dim]] = [[] for _ in range(len(call.dims("i2")) + len(call.integers("expand2")))]
    for number in "123":
        dims = list(call.dims(f"i{number}"))
        for place, column in enumerate(columns):
            if place not in call.integers(f"expand{number}"):
                column.append(dims.pop(0))
    out: Dims = []
    for place, column in enumerate(columns):
        axis = tape.unify(*(dim.axis for dim in column))
        reader = next((dim for dim in column if dim.parameters), None)
        if place not in call.integers("sumdim"):
            out.append(Dim(axis))
        elif reader is None:
            tape.pin(axis, "activations are multiplied and summed over it")
        else:
            tape.reads.append(Read(axis, reader.sources))
    return [out]


@rule("_cdist_forward")
def cdist(tape: Tape, call: Call) -> list[Dims]:
    (*batch, n, k), (*_, m, k2) = call.dims("x1"), call.dims("x2")
    tape.pin(tape.unify(k.axis, k2.axis), "distances are summed over it")
    return [[dim.plain for dim in (*batch, n, m)]]


@rule("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
def recurrent_cell(tape: Tape, call: Call) -> list[Dims]:
    """Fused cells (CUDA): gates are several times the hidden axis, one after the other."""
    state = call.dims("cx" if "cx" in call.arguments else "hx")
    hidden = state[-1].axis
    for name in ("input_gates", "hidden_gates", "input_bias", "hidden_bias"):
        if call.has(name):
            gates = call.dims(name)[-1].axis
            tape.unify(hidden, *tape.segment(gates, [hidden.size] * (gates.size // hidden.size)))
    return [[dim.plain for dim in state] for output in call.outputs if output.shape[-1] == hidden.size]


@rule("linalg_solve_triangular", "_linalg_solve_ex", "linalg_inv_ex", "linalg_cholesky_ex", "linalg_qr",
      "_linalg_svd", "_linalg_eigh", "_linalg_det", "_linalg_slogdet", "linalg_lu_factor_ex", "linalg_lu",
      "linalg_lu_solve", "linalg_matrix_exp", "triangular_solve", "linalg_eig", "linalg_pinv", "linalg_lstsq",
      "cholesky_inverse", "cholesky_solve")  # fmt: skip
def linear_algebra(tape: Tape, call: Call) -> list[Dims]:
    """Matrices in the last two dimensions are solved or factored as a whole; the batch is carried."""
    entries = [entry.dims for entry in call.entries.values()]
    lead = max((dims[:-2] for dims in entries), key=len)
    for dims in entries:
        tape.pin_dims(dims[-2:], "a matrix is solved or factored as a whole")
        for mine, its in zip(reversed(lead), reversed(dims[:-2]), strict=False):
            if mine.size == its.size:
                tape.unify(mine.axis, its.axis)
    plain = [dim.plain for dim in lead]
    return [[*plain, *fresh(output.shape[len(plain) :])] for output in call.outputs]


@rule("linalg_cross")
def cross(tape: Tape, call: Call) -> list[Dims]:
    tape.pin(call.dims("self")[call.integer("dim")].axis, "a cross product runs over it")
    tape.pin(call.dims("other")[call.integer("dim")].axis, "a cross product runs over it")
    return elementwise(tape, call)
