"""Routers: units behind a softmax, each with a logit that can be told to lose.

    p = softmax(W x + b)     masked, the logit of a unit i that is off is -inf: p_i = 0, the others are what
                             they are without it, and no gradient reaches row i of W

A parameter W is a router if the trace sees torch's linear function, called by the module that W belongs to,
go to a softmax through nothing but what keeps -inf as it is. Then p is 0 where a unit is off, as if a column
of a parameter were (tape/tape.py). The logits must be used for nothing else: what else takes -inf, or takes
p where 0 is no ordinary number (logarithms, quotients, roots), makes it unfit, and its units stay.

    picked = topk(p, k)      labels of units, never of one that is off while k are on (the floor of the group)
                             and their p is above 0 in the number format; below, what is picked weighs 0

With units off, the others are numbered anew when shrunk and keep their order. So labels may be sorted,
counted in as many bins as there are units, added up to where each unit's rows end, and used as an index; what
else is done with a number (`picked == 2`, a loop over experts) makes the router unfit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tape.dims import ENDS
from ..tape.tape import Call, Dim, Dims, Tape

__all__ = ["KEEPS_LOST", "require_fit", "require_unkept", "scales", "still_lost"]

KEEPS_LOST = frozenset(["clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous"])
VIEWS = frozenset(
    ["view", "_unsafe_view", "permute", "t", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select"]
)
LOGITS = "softmax runs over its units, but {} takes their logits too: -inf for those off would do harm there"
WEIGHTS = "softmax runs over its units, but {} takes their weights: 0 for those off would do harm there"
LABELS = "a router picks whole experts by index, and {} takes which: the model's code may tell them by number"
KEPT = "softmax runs over its units, and the model keeps or returns what they weigh"
SHIFTS = frozenset(["add", "sub", "mul", "div"])  # as `still_lost` says
SOFTMAX = frozenset(["_softmax", "softmax", "_safe_softmax"])
SHAPE_ONLY = ("_like", "new_zeros", "new_ones", "new_empty", "new_full")
KEEPS_ZERO = frozenset(  # 0 where p is 0, with a derivative there
    [
        *("mul", "add", "sub", "neg", "abs", "square", "relu", "silu", "gelu", "tanh", "native_dropout"),
        *("cat", "stack", "split", "split_with_sizes", "unbind", "sum", "mean", "bmm", "pow"),
        *KEEPS_LOST,
        *VIEWS,
    ]
)
LEAVES_ZERO = frozenset(["exp", "sigmoid", "add", "sub", "rsub", "gt", "ge", "lt", "le", "eq", "ne"])
SUMS_UP = frozenset(
    [
        *("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "sum", "mean", "amax", "max", "argmax", "topk"),
        *SOFTMAX,
    ]
)


def still_lost(call: Call, column: list[Dim | None]) -> str:
    """Whose logits a pointwise operator gives out, -inf where one of them is; "" where it may not be.

    x + y of finite y, x c and x / c of a number c > 0, and copies keep -inf.
    """
    name, first = _name(call), column[0] if column else None
    marked = next((dim.logits for dim in column if dim is not None and dim.logits), "")
    if name in KEEPS_LOST and len(column) == 1:
        return marked
    if name == "add" and _positive(call.arguments.get("alpha", 1)):
        return marked
    if first is None or not first.logits:
        return ""
    others = any(dim is not None and dim.logits for dim in column[1:])
    if name in ("add", "sub") and not others:
        return first.logits
    return first.logits if len(column) == 1 and scales(call, name) else ""


def scales(call: Call, name: str) -> bool:
    """By a number above 0."""
    return name in ("mul", "div") and _positive(call.arguments.get("other"))


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _name(call: Call) -> str:
    return call.name.rpartition("::")[2].removesuffix("_")


def require_fit(tape: Tape, call: Call, found: list[Dims]) -> None:
    """Unfit are routers whose logits this takes where -inf would do harm, or whose weights where 0 would."""
    name = _name(call)
    if name.endswith(SHAPE_ONLY):
        return
    for entry in call.entries.values():
        if entry.labels and not _takes_labels(call, name, entry.labels):
            tape.unfit.setdefault(entry.labels, LABELS.format(name))
        for dim in entry.dims:
            if dim.logits and not _takes_lost(call, name, dim, found):
                tape.unfit.setdefault(dim.logits, LOGITS.format(name))
            for router in dim.routers:
                if not _takes_zero(call, name, dim, found):
                    tape.unfit.setdefault(router, WEIGHTS.format(name))


def _takes_labels(call: Call, name: str, router: str) -> bool:
    """They are handed on as they are, put in order, or counted."""
    if name in KEEPS_LOST | VIEWS and call.outputs[0].dtype != torch.bool:
        call.labels = [router]
    return call.counts or router in call.labels


def _takes_lost(call: Call, name: str, dim: Dim, found: list[Dims]) -> bool:
    if name in SOFTMAX | {"topk"}:  # over these, and no other dimension of the same
        dims = call.dims("self")
        return dims[call.integer("dim")] == dim and sum(other.logits == dim.logits for other in dims) == 1
    handed_on = any(out.logits == dim.logits for dims in found for out in dims)
    return handed_on and name in KEEPS_LOST | VIEWS | SHIFTS


def _takes_zero(call: Call, name: str, dim: Dim, found: list[Dims]) -> bool:
    outputs = [out for dims in found for out in dims]
    if call.counts:  # only those that were picked
        return True
    if name in ("clamp", "clamp_min"):
        return _positive(call.arguments.get("min"))
    if name == "div":  # p / y, not x / p
        numerator = not isinstance(call.arguments["other"], Tensor) or dim not in call.dims("other")
        return numerator and any(dim.routers <= out.routers for out in outputs)
    if name == "pow" and not (_positive(call.arguments["exponent"]) and call.arguments["exponent"] >= 1):  # type: ignore[operator]
        return False
    if name in KEEPS_ZERO and any(dim.routers <= out.routers for out in outputs):
        return True
    if name == "cumsum":
        return any((router, ENDS) in out.sources for router in dim.routers for out in outputs)
    gone = all(out.axis.root is not dim.axis.root for out in outputs)
    return name in LEAVES_ZERO or (name in SUMS_UP and gone)


def require_unkept(tape: Tape) -> None:
    """Routers are unfit whose logits or weights outlive the forward: nobody knows what is made of them."""
    for entry in tape.alive():
        for name in entry.routers:
            tape.unfit.setdefault(name, KEPT)
