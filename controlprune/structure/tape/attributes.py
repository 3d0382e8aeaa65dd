"""Which Python integers of the model's code are sizes of which axes.

During a trace every plain int that a module of the user's holds (its own attributes, tuples and lists of
them, and those of configuration objects it refers to) is swapped for a `TracedInt`, an int that knows where
it came from. A TorchFunctionMode sees it arrive as an argument of view, expand, split … and the resulting
dimension tells the axis::

    q.view(b, t, self.num_heads, self.head_dim)   ->  num_heads = |axis 2|,  head_dim = |axis 3|

A product of two such ints (`heads * head_dim`) is traced as both. The originals are put back afterwards.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from .axes import Axis
from .reading import GONE, SizeReader, argument, has_seen, seen_numbers, take_all
from .seen import Attribute, Computed, Key, Seen, SeenInt, Size, Term, fit, give, plain
from .tape import Tape

__all__ = ["SizeWatcher", "TracedInt", "traced_attributes"]

OPAQUE = (nn.Module, Tensor, type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, str, bytes)
DEPTH = 2  # module.config.text_config.hidden_size
OWN_SIZES = {  # of torch's own modules
    *("in_features", "out_features", "in1_features", "in2_features", "in_channels", "out_channels", "groups"),
    *("num_features", "num_channels", "num_groups", "num_parameters", "embedding_dim", "embed_dim"),
    *("num_heads", "kdim", "vdim", "d_model", "input_size", "hidden_size", "proj_size", "normalized_shape"),
}
ARITHMETIC = frozenset(  # of a tensor and a number, which is on the right of it, or on the left, or in place
    letter + name
    for letter in ("", "r", "i")
    for name in ("add", "sub", "mul", "div", "truediv", "true_divide", "divide", "multiply", "pow")
)
NUMPY = "what a router gives leaves torch (numpy, tolist): the model's code may tell its units by number"
PLAIN: Any = SeenInt


class TracedInt(SeenInt):
    """An int that is a product of attributes: `factors` = ((key or None, value), …), outermost first."""

    factors: tuple[tuple[Key | None, int], ...]

    @staticmethod
    def of(seen: SeenInt, factors: tuple[tuple[Key | None, int], ...]) -> TracedInt:
        traced: Any = TracedInt(plain(seen), seen.term)
        traced.factors = factors
        return traced

    def __mul__(self, other: Any) -> Any:
        product = PLAIN.__mul__(self, other)
        return TracedInt.of(product, self.factors + _factors(other)) if _seen(product) else product

    def __rmul__(self, other: Any) -> Any:
        product = PLAIN.__rmul__(self, other)
        return TracedInt.of(product, _factors(other) + self.factors) if _seen(product) else product


def _seen(value: object) -> TypeGuard[SeenInt]:
    return isinstance(value, SeenInt)


def _factors(value: Any) -> tuple[tuple[Key | None, int], ...]:
    return value.factors if isinstance(value, TracedInt) else ((None, plain(value)),)


@contextmanager
def traced_attributes(model: nn.Module) -> Iterator[None]:
    """Swap the ints of the model's own code for traced ones, and back."""
    swapped: list[tuple[dict[str, Any], str, object]] = []
    seen: set[int] = set()
    try:
        for path, module in model.named_modules():
            if type(module).__module__.startswith("torch.nn."):
                _swap_sizes(vars(module), path, swapped)
            else:
                _swap(vars(module), path, "", DEPTH, swapped, seen)
        yield
    finally:
        for holder, name, value in swapped:
            holder[name] = value


def _swap(
    holder: dict[str, Any],
    module: str,
    prefix: str,
    depth: int,
    swapped: list[tuple[dict[str, Any], str, object]],
    seen: set[int],
) -> None:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    for name, value in list(holder.items()):
        path = prefix + name
        kind: type = type(value)
        if kind is int and value > 1:
            traced: object = _attribute((module, path, None), value)
        elif kind in (tuple, list) and value and all(type(item) is int for item in value):
            traced = kind(_attribute((module, path, i), v) for i, v in enumerate(value))
        else:
            if depth and hasattr(value, "__dict__") and not isinstance(value, OPAQUE):
                _swap(vars(value), module, path + ".", depth - 1, swapped, seen)
            continue
        swapped.append((holder, name, value))
        holder[name] = traced


def _attribute(key: Key, value: int) -> TracedInt:
    return TracedInt.of(SeenInt(value, Attribute(key, value)), ((key, value),))


def _swap_sizes(
    holder: dict[str, Any], module: str, swapped: list[tuple[dict[str, Any], str, object]]
) -> None:
    """torch's own modules are known by heart (structure/sizes.py), but the user's code may ask for these."""
    for name in OWN_SIZES & holder.keys():
        value = holder[name]
        if type(value) is int and value > 1:
            swapped.append((holder, name, value))
            holder[name] = SeenInt(value, Attribute((module, name, None), value))
        elif type(value) is tuple:
            swapped.append((holder, name, value))
            holder[name] = tuple(SeenInt(n, Attribute((module, name, i), n)) for i, n in enumerate(value))


