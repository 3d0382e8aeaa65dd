"""Numbers that remember which sizes they were computed from, and what the model's code asks about them.

    h.shape[1] % 2 == 0      ->      eq(mod(size of an axis, 2), 0)

`SeenInt` and `SeenFloat` pass for an int and a float, with such a term. Arithmetic gives others; a
comparison, or their truth, is a question, told to whoever listens, with the line of the user's code that
asked it; so is their value, wherever it goes that is not followed (`range(n)`, a list's index, a key, a text,
math.gcd). What torch's own code asks is torch's business. Without a listener they behave as the plain numbers
they are.
"""

from __future__ import annotations

import itertools
import linecache
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

import numpy as np
import torch

from ..guards import Place
from .axes import Axis
from .messages import is_message

__all__ = [
    "FITS",
    "NUMBER",
    "UNKNOWN",
    "VALUE",
    "Attribute",
    "Computed",
    "Key",
    "Question",
    "Seen",
    "SeenFloat",
    "SeenInt",
    "Size",
    "Term",
    "fit",
    "give",
    "is_rough",
    "listening",
    "plain",
    "take",
    "term_of",
]

Key: TypeAlias = "tuple[str, str, int | None]"  # module, attribute, index in a tuple


@dataclass(frozen=True)
class Size:
    """The length of a tensor's dimension."""

    axis: Axis


@dataclass(frozen=True)
class Attribute:
    """A number that a module keeps."""

    key: Key
    value: int


@dataclass(frozen=True)
class Computed:
    """`operator` (a name in Python's module of that name, or of math) of the terms."""

    operator: str
    terms: tuple[Term, ...]
    depth: int = 1


Term: TypeAlias = "Size | Attribute | Computed | int | float"


@dataclass(frozen=True)
class Question:
    """`operator` of the terms was asked; `place` identifies where in the code, `line` shows it to people."""

    operator: str
    terms: tuple[Term, ...]
    place: Place
    line: str


