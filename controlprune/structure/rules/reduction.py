"""Reductions, scans and orderings: positions along an axis meet, so none of them may leave.

sum over an axis with sources     a contraction with those parameters (zeroed entries add nothing)
every other reduction or scan     the axis is pinned
"""

from __future__ import annotations

import math

from ..tape.axes import Axis
from ..tape.dims import ENDS, OFF, ON
from ..tape.tape import Call, Dim, Dims, Read, Tape
from .table import fresh, rule

__all__ = ["NORM_ALONE", "STANDARDISED", "reduced"]

NORM_ALONE = "; a module that computes a norm alone, as nn.RMSNorm, can count the units that are on"
STANDARDISED = "a weight is computed from all of it (standardised?): with units off, it would be another"

TOPK = "the largest of its positions are picked (topk): one that is off would still take a place"


def _dims_of(call: Call, ndim: int) -> list[int]:
    given = call.arguments.get("dim")
    if given is None or given == []:
        return list(range(ndim))
    return [d % ndim if ndim else 0 for d in call.integers("dim")]


def reduced(tape: Tape, call: Call, reason: str) -> Dims:
    """Pin the reduced dimensions (once the result is used) and take them out (or leave 1)."""
    old = call.dims("self")
    gone = _dims_of(call, len(old))
    keepdim = bool(call.arguments.get("keepdim", False))
    for d in gone:
        if old and tape.where in tape.norms:
            tape.statistics(old[d].axis, reason)
        elif old:
            tape.pin_if_used(call, old[d].axis, reason)
    return [Dim(Axis(1)) if d in gone else dim for d, dim in enumerate(old) if keepdim or d not in gone]


@rule("sum", "linalg_vector_norm", "norm")
def sum_(tape: Tape, call: Call) -> list[Dims]:
    """A sum, or a p-norm: zeroed entries add nothing, so parameters are read exactly through it."""
    old = call.dims("self")
    keepdim = bool(call.arguments.get("keepdim", False))
    gone = _dims_of(call, len(old))
    for d in gone if old else ():
        known = old[d].parameters | {(name, OFF) for name in old[d].routers}
        if known and not math.isinf(_order(call)) and _order(call) > 0:
            tape.reads.append(Read(old[d].axis, known))
        else:
            tape.statistics(old[d].axis, "its units are summed")
    return [[Dim(Axis(1)) if d in gone else dim for d, dim in enumerate(old) if keepdim or d not in gone]]


def _order(call: Call) -> float:
    """The p of a norm (2 where it is not given); a sum counts as 1."""
    order = call.arguments.get("ord", call.arguments.get("p", 1))
    return float(order) if isinstance(order, (int, float)) else 2.0


@rule("mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "all", "any", "logsumexp", "var",
      "std", "var_mean", "std_mean", "median", "nanmedian", "aminmax", "nansum", "mode", "count_nonzero",
      "kthvalue")  # fmt: skip
def reduction(tape: Tape, call: Call) -> list[Dims]:
    if call.has("other"):  # max(a, b) is element by element
        from .elementwise import elementwise

        return elementwise(tape, call)
    name = call.name.rpartition("::")[2]
    advice = NORM_ALONE if name == "mean" and call.arguments.get("keepdim") else ""  # as norms take it
    reason = f"its units are reduced to one number ({name}){advice}"
    left = reduced(tape, call, STANDARDISED if call.weight("self") else reason)
    if name == "mean":  # of zeros
        return [left]
    return [[dim.plain for dim in left]] * len(call.outputs)


@rule("_softmax", "softmax", "_safe_softmax")
def softmax(tape: Tape, call: Call) -> list[Dims]:
    """Of logits that can be -inf, those are 0 in it, and the others what they would be without them."""
    old, d = call.dims("self"), call.integer("dim")
    if old and old[d].logits:
        dims = [dim.plain for dim in old]
        router = tape.loses(old[d])
        dims[d] = Dim(old[d].axis, frozenset({(router, OFF), (router, ON)}))
        return [dims]
    return log_softmax(tape, call)


@rule("_log_softmax", "log_softmax")
def log_softmax(tape: Tape, call: Call) -> list[Dims]:
    return _along(tape, call, "softmax runs over its units: with one off, the others would weigh more")


@rule("cumsum")
def cumsum(tape: Tape, call: Call) -> list[Dims]:
    """Counts added up: where none are of a unit that is off, it ends where the one before it does."""
    old, d = call.dims("self"), call.integer("dim")
    if not old or not old[d].routers or not all(tape.chooses(name, old[d]) for name in old[d].routers):
        return scan(tape, call)
    dims = [dim.plain for dim in old]
    dims[d] = Dim(old[d].axis, frozenset((name, ENDS) for name in old[d].routers))
    return [dims]


@rule("sort")
def sort(tape: Tape, call: Call) -> list[Dims]:
    """The units that are on stand in the same order, whether those that are off are numbered or not."""
    call.labels = [call.label("self")]
    return scan(tape, call)


@rule("cumprod", "logcumsumexp", "cummax", "cummin", "argsort")
def scan(tape: Tape, call: Call) -> list[Dims]:
    return _along(tape, call, f"a scan or sort runs along it ({call.name.rpartition('::')[2]})")


def _along(tape: Tape, call: Call, reason: str) -> list[Dims]:
    """The shape stays; positions along `dim` depend on each other."""
    dims = [dim.plain for dim in call.dims("self")]
    if dims:
        tape.pin(dims[call.integer("dim")].axis, reason)
    return [dims] * len(call.outputs)


@rule("topk")
def topk(tape: Tape, call: Call) -> list[Dims]:
    old, d = call.dims("self"), call.integer("dim")
    dims = [dim.plain for dim in old]
    if not dims:
        return [dims] * 2
    if (router := tape.loses(old[d])) and call.arguments.get("largest", True) is True:
        tape.picks[router] = max(tape.picks.get(router, 0), call.shape[d])
        call.labels = ["", router]
    else:
        tape.pin(dims[d].axis, TOPK)
    dims[d] = fresh([call.shape[d]])[0]
    return [dims] * 2


@rule("tril", "triu")
def triangle(tape: Tape, call: Call) -> list[Dims]:
    dims = [dim.plain for dim in call.dims("self")]
    tape.pin_dims(dims[-2:], "its positions are compared with each other (tril, triu)")
    return [dims]


@rule("_local_scalar_dense", "equal", "is_nonzero", "_assert_async", "_assert_scalar", "is_same_size")
def value(tape: Tape, call: Call) -> list[Dims]:
    """A number goes to Python: it has no dimensions; `equal` compares all of two tensors."""
    if call.name.endswith("equal"):
        for entry in call.entries.values():
            tape.pin_dims(entry.dims, "the model's code compares it as a whole")
    return []
