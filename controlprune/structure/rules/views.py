"""Views and rearrangements: the same entries under other indices; index spaces are regrouped exactly.

reshape      row-major product of the old dimensions = that of the new ones
split, cat   segments of an axis
expand       a new axis along which all entries are equal
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..tape.axes import Axis, concat, product
from ..tape.tape import Call, Dim, Dims, Tape
from .table import fresh, rule, taint

PICKED = "single positions of it are picked out by index (one expert; one of q, k and v)"


def _at(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def reshape_dims(tape: Tape, old: Dims, sizes: Sequence[int]) -> Dims:
    """The old dimensions regrouped to the new sizes, chunk by chunk between common boundaries."""
    if math.prod(sizes) == 0:
        return fresh(sizes)
    olds = [dim for dim in old if dim.size > 1]
    news = [size for size in sizes if size > 1]
    out: Dims = []
    while olds:
        taken, wanted = [olds.pop(0)], [news.pop(0)]
        while (left := math.prod(dim.size for dim in taken)) != (right := math.prod(wanted)):
            if left < right:
                taken.append(olds.pop(0))
            else:
                wanted.append(news.pop(0))
        if [dim.size for dim in taken] == wanted:
            out.extend(taken)
            continue
        sources = frozenset[tuple[str, int]]().union(*(dim.sources for dim in taken))
        out.extend(Dim(axis, sources) for axis in tape.regroup([dim.axis for dim in taken], wanted))
    return [out.pop(0) if size > 1 else Dim(Axis(1)) for size in sizes]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def view(tape: Tape, call: Call) -> list[Dims]:
    if "size" not in call.arguments:  # view.dtype
        return _view_dtype(tape, call)
    return [reshape_dims(tape, call.dims("self"), call.shape)]


def _view_dtype(tape: Tape, call: Call) -> list[Dims]:
    old = call.dims("self")
    if tuple(dim.size for dim in old) == tuple(call.shape):
        return [old]
    tape.pin(old[-1].axis, "its bytes are read as another type")
    return [[*old[:-1], *fresh(call.shape[-1:])]]


@rule("as_strided")
def as_strided(tape: Tape, call: Call) -> list[Dims]:
    """Row-major over the same shape is the same tensor (torch so ends a channels_last global pool)."""
    old, sizes, strides = call.dims("self"), call.integers("size"), call.integers("stride")
    wide = [d for d, size in enumerate(sizes) if size > 1]
    row_major = all(strides[d] == math.prod(sizes[d + 1 :]) for d in wide)
    if not call.name.endswith("_"):  # in place, its old strides are gone
        own = call.arguments["self"]
        assert isinstance(own, Tensor)
        row_major &= all(own.stride(d) == strides[d] for d in wide)
    if row_major and sizes == [dim.size for dim in old]:
        return [old]
    return taint(tape, call)


@rule("permute")
def permute(tape: Tape, call: Call) -> list[Dims]:
    old = call.dims("self")
    return [[old[d] for d in call.integers("dims")]]


@rule("t", "numpy_T", "adjoint")
def t(tape: Tape, call: Call) -> list[Dims]:
    return [list(reversed(call.dims("self")))]


@rule("transpose")
def transpose(tape: Tape, call: Call) -> list[Dims]:
    dims = list(call.dims("self"))
    if dims:
        a, b = (_at(call.integer(name), len(dims)) for name in ("dim0", "dim1"))
        dims[a], dims[b] = dims[b], dims[a]
    return [dims]


@rule("unsqueeze")
def unsqueeze(tape: Tape, call: Call) -> list[Dims]:
    dims = list(call.dims("self"))
    dims.insert(_at(call.integer("dim"), len(dims) + 1), Dim(Axis(1)))
    return [dims]


@rule("squeeze")
def squeeze(tape: Tape, call: Call) -> list[Dims]:
    old = call.dims("self")
    where = (
        range(len(old)) if "dim" not in call.arguments else [_at(d, len(old)) for d in call.integers("dim")]
    )
    return [[dim for d, dim in enumerate(old) if not (d in where and dim.size == 1)]]


@rule("expand", "expand_copy")
def expand(tape: Tape, call: Call) -> list[Dims]:
    """New and widened dimensions hold one value many times: a free axis."""
    old = call.dims("self")
    missing = len(call.shape) - len(old)
    return [
        [
            old[d - missing] if d >= missing and old[d - missing].size == size else Dim(Axis(size))
            for d, size in enumerate(call.shape)
        ]
    ]


@rule("repeat", "tile")
def repeat(tape: Tape, call: Call) -> list[Dims]:
    """[n] k times over is Product(k, n)."""
    old, times = call.dims("self"), call.integers("repeats")
    old = [Dim(Axis(1))] * (len(times) - len(old)) + old
    return [[Dim(product([Axis(k), dim.axis])) for k, dim in zip(times, old, strict=True)]]


def _pieces(tape: Tape, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Segments; equal ones that fill the axis are one index space, as `chunk` and `n // 2` count on it."""
    pieces = tape.segment(axis, sizes)
    if len(set(sizes)) == 1:
        tape.unify(*pieces)
    return pieces