NOT_ASKED = ("torch", __name__.partition(".")[0])  # packages whose own questions are none of the model's
FOLDER = __file__.rpartition("/")[0] + "/"
FOLLOWS = (FOLDER, FOLDER.removesuffix("tape/") + "views.py")  # files that a call of torch's goes through
SMOOTH = ("add", "sub", "mul", "truediv", "neg", "pow")
DEEPEST = 64  # operators, one upon the other (a counter in a loop), that are followed
VALUE = "value"  # the operator of a question for the number itself: each number is an answer of its own
FITS = "fits"  # of a question whether a number that is given as a size is the size
NUMBER = "number"  # of a question for a number that is computed with
UNKNOWN = "unknown"  # the operator of a question after which a number is no longer followed
Listener: TypeAlias = "Callable[[Question], object]"
_listener: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, the listener is told every question."""
    _listener.append(listener)
    try:
        yield
    finally:
        _listener.pop()


class Node:
    """What torch asks of symbolic numbers: these are ordinary sizes, and it may have the number itself.

    Its Python code asks so in broadcast_shapes; its C++ code where no mode hears of a call, as in
    torch.Tensor(n, m) and torch.vmap.
    """

    __slots__ = ("number",)

    def __init__(self, number: Seen) -> None:
        self.number = number

    def is_nested_int(self) -> bool:
        return False

    def is_int(self) -> bool:
        return isinstance(self.number.value, int)

    def is_float(self) -> bool:
        return isinstance(self.number.value, float)

    def is_bool(self) -> bool:
        return False

    def maybe_as_int(self) -> int | None:
        return self.number._taken() if self.is_int() else None

    def guard_int(self, file: str, line: int) -> int:
        return int(self.number._taken())

    def guard_float(self, file: str, line: int) -> float:
        return float(self.number._taken())


class Seen:
    """What both kinds of numbers share; the operators are added below.

    It passes for an int or a float (`isinstance`), but is none, so that C code (range, lists, math, numpy)
    has to ask it for its number. torch's takes it for a symbolic one, and hands it on to TorchFunctionModes.
    """

    __slots__ = ("term", "value")

    def __init__(self, value: float, term: Term) -> None:
        self.value, self.term = value, term

    def _given(self) -> Any:
        """Its number, for code in which it is not followed."""
        _tell(VALUE, self.term)
        return self.value

    def _taken(self) -> Any:
        """Its number, as the size of something that torch makes."""
        if is_rough(self.term):
            give(self)
        return self.value

    @property
    def node(self) -> Node:
        return Node(self)

    def _written(self) -> Any:
        """Its number, for a text."""
        return self.value if is_message(_out_of_file(sys._getframe(1))) else self._given()

    def __reduce__(self) -> Any:
        return type(self.value), (self.value,)

    def __deepcopy__(self, memo: object) -> int | float:
        return self.value

    def __getattr__(self, name: str) -> Any:
        """What else numbers can do: `n.bit_length()`."""
        found = getattr(self.value, name)
        _tell(VALUE, self.term)
        return found

    def __hash__(self) -> int:
        return hash(self._given())

    def __bool__(self) -> bool:
        _tell("truth", self.term)
        return bool(self.value)

    def __int__(self) -> int:
        return int(self._given())

    def __float__(self) -> float:
        return float(self._given())

    def __complex__(self) -> complex:
        return complex(self._given())

    def __round__(self, digits: int | None = None) -> int | float:
        return round(self._given(), digits)

    def __format__(self, spec: str) -> str:
        return format(self._written(), spec)

    def __str__(self) -> str:
        return str(self._written())

    def __repr__(self) -> str:
        return repr(self._written())

    def __array__(self, *given: Any, **named: Any) -> Any:
        return np.asarray(self._given()).__array__(*given, **named)

    def __divmod__(self, other: Any) -> Any:
        return _computed("floordiv", self, other), _computed("mod", self, other)

    def __rdivmod__(self, other: Any) -> Any:
        return _computed("floordiv", other, self), _computed("mod", other, self)


# what an int and a float are to `isinstance`, and symbolic ones to torch's parser of arguments
INT_TO_ALL: Any = type("int", (torch.SymInt, int), {})
FLOAT_TO_ALL: Any = type("float", (torch.SymFloat, float), {})


class SeenInt(Seen):
    __slots__ = ()
    __class__ = property(lambda self: INT_TO_ALL)  # type: ignore[assignment]

    def __index__(self) -> int:
        return self._given()


class SeenFloat(Seen):
    __slots__ = ()
    __class__ = property(lambda self: FLOAT_TO_ALL)  # type: ignore[assignment]


def plain(value: Any) -> Any:
    """The number itself; anything else as it is."""
    return value.value if issubclass(type(value), Seen) else value


def term_of(value: Any) -> Term:
    return value.term if isinstance(value, Seen) else value


def give(value: Seen) -> None:
    """The number goes where it is not followed."""
    _tell(VALUE, value.term, through=True)


def take(value: Seen) -> None:
    """torch computes with the number."""
    _tell(NUMBER, value.term, through=True)


def fit(term: Term, axis: Axis) -> None:
    """The number is given as the size of the axis."""
    _tell(FITS, term, Size(axis), through=True)


def is_rough(term: Term) -> bool:
    """Can it be the same for two widths, or jump from one to the next?"""
    return isinstance(term, Computed) and (term.operator not in SMOOTH or any(map(is_rough, term.terms)))


def _computed(name: str, *values: Any) -> Any:
    """operator.name of the values, which remembers them."""
    function = getattr(operator, name, None) or getattr(math, name)
    result = function(*map(plain, values))
    if not _listener or isinstance(result, (bool, complex)):
        return result
    terms = tuple(map(term_of, values))
    depth = 1 + max(term.depth if isinstance(term, Computed) else 0 for term in terms)
    if depth > DEEPEST:
        _tell(UNKNOWN, *(term for term in terms if isinstance(term, Computed)))
        return result
    term = Computed(name, terms, depth)
    return SeenInt(result, term) if isinstance(result, int) else SeenFloat(result, term)


def _tell(name: str, *terms: Term, through: bool = False) -> None:
    """Tell who listens, unless torch asks; `through`: it was torch that the number was given to."""
    if not _listener:
        return
    frame = _giver() if through else _out_of_file(sys._getframe(1))
    if frame is None or str(frame.f_globals.get("__name__")).partition(".")[0] in NOT_ASKED:
        return
    code = frame.f_code
    shown = linecache.getline(code.co_filename, frame.f_lineno).strip()
    line = f"{code.co_filename.rpartition('/')[2]}:{frame.f_lineno}: {shown}"
    _listener[-1](Question(name, terms, (code.co_filename, code.co_name, *_position(frame)), line))


def _giver() -> FrameType | None:
    """Who called torch, which handed the call on to this folder."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(FOLLOWS):
        while frame is not None and frame.f_code.co_filename.startswith(FOLLOWS):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename == torch.overrides.__file__:
            frame = _out_of_file(_out_of_file(frame))
    return frame


def _position(frame: FrameType) -> Iterable[int | None]:
    """Lines and columns of the expression; its line alone before Python 3.11."""
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return (frame.f_lineno,)
    return next(itertools.islice(positions(), frame.f_lasti // 2, None), ())


def _out_of_file(frame: FrameType | None) -> FrameType | None:
    file = None if frame is None else frame.f_code.co_filename
    while frame is not None and frame.f_code.co_filename == file:
        frame = frame.f_back
    return frame


def _operator(name: str, *, reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any, modulus: Any = None) -> Any:
        if modulus is not None:
            return pow(self._given(), plain(other), plain(modulus))
        if not isinstance(other, (int, float)):
            return NotImplemented
        return _computed(name, other, self) if reflected else _computed(name, self, other)

    return method


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        _tell(name, self.term, term_of(other))
        return function(plain(self), plain(other))

    return method


def _alone(name: str) -> Callable[[Any], Any]:
    return lambda self: _computed(name, self)


for _kind in (SeenInt, SeenFloat):
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(_kind, f"__{_name}__", _operator(_name, reflected=False))
        setattr(_kind, f"__r{_name}__", _operator(_name, reflected=True))
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _comparison(_name))
    for _name in ("neg", "abs", "ceil", "floor", "trunc"):
        setattr(_kind, f"__{_name}__", _alone(_name))
for _name in ("and_", "or_", "xor", "lshift", "rshift"):
    setattr(SeenInt, f"__{_name.rstrip('_')}__", _operator(_name, reflected=False))
    setattr(SeenInt, f"__r{_name.rstrip('_')}__", _operator(_name, reflected=True))
