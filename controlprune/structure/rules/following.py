"""How rows (structure/tape/rows.py) travel through operators.

x Wᵀ + b              rows of W and of b
view, transpose, …    the same, under other indices
k · s, k / s, −k      the same
a + b                 zero where both are
cat, stack            those of each part
anything else         hears them: they are followed no further
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..tape.dims import Source
from ..tape.memory import storage_of
from ..tape.rows import MOST, Alternative, Alternatives, Origin, Rows, both
from ..tape.tape import Call, Tape

__all__ = ["follow"]

Follower: TypeAlias = "Callable[[Step], list[Alternatives]]"
FOLLOWERS: dict[str, Follower] = {}
OF_SHAPE = re.compile(r"(empty|zeros|ones|full|rand|randn)_like|new_.*|is_same_size")  # they hear no value


class Step:
    """One call, as a follower sees it: `goes_on` names the activations whose rows are those of an output."""

    def __init__(self, rows: Rows, call: Call, run: Callable[[Tensor, Tensor], Any]) -> None:
        self.rows, self.call, self.run = rows, call, run
        self.goes_on: list[Tensor] = []

    def tensor(self, argument: str) -> Tensor | None:
        value = self.call.arguments.get(argument)
        return value if isinstance(value, Tensor) else None

    def made(self, argument: str) -> Alternatives:
        tensor = self.tensor(argument)
        return () if tensor is None else self.rows.of(tensor)

    def taken(self, tensor: Tensor) -> Alternatives:
        """Its rows, which go on."""
        self.goes_on.append(tensor)
        return self.rows.of(tensor)


def follow(tape: Tape, rows: Rows, call: Call, func: Any, args: Any, kwargs: Any) -> None:
    """Write down the rows of the outputs, and which are heard."""

    def run(tensor: Tensor, index: Tensor) -> Any:
        return func(*(index if arg is tensor else arg for arg in args), **kwargs)

    name = call.name.rpartition("::")[2].removesuffix("_")
    tensors = [] if OF_SHAPE.fullmatch(name) else [t for t in _tensors(call) if rows.of(t)]
    step = Step(rows, call, run)
    follower = FOLLOWERS.get(name) if tensors else None
    found = [] if follower is None else follower(step)
    gone = {id(tensor) for tensor in step.goes_on}
    rows.hear(t for t in tensors if id(t) not in gone and not call.entries[id(t)].weight)
    if call.writes and follower is not _scaled:
        rows.forget(storage_of(call.outputs[0]) if call.outputs else 0)
    for output, alternatives in zip(call.outputs, found, strict=False):
        if not tape.owned(output):
            rows.set(output, alternatives)


def _tensors(call: Call) -> list[Tensor]:
    flat = pytree.tree_leaves(call.arguments)
    return [leaf for leaf in flat if isinstance(leaf, Tensor)]


def follower(*operators: str) -> Callable[[Follower], Follower]:
    def enter(function: Follower) -> Follower:
        FOLLOWERS.update(dict.fromkeys(operators, function))
        return function

    return enter


def _each(alternatives: Alternatives, change: Callable[[Tensor], Tensor]) -> Alternatives:
    return tuple(tuple(Origin(o.source, change(o.index)) for o in one) for one in alternatives)


@follower("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "repeat")
def _moved(step: Step) -> list[Alternatives]:
    tensor = step.tensor("self")
    assert tensor is not None
    return [_each(step.taken(tensor), lambda index: step.run(tensor, index))]


@follower("view", "_unsafe_view", "reshape", "_reshape_alias")
def _viewed(step: Step) -> list[Alternatives]:
    tensor, out = step.tensor("self"), step.call.outputs[0]
    if tensor is None or tensor.numel() != out.numel():  # read as another type
        return []
    return [_each(step.taken(tensor), lambda index: index.reshape(out.shape))]


@follower(
    "split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"
)
def _parted(step: Step) -> list[Alternatives]:
    tensor = step.tensor("self")
    assert tensor is not None
    made = [[(o.source, step.run(tensor, o.index)) for o in one] for one in step.taken(tensor)]
    return [
        tuple(tuple(Origin(source, parts[k]) for source, parts in one) for one in made)
        for k in range(len(step.call.outputs))
    ]


@follower("view_as_complex")
def _complex(step: Step) -> list[Alternatives]:
    """A number is zero where both of its parts are."""
    tensor = step.tensor("self")
    assert tensor is not None
    made = step.taken(tensor)
    return [tuple(tuple(Origin(o.source, part) for o in one for part in o.index.unbind(-1)) for one in made)]


@follower("view_as_real")
def _real(step: Step) -> list[Alternatives]:
    tensor, shape = step.tensor("self"), step.call.outputs[0].shape
    assert tensor is not None
    return [_each(step.taken(tensor), lambda index: index.unsqueeze(-1).expand(shape))]


@follower("clone", "_to_copy", "detach", "alias", "contiguous", "lift_fresh", "native_dropout", "neg")
def _same(step: Step) -> list[Alternatives]:
    tensor = step.tensor("self") if step.tensor("self") is not None else step.tensor("input")
    return [] if tensor is None else [step.taken(tensor)]


@follower("mul", "div")
def _scaled(step: Step) -> list[Alternatives]:
    """By a number, by a parameter (zero where that is), or by another linear map: it hears that one."""
    names = ("self", "other") if step.call.name.rpartition("::")[2].startswith("mul") else ("self",)
    given = [t for name in names if (t := step.tensor(name)) is not None and step.rows.of(t)]
    maps = [t for t in given if not step.call.entries[id(t)].weight]
    weights = [t for t in given if step.call.entries[id(t)].weight]
    made = [one for tensor in (*maps[:1], *weights) for one in step.taken(tensor)]
    shape = step.call.outputs[0].shape
    return [_each(tuple(made), lambda index: index.expand(shape))]


@follower("add", "sub")
def _summed(step: Step) -> list[Alternatives]:
    first, second = step.tensor("self"), step.tensor("other")
    if first is None or second is None or not (step.rows.of(first) and step.rows.of(second)):
        return []
    shape = step.call.outputs[0].shape
    return [_each(both(step.taken(first), step.taken(second)), lambda index: index.expand(shape))]


@follower("cat", "stack")
def _joined(step: Step) -> list[Alternatives]:
    """Every part has rows, or nothing is known; parts of nothing (a cache at its start) have none."""
    given: Any = step.call.arguments["tensors"]
    parts = [t for t in given if t.numel()]
    if not all(step.rows.of(t) for t in parts):
        return []
    dim = step.call.integer("dim")
    join = torch.cat if step.call.name.endswith("cat") else torch.stack
    choices = itertools.islice(itertools.product(*(step.taken(t) for t in parts)), MOST)
    return [tuple(_side_by_side(parts, choice, lambda indices: join(indices, dim)) for choice in choices)]


def _side_by_side(
    parts: Sequence[Tensor], choice: Sequence[Alternative], join: Callable[[list[Tensor]], Tensor]
) -> Alternative:
    """Origins of one source are joined to one; −1 in the parts that have none of it."""
    by_source: list[dict[Source, list[Tensor]]] = []
    for alternative in choice:
        own: dict[Source, list[Tensor]] = {}
        for origin in alternative:
            own.setdefault(origin.source, []).append(origin.index)
        by_source.append(own)
    found = []
    for source in dict.fromkeys(source for own in by_source for source in own):
        for k in range(max(len(own.get(source, ())) for own in by_source)):
            indices = []
            for part, own in zip(parts, by_source, strict=True):
                mine = own.get(source, [])
                indices.append(mine[k] if k < len(mine) else torch.full(part.shape, -1, dtype=torch.int32))
            found.append(Origin(source, join(indices)))
    return tuple(found)


# --- linear maps -----------------------------------------------------------------------------------------


def _apart(alternatives: Alternatives, dim: int) -> Alternatives:
    """Those that are equal all along `dim`, without it: zero there, and the sum over it is."""
    found = []
    for one in alternatives:
        short = [(o.source, o.index.select(dim, 0)) for o in one if o.index.shape[dim] > 1]
        same = [bool((o.index == s.unsqueeze(dim)).all()) for o, (_, s) in zip(one, short, strict=False)]
        if len(short) == len(one) and all(same):
            found.append(tuple(Origin(*pair) for pair in short))
    return tuple(found)


def _product(step: Step, left: str, right: str) -> Alternatives:
    """(…, n, k) times (…, k, m): columns of weights on the right, rows of weights on the left."""
    shape, found = step.call.outputs[0].shape, ()
    if step.call.weight(right):
        found += _each(_apart(step.made(right), -2), lambda index: index.unsqueeze(-2).expand(shape))
    if step.call.weight(left):
        found += _each(_apart(step.made(left), -1), lambda index: index.unsqueeze(-1).expand(shape))
    return found


@follower("mm", "bmm")
def _mm(step: Step) -> list[Alternatives]:
    return [_product(step, "self", "mat2")]


@follower("addmm", "_addmm_activation", "baddbmm")
def _addmm(step: Step) -> list[Alternatives]:
    left, right = ("batch1", "batch2") if step.call.name.endswith("baddbmm") else ("mat1", "mat2")
    return [_biased(step, _product(step, left, right), "self")]


def _biased(step: Step, product: Alternatives, bias: str) -> Alternatives:
    shape = step.call.outputs[0].shape
    return both(product, _each(step.made(bias), lambda index: index.expand(shape)))


@follower("convolution")
def _convolution(step: Step) -> list[Alternatives]:
    """Output channel m is zero where the kernels that make it are."""
    if step.call.arguments["transposed"]:
        return []
    shape = step.call.outputs[0].shape

    def channels(index: Tensor) -> Tensor:
        return index.view(-1, *[1] * (len(shape) - 2)).expand(shape)

    rows = _each(step.made("weight"), lambda index: index.flatten(1))
    same = (one for one in rows if all(bool((o.index == o.index[:, :1]).all()) for o in one))
    found = _each(tuple(same), lambda index: channels(index[:, 0]))
    return [both(found, _each(step.made("bias"), channels)) if step.call.has("bias") else found]


@follower("linear")
def _linear(step: Step) -> list[Alternatives]:
    shape = step.call.outputs[0].shape
    found = _each(_apart(step.made("weight"), -1), lambda index: index.expand(shape))
    return [_biased(step, found, "bias") if step.call.has("bias") else found]
