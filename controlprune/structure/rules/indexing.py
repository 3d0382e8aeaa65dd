"""Indexing by tensors: the indexed dimension is pinned, the others are carried.

embedding     out[i…, d] = w[index[i…], d]
gather        out[…, j, …] = x[…, index[…, j, …], …]
index         x[:, index, …]: indexed dims go, those of the index come
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tape.axes import Axis, product
from ..tape.dims import OFF
from ..tape.tape import Call, Dim, Dims, Read, Tape
from .table import fresh, rule

PICKED = "its positions are picked by index"


@rule("embedding")
def embedding(tape: Tape, call: Call) -> list[Dims]:
    rows, columns = call.dims("weight")
    tape.pin(rows.axis, "its rows are looked up by index (embedding)")
    return [[dim.plain for dim in (*call.dims("indices"), columns)]]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(tape: Tape, call: Call) -> list[Dims]:
    rows, columns = call.dims("weight")
    tape.pin(rows.axis, "its rows are looked up by index (embedding)")
    return [[*fresh(call.shape[:1]), columns.plain]]


@rule("index_select")
def index_select(tape: Tape, call: Call) -> list[Dims]:
    dims = [dim.plain for dim in call.dims("self")]
    d, index = call.integer("dim"), call.arguments["index"]
    assert isinstance(index, Tensor)
    if not dims:
        return [dims]
    repeats = _repeats(index, dims[d].size)
    if repeats:
        dims[d] = Dim(product([dims[d].axis, Axis(repeats)]))
        return [dims]
    tape.pin(dims[d].axis, PICKED)
    dims[d] = call.dims("index")[0].plain if call.dims("index") else Dim(Axis(1))
    return [dims]


def _repeats(index: Tensor, size: int) -> int:
    """k if the index is 0…0 1…1 2…2 with k of each (repeat_interleave), else 0."""
    if index.device.type == "meta" or size < 2 or index.numel() % size or index.numel() == size:
        return 0
    repeats = index.numel() // size
    expected = torch.arange(size, device=index.device).repeat_interleave(repeats)
    return repeats if torch.equal(index, expected.to(index.dtype)) else 0


def _index_layout(tape: Tape, call: Call) -> tuple[Dims, Dims]:
    """(dims of x[indices], dims of x that are indexed) for advanced indexing."""
    dims = [dim.plain for dim in call.dims("self")]
    indices = list(call.arguments["indices"])  # type: ignore[call-overload]
    gone, found, rest, places = [], [], [], []
    position = 0
    for index in indices:
        if index is None:
            position += 1
            continue
        entry = call.entries[id(index)].dims
        width = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
        if index.dtype in (torch.bool, torch.uint8):
            tape.pin_dims(entry, PICKED)
            found.append(None)
        else:
            found.append([dim.plain for dim in entry])
        gone.extend(range(position, position + width))
        places.append(position)
        position += width
    rest = [d for d in range(len(dims)) if d not in gone]
    together = gone == list(range(gone[0], gone[0] + len(gone))) if gone else True
    start = sum(d < gone[0] for d in rest) if together and gone else 0
    count = len(call.shape) - len(rest) if call.outputs else 0
    new = _broadcast(tape, found, tuple(call.shape)[start : start + count])
    out = [*(dims[d] for d in rest[:start]), *new, *(dims[d] for d in rest[start:])]
    return out, [dims[d] for d in gone]


def _broadcast(tape: Tape, found: list[Dims | None], shape: tuple[int, ...]) -> Dims:
    """Dims of the broadcast index tensors; those of a boolean mask are data."""
    if any(dims is None for dims in found):
        return fresh(shape)
    out = []
    for k, size in enumerate(shape):
        axes = []
        for dims in found:
            assert dims is not None
            place = k - len(shape) + len(dims)
            if place >= 0 and dims[place].size == size:
                axes.append(dims[place].axis)
        out.append(Dim(tape.unify(*axes)) if axes and size > 1 else Dim(Axis(size)))
    return out


@rule("index", "_unsafe_index")
def index(tape: Tape, call: Call) -> list[Dims]:
    segment = _constant_segment(tape, call)
    if segment is not None:
        return [segment]
    if (picked := _picked(tape, call)) is not None:
        return [picked]
    out, gone = _index_layout(tape, call)
    tape.pin_dims(gone, PICKED)
    call.labels = [call.label("self")]
    return [out]


def _constant_segment(tape: Tape, call: Call) -> Dims | None:
    """x[:, [3, 4, 5]], a constant run of positions, is a segment; None where it is something else."""
    dims = [dim.plain for dim in call.dims("self")]
    given = [(d, i) for d, i in enumerate(call.arguments["indices"]) if i is not None]  # type: ignore[arg-type]
    if len(given) != 1:
        return None
    d, index = given[0]
    constant = call.entries[id(index)].weight and index.device.type != "meta" and index.dim() == 1
    if not constant or index.dtype in (torch.bool, torch.uint8) or not index.numel():
        return None
    positions = index % dims[d].size
    start, length = int(positions[0]), len(positions)
    if not torch.equal(positions, torch.arange(start, start + length, device=index.device).to(index.dtype)):
        return None
    piece = tape.segment(dims[d].axis, [start, length, dims[d].size - start - length])[1]
    return [*dims[:d], Dim(piece), *dims[d + 1 :]]


def _picked(tape: Tape, call: Call) -> Dims | None:
    """x[which units a router picked], no one of which is off; None where it is something else."""
    dims = call.dims("self")
    given = [(d, i) for d, i in enumerate(call.arguments["indices"]) if i is not None]  # type: ignore[arg-type]
    if len(given) != 1 or not (router := call.entries[id(given[0][1])].labels):
        return None
    d, index = given[0]
    if dims[d].size != tape.routers[router].size:
        return None
    call.counts = True
    _meets(tape, dims, d, router)
    new = [dim.plain for dim in call.entries[id(index)].dims]
    return [*dims[:d], *new, *dims[d + 1 :]]


def _meets(tape: Tape, dims: Dims, d: int, router: str) -> None:
    """Dimension d is what a router chooses among, and this may be the last product with what it chose."""
    axis = tape.unify(dims[d].axis, tape.routers[router])
    if dims[d].parameters:
        tape.picked(Read(axis, dims[d].parameters | {(router, OFF)}), matrix=len(dims) > 2)


@rule("repeat_interleave")
def repeat_interleave(tape: Tape, call: Call) -> list[Dims]:
    """(repeats) -> index; index_select looks at its values."""
    return [fresh(call.shape)]


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(tape: Tape, call: Call) -> list[Dims]:
    """x[indices] = values."""
    dims = [dim.plain for dim in call.dims("self")]
    values = call.dims("values")
    target = _put_target(tape, call, dims)
    for mine, its in zip(reversed(target), reversed(values), strict=False):
        if mine is not None and mine.size == its.size:
            tape.unify(mine.axis, its.axis)
        elif mine is None:
            tape.pin(its.axis, PICKED)
    return [dims]


def _put_target(tape: Tape, call: Call, dims: Dims) -> list[Dim | None]:
    """Dims of x[indices], None where the index made them; the indexed dims are pinned."""
    target: list[Dim | None] = []
    position, made = 0, 0
    for index in call.arguments["indices"]:  # type: ignore[attr-defined]
        if index is None:
            target.append(dims[position])
            position += 1
            continue
        is_mask = index.dtype in (torch.bool, torch.uint8)
        width = index.dim() if is_mask else 1
        tape.pin_dims(dims[position : position + width], PICKED)
        tape.pin_dims(call.entries[id(index)].dims, PICKED)
        if not made:
            made = 1 if is_mask else index.dim()
            target.extend([None] * made)
        position += width
    return [*target, *dims[position:]]


@rule("gather")
def gather(tape: Tape, call: Call) -> list[Dims]:
    return [_along_index(tape, call, [])]


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(tape: Tape, call: Call) -> list[Dims]:
    _along_index(tape, call, [call.dims("src")] if call.has("src") else [])
    return [[dim.plain for dim in call.dims("self")]]


def _along_index(tape: Tape, call: Call, others: list[Dims]) -> Dims:
    """Dimension `dim` is indexed; in the others the index stands beside the entries it picks."""
    mine, its = call.dims("self"), call.dims("index")
    d = call.integer("dim") % max(len(mine), 1)
    router = "" if others or not mine else call.label("index")
    out = []
    for position, (dim, pick) in enumerate(zip(mine, its, strict=True)):
        columns = [other[position] for other in others]
        if position == d and router and dim.size == tape.routers[router].size:
            call.counts = True
            tape.unify(dim.axis, tape.routers[router])
            out.append(pick.plain)
            continue
        if position == d:
            tape.pin_dims([dim, pick, *columns], PICKED)
            out.append(pick.plain)
            continue
        same = [x for x in (dim, pick, *columns) if x.size == pick.size]
        axis = tape.unify(*(x.axis for x in same))
        tape.pin_dims([x for x in (dim, *columns) if x.size != pick.size], PICKED)
        out.append(Dim(axis))
    return out


@rule("index_add", "index_copy", "index_reduce")
def index_add(tape: Tape, call: Call) -> list[Dims]:
    dims = [dim.plain for dim in call.dims("self")]
    source = call.dims("source")
    d = call.integer("dim")
    tape.pin(dims[d].axis, PICKED)
    tape.pin(source[d].axis, PICKED)
    for position, (mine, its) in enumerate(zip(dims, source, strict=True)):
        if position != d % len(dims):
            tape.unify(mine.axis, its.axis)
    return [dims]


@rule("masked_scatter")
def masked_scatter(tape: Tape, call: Call) -> list[Dims]:
    """self where the mask is off, else the next entry of source."""
    for entry in call.entries.values():
        tape.pin_dims(entry.dims, PICKED)
    return [[dim.plain for dim in call.dims("self")]]


@rule("index_fill")
def index_fill(tape: Tape, call: Call) -> list[Dims]:
    dims = [dim.plain for dim in call.dims("self")]
    tape.pin(dims[call.integer("dim")].axis, PICKED)
    return [dims]


@rule("histc", "bincount")
def counted(tape: Tape, call: Call) -> list[Dims]:
    """How often a router picked each unit: never one that is off."""
    router, found = call.label("self"), data_dependent(tape, call)
    bins = call.shape[0]
    if call.name.endswith("bincount"):
        whole = call.integer("minlength") == bins
    else:
        whole = (call.arguments["min"], call.arguments["max"]) == (0, bins - 1)
    if router and whole and bins == tape.routers[router].size:
        call.counts = True
        return [[Dim(tape.routers[router], frozenset({(router, OFF)}))]]
    return found


@rule("nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2",
      "searchsorted", "bucketize")  # fmt: skip
def data_dependent(tape: Tape, call: Call) -> list[Dims]:
    """The result's shape depends on values: its dimensions are data."""
    for entry in call.entries.values():
        tape.pin_dims(entry.dims, PICKED)
    return [fresh(output.shape) for output in call.outputs]


@rule("one_hot")
def one_hot(tape: Tape, call: Call) -> list[Dims]:
    return [[*(dim.plain for dim in call.dims("self")), *fresh(call.shape[-1:])]]