class SizeWatcher(SizeReader):
    """Binds each traced int that arrives as a size to the axis it is the size of; sizes read know theirs."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def terms_of(self, tensor: Tensor) -> Sequence[Term]:
        axes = self.tape.axes_of(tensor)
        return super().terms_of(tensor) if axes is None else [Size(axis) for axis in axes]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in GONE:
            self.tape.taken(args[0], NUMPY)
        return super().__torch_function__(func, types, args, kwargs)

    def called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.tape.unscaled = func is F.scaled_dot_product_attention and kwargs.get("scale") is None
        name = getattr(func, "__name__", "")
        if func is F.linear:
            result = super().called(func, args, kwargs)
            if not _run_again():
                self.tape.linear(result, argument(args, kwargs, 1, "weight"))
            return result
        if not has_seen((args, tuple(kwargs.values()))) and not kwargs.get("enable_gqa"):
            return func(*args, **kwargs)
        if name not in SIZED:
            take_all(args, kwargs)
        self.tape.given = func is Tensor.__getitem__ and _bounded(args[1])
        result = super().called(func, args, kwargs)
        self.tape.given = False
        if name.strip("_") in ARITHMETIC:
            self.tape.numbers += [number.term for number in seen_numbers((args, tuple(kwargs.values())))]
        if (watch := WATCHED.get(name)) is not None:
            self._learn(watch, args, kwargs, result)
        return result

    def _learn(self, watch: Watch, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Bind what the call tells; one that the watch doesn't foresee (an empty tensor) tells nothing."""
        try:
            for traced, axis in watch(self.tape, args, kwargs, result):
                if isinstance(traced, TracedInt) and plain(traced) == axis.size:
                    self._bind(traced, axis)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError):
            return

    def given_to(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, number: Seen) -> None:
        """A size that is given should be the size of the dimension that it gives."""
        name = getattr(func, "__name__", "")
        sizes = _bounds if name == "__getitem__" else WATCHED.get(name)
        try:
            found = [] if sizes is None else sizes(self.tape, args, kwargs, result)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError):
            found = []
        for given, axis in found:
            if given is number and plain(number) == axis.size:
                return fit(number.term, axis)
        give(number)

    def _bind(self, traced: TracedInt, axis: Axis) -> None:
        factors = _copies_first(traced.factors)
        pieces = self.tape.regroup([axis], [value for _, value in factors])
        for (key, _), piece in zip(factors, pieces, strict=True):
            if key is not None:
                self.tape.bind(*key, piece)


def _copies_first(factors: tuple[tuple[Key | None, int], ...]) -> list[tuple[Key | None, int]]:
    """`width * 3` is three of a width, as `3 * width`; `heads * 64` are heads of 64."""
    least = min((value for key, value in factors if key is not None), default=0)
    return sorted(factors, key=lambda factor: factor[0] is not None or factor[1] >= least)


def _run_again() -> bool:
    """Inside a checkpoint of the running module's own, which the backward pass runs without the module?"""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def _bounded(index: Any) -> bool:
    """Does a slice among them end where an attribute says? Then halves are not halves of one thing."""
    slices = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, slice)]
    return any(
        isinstance(bound, SeenInt) and _kept(bound.term) for i in slices for bound in (i.start, i.stop)
    )


def _kept(term: Term) -> bool:
    """Is it a sum of products of attributes?"""
    if isinstance(term, Computed):
        return term.operator in ("add", "mul") and all(map(_kept, term.terms))
    return isinstance(term, Attribute)


# --- which argument is the size of which axis ----------------------------------------------------------

Sizes: TypeAlias = "list[tuple[object, Axis]]"
Watch: TypeAlias = "Callable[[Tape, Sequence[Any], dict[str, Any], Any], Sizes]"


def _axes(tape: Tape, tensor: Tensor) -> list[Axis]:
    return [dim.axis for dim in tape.entry(tensor).dims]