def _piece(tape: Tape, axis: Axis, start: int, length: int) -> Axis:
    if 2 * length == axis.size and start in (0, length) and not tape.given:
        return _pieces(tape, axis, [length, length])[start // length]
    return tape.segment(axis, [start, length, axis.size - start - length])[1]


@rule("slice", "slice_copy")
def slice_(tape: Tape, call: Call) -> list[Dims]:
    """A segment; with a step s, position 0 of a Product(n/s, s)."""
    dims = list(call.dims("self"))
    d = _at(call.integer("dim"), len(dims))
    dim, length = dims[d], call.shape[d]
    if length == dim.size:
        return [dims]
    given = slice(call.arguments["start"], call.arguments["end"], call.integer("step"))
    start, _, step = given.indices(dim.size)
    if length == 0:
        axis = Axis(0)
    elif step == 1:
        axis = _piece(tape, dim.axis, start, length)
    elif dim.size % step == 0 and length == dim.size // step:
        axis, inner = tape.regroup([dim.axis], [length, step])
        tape.pin(inner, "")
    else:
        tape.pin(dim.axis, PICKED)
        axis = Axis(length, PICKED)
    dims[d] = Dim(axis, dim.sources)
    return [dims]


@rule("select", "select_copy")
def select(tape: Tape, call: Call) -> list[Dims]:
    """One position of the dimension: pinned once the result is used (`w[0].numel()` uses nothing)."""
    dims = list(call.dims("self"))
    gone = dims.pop(_at(call.integer("dim"), len(dims)))
    tape.pin_if_used(call, gone.axis, PICKED)
    return [dims]


@rule("unbind", "unbind_copy")
def unbind(tape: Tape, call: Call) -> list[Dims]:
    return select(tape, call) * len(call.outputs)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk",
      "tensor_split", "split_copy", "split_with_sizes_copy")  # fmt: skip
def split(tape: Tape, call: Call) -> list[Dims]:
    dims = call.dims("self")
    d = _at(call.integer("dim"), len(dims))
    pieces = _pieces(tape, dims[d].axis, [output.shape[d] for output in call.outputs])
    return [[*dims[:d], Dim(piece, dims[d].sources), *dims[d + 1 :]] for piece in pieces]


@rule("cat")
def cat(tape: Tape, call: Call) -> list[Dims]:
    inputs = [dims for dims in call.tensors("tensors") if len(dims) == len(call.shape)]
    d = _at(call.integer("dim"), len(call.shape))
    out: Dims = []
    for position in range(len(call.shape)):
        column = [dims[position] for dims in inputs]
        sources = [dim.sources for dim in column]
        merged = frozenset[tuple[str, int]]().union(*sources) if all(sources) else frozenset()
        if position == d:
            out.append(Dim(concat(dim.axis for dim in column), merged))
        else:
            full = [dim.axis for dim in column if dim.size == call.shape[position]]
            out.append(Dim(tape.unify(*full), merged))
    return [out]


@rule("stack")
def stack(tape: Tape, call: Call) -> list[Dims]:
    inputs = call.tensors("tensors")
    d = _at(call.integer("dim"), len(call.shape))
    out: Dims = []
    for column in zip(*inputs, strict=True):
        sources = [dim.sources for dim in column]
        merged = frozenset[tuple[str, int]]().union(*sources) if all(sources) else frozenset()
        out.append(Dim(tape.unify(*(dim.axis for dim in column)), merged))
    return [[*out[:d], *fresh([len(inputs)]), *out[d:]]]


@rule("constant_pad_nd")
def pad(tape: Tape, call: Call) -> list[Dims]:
    """Concat(new, axis, new); a negative pad takes a segment."""
    dims, amounts = list(call.dims("self")), call.integers("pad")
    for k in range(len(amounts) // 2):
        before, after = amounts[2 * k : 2 * k + 2]
        d = len(dims) - 1 - k
        if before == after == 0:
            continue
        axis = dims[d].axis
        cut_before, cut_after = max(-before, 0), max(-after, 0)
        if cut_before or cut_after:
            axis = tape.segment(axis, [cut_before, axis.size - cut_before - cut_after, cut_after])[1]
        sides = [Axis(max(before, 0), ""), axis, Axis(max(after, 0), "")]
        dims[d] = Dim(concat(sides))
    return [dims]


@rule("flip", "roll", "rot90")
def shuffle(tape: Tape, call: Call) -> list[Dims]:
    """Positions change places: nothing may leave those dimensions."""
    dims = list(call.dims("self"))
    moved = call.integers("dims")
    for d in moved or range(len(dims)):
        if dims[d].size > 1:
            tape.pin(dims[d].axis, "its positions change places (flip, roll)")
            dims[d] = Dim(Axis(dims[d].size, ""))
    return [dims]


@rule("view_as_complex")
def view_as_complex(tape: Tape, call: Call) -> list[Dims]:
    *dims, pair = call.dims("self")
    tape.pin(pair.axis, "")
    return [dims]


@rule("view_as_real")
def view_as_real(tape: Tape, call: Call) -> list[Dims]:
    return [[*call.dims("self"), *fresh([2])]]


@rule("unfold", "unfold_copy")
def unfold(tape: Tape, call: Call) -> list[Dims]:
    """Windows along one dimension, their positions in a new last one."""
    dims = list(call.dims("self"))
    d = _at(call.integer("dimension"), len(dims))
    tape.pin(dims[d].axis, "a window slides over its positions (unfold)")
    dims[d] = fresh(call.shape[d : d + 1])[0]
    return [[*dims, *fresh(call.shape[-1:])]]
