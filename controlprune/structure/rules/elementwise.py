"""Element by element: every input broadcasts to the output, equal sizes are the same index space.

    out[…, i, …] = f(x[…, i, …], y[…, i or 0, …], …)

Position by position any f is allowed: a unit is removed at its readers, so f(0) need not be 0. Only the
*sources* of a dimension (see structure/tape/tape.py) need f to keep zeros: x·w is zero where w is, |w|
where w is, w₁ + w₂ where both are.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree

from ..tape.axes import Axis
from ..tape.tape import Call, Dim, Dims, Entry, Tape
from .routing import KEEPS_LOST, scales, still_lost
from .table import fresh, rule

__all__ = ["elementwise"]

KEEP_ZERO = frozenset(
    [
        "neg",
        "abs",
        "relu",
        "tanh",
        "sign",
        "sqrt",
        "square",
        "silu",
        "gelu",
        "leaky_relu",
        "clone",
        "_to_copy",
        "detach",
        "alias",
        "lift_fresh",
        "contiguous",
        "hardtanh",
        "sin",
        "_conj",
        "conj_physical",
        "copy",
        "native_dropout",
    ]
)
PRODUCTS = frozenset(["mul", "bitwise_and", "logical_and"])
SUMS = frozenset(["add", "sub"])


def operands(call: Call) -> list[Entry]:
    """Entries of all tensor arguments, in order."""
    tensors = [leaf for leaf in pytree.tree_leaves(call.arguments) if isinstance(leaf, Tensor)]
    return [call.entries[id(tensor)] for tensor in tensors]


def elementwise(tape: Tape, call: Call) -> list[Dims]:
    """Any pointwise operator: unify what has equal size, broadcast what has size 1."""
    shape = call.shape
    inputs = [entry for entry in operands(call) if len(entry.dims) <= len(shape)]
    out: Dims = []
    for position, size in enumerate(shape):
        column = []
        for entry in inputs:
            place = position - len(shape) + len(entry.dims)
            column.append(entry.dims[place] if place >= 0 and entry.dims[place].size == size else None)
        present = [dim for dim in column if dim is not None]
        if not present or size == 1:
            out.extend([present[0] if len(inputs) == 1 and present else _new(size)])
            continue
        axis = tape.unify(*(dim.axis for dim in present))
        out.append(Dim(axis, _sources(call, column), still_lost(call, column)))
    return [list(out) if output.shape == shape else fresh(output.shape) for output in call.outputs]


def _new(size: int) -> Dim:
    return Dim(Axis(size))


def _sources(call: Call, column: list[Dim | None]) -> frozenset[tuple[str, int]]:
    """Parameter dimensions whose zeros are still zeros of the result."""
    name = call.name.rpartition("::")[2].removesuffix("_")
    if not (len(column) == 1 and (name in KEEPS_LOST or scales(call, name))):
        column = [dim if dim is None else dim.computed for dim in column]
    present = [dim.sources for dim in column if dim is not None]
    if name in PRODUCTS:
        return frozenset().union(*present)
    if name == "div":
        return column[0].sources if column[0] is not None else frozenset()
    scalar_sum = name in SUMS and not isinstance(call.arguments.get("other"), Tensor)
    if name in SUMS and not scalar_sum and len(present) == len(column) and all(present):
        return frozenset().union(*present)
    if name == "pow" and isinstance(call.arguments.get("exponent"), (int, float)):
        return present[0] if call.arguments["exponent"] > 0 else frozenset()  # type: ignore[operator]
    return present[0] if name in KEEP_ZERO and len(column) == 1 else frozenset()


@rule("hardswish", "_prelu_kernel", "log_sigmoid_forward", "rrelu_with_noise", "complex", "polar", "clone",
      "native_dropout", "bernoulli", "_to_copy", "detach", "alias", "lift_fresh", "contiguous")  # fmt: skip
def same(tape: Tape, call: Call) -> list[Dims]:
    """Copies, casts, dropout, and what torch does not tag as pointwise."""
    return elementwise(tape, call)


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "zero", "fill",
      "normal", "uniform", "exponential", "random", "log_normal")  # fmt: skip
def like(tape: Tape, call: Call) -> list[Dims]:
    """New values in the shape of an old tensor: the index space is the same, the contents are not."""
    entry = next(iter(operands(call)))
    return [[dim.plain for dim in entry.dims]]


@rule("copy")
def copy(tape: Tape, call: Call) -> list[Dims]:
    """self[…] = src: src broadcasts to self."""
    return elementwise(tape, call)


@rule("zeros", "ones", "full", "empty", "empty_strided", "new_zeros", "new_ones", "new_full", "new_empty",
      "new_empty_strided", "scalar_tensor")  # fmt: skip
def uniform(tape: Tape, call: Call) -> list[Dims]:
    """A constant without positions: free to take the shape of what it meets (the check will tell)."""
    return [[Dim(Axis(size)) for size in call.shape]]


@rule("glu")
def glu(tape: Tape, call: Call) -> list[Dims]:
    """a·σ(b) of the two halves."""
    dims = [dim.plain for dim in call.dims("self")]
    d = call.integer("dim") % len(dims)
    first, second = tape.segment(dims[d].axis, [dims[d].size // 2] * 2)
    return [[*dims[:d], Dim(tape.unify(first, second)), *dims[d + 1 :]]]


@rule("arange", "rand", "randn", "randint", "randperm", "eye", "linspace", "tril_indices", "triu_indices",
      "hann_window", "logspace")  # fmt: skip
def constant(tape: Tape, call: Call) -> list[Dims]:
    """A constant whose entries differ by position: its length is part of the model's code."""
    reason = "it meets a constant that the model's forward makes at this length"
    return [[Dim(Axis(size, reason)) for size in call.shape]]