def _sizes_given(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    rest = [arg for arg in args if not isinstance(arg, Tensor)]
    for candidate in (*rest, kwargs.get("size"), kwargs.get("shape")):
        if isinstance(candidate, (tuple, list)):
            return list(candidate)
    return rest


def _whole_shape(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    sizes, axes = _sizes_given(args, kwargs), _axes(tape, result)
    return list(zip(sizes, axes, strict=True)) if len(sizes) == len(axes) else []


def _times(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    pairs = _whole_shape(tape, args, kwargs, result)
    return [
        (k, tape.regroup([axis], [n := plain(k), axis.size // n])[0])
        for k, axis in pairs
        if isinstance(k, TracedInt)
    ]


def _unflatten(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    dim, sizes = argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "sizes")
    start = dim if dim >= 0 else dim + args[0].dim()
    return list(zip(sizes, _axes(tape, result)[start:], strict=False))


def _split(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    sizes = (
        args[1]
        if len(args) > 1
        else next(iter(kwargs[k] for k in kwargs if k.startswith("split_size")), None)
    )
    dim = argument(args, kwargs, 2, "dim", 0)
    given = sizes if isinstance(sizes, (tuple, list)) else [sizes]
    return [(size, _axes(tape, piece)[dim]) for size, piece in zip(given, result, strict=False)]


def _narrow(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    dim, length = argument(args, kwargs, 1, "dim"), argument(args, kwargs, 3, "length")
    return [(length, _axes(tape, result)[dim])]


def _getitem(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    """x[:n] has the size n; x[n:] leaves a segment of size n."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(isinstance(i, (slice, int)) or i is Ellipsis or i is None for i in index):
        return []
    axes, used = _axes(tape, args[0]), sum(isinstance(i, (slice, int)) for i in index)
    found: Sizes = []
    position = 0
    for entry in index:
        if entry is Ellipsis:
            position += len(axes) - used
        elif isinstance(entry, slice):
            axis = axes[position]
            for bound in (entry.start, entry.stop):
                if isinstance(bound, SeenInt) and 0 < plain(bound) < axis.size:
                    parts = _summands(bound.term)
                    sizes = [plain(part) for part in parts]
                    found += zip(parts, tape.segment(axis, [*sizes, axis.size - sum(sizes)]), strict=False)
        if isinstance(entry, (slice, int)):
            position += 1
    return found


def _bounds(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    """x[..., :n] has the size n; of x[..., n:], the piece that is left out has."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if len(index) > 1 and index[0] is not Ellipsis and len(index) != args[0].dim():
        return []
    last, place = args[1][-1] if isinstance(args[1], tuple) else args[1], 0 if len(index) == 1 else -1
    if last.start is None:
        return [(last.stop, _axes(tape, result)[place])]
    axis, start = _axes(tape, args[0])[place], plain(last.start)
    return [(last.start, tape.segment(axis, [start, axis.size - start])[0])] if last.stop is None else []


def _summands(term: Term) -> list[TracedInt]:
    """The term as a sum of products of attributes; LookupError if it is none."""
    if isinstance(term, Computed) and term.operator == "add":
        return [part for inner in term.terms for part in _summands(inner)]
    factors = _product(term)
    return [TracedInt.of(SeenInt(math.prod(value for _, value in factors), term), factors)]


def _product(term: Term) -> tuple[tuple[Key | None, int], ...]:
    match term:
        case Attribute(key, value):
            return ((key, value),)
        case Computed("mul", terms):
            return tuple(factor for inner in terms for factor in _product(inner))
        case int():
            return ((None, term),)
        case _:
            raise LookupError(term)


def _repeat_interleave(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    k, dim = argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    if dim is None or not isinstance(k, TracedInt):
        return []
    axis = _axes(tape, result)[dim]
    return [(k, tape.regroup([axis], [axis.size // plain(k), plain(k)])[1])]


def _grouped_queries(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    """Here torch repeats the keys; with a padding mask transformers does, as often as the module says."""
    repeats = vars(tape.model.get_submodule(tape.where)).get("num_key_value_groups")
    query, key = args[0], args[1]
    axis, heads = _axes(tape, query)[1], key.shape[1]
    return [(repeats, tape.regroup([axis], [heads, axis.size // heads])[1])]


def _group_norm(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    groups, axis = argument(args, kwargs, 1, "num_groups"), _axes(tape, args[0])[1]
    return [(groups, tape.regroup([axis], [groups, axis.size // groups])[0])]


def _layer_norm(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    shape = argument(args, kwargs, 1, "normalized_shape")
    return list(zip(reversed(shape), reversed(_axes(tape, args[0])), strict=False))


def _convolution(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    groups = argument(args, kwargs, 6, "groups", 1)
    axis = _axes(tape, argument(args, kwargs, 1, "weight"))[0]
    return [(groups, tape.regroup([axis], [groups, axis.size // groups])[0])]


def _counts(tape: Tape, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Sizes:
    given = kwargs.get("minlength", kwargs.get("bins", args[1] if len(args) > 1 else None))
    return [(given, _axes(tape, result)[0])]


WATCHED: dict[str, Watch] = {
    **dict.fromkeys(
        ("view", "reshape", "expand", "broadcast_to", "zeros", "ones", "empty", "full", "rand", "randn",
         "new_zeros", "new_ones", "new_empty", "new_full"),
        _whole_shape,
    ),
    **dict.fromkeys(("histc", "bincount"), _counts),
    **dict.fromkeys(("repeat", "tile"), _times),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "narrow": _narrow,
    "__getitem__": _getitem,
    "repeat_interleave": _repeat_interleave,
    "scaled_dot_product_attention": _grouped_queries,
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
}  # fmt: skip
SIZED = (WATCHED.keys() | {"chunk", "tensor_split", "unfold", "pad"}) - {"scaled_dot_product_attention"}
