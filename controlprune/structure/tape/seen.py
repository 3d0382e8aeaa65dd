"""Numbers that remember which sizes they were computed from, and what the model's code asks about them.

    h.shape[1] % 2 == 0      ->      eq(mod(size of an axis, 2), 0)

`SeenInt` and `SeenFloat` are an int and a float with such a term. Arithmetic gives others; a comparison, or
their truth, is a question, told to whoever listens, with the line of the user's code that asked it. What
torch's own code asks is torch's business. Without a listener they behave as the plain numbers they are.
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

from ..guards import Place
from .axes import Axis

__all__ = [
    "UNKNOWN",
    "Attribute",
    "Computed",
    "Key",
    "Question",
    "Seen",
    "SeenFloat",
    "SeenInt",
    "Size",
    "Term",
    "listening",
    "lose",
    "plain",
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
DEEPEST = 64  # operators, one upon the other (a counter in a loop), that are followed
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


class Seen:
    """What both kinds of numbers share; the operators are added below."""

    __slots__ = ()
    term: Term

    def __reduce__(self) -> Any:
        return type(plain(self)), (plain(self),)

    def __deepcopy__(self, memo: object) -> int | float:
        return plain(self)

    def __hash__(self) -> int:
        _tell(UNKNOWN, self.term)
        return hash(plain(self))

    def __bool__(self) -> bool:
        _tell("truth", self.term)
        return bool(plain(self))

    def __int__(self) -> int:
        _tell(UNKNOWN, self.term)
        return int(plain(self))

    def __format__(self, spec: str) -> str:
        _tell(UNKNOWN, self.term)
        return format(plain(self), spec)

    def __str__(self) -> str:
        _tell(UNKNOWN, self.term)
        return str(plain(self))

    def __divmod__(self, other: Any) -> Any:
        return _computed("floordiv", self, other), _computed("mod", self, other)

    def __rdivmod__(self, other: Any) -> Any:
        return _computed("floordiv", other, self), _computed("mod", other, self)

    def __float__(self) -> float:
        _tell(UNKNOWN, self.term)
        return float(plain(self))


class SeenInt(Seen, int):
    def __new__(cls, value: int, term: Term) -> SeenInt:
        seen = int.__new__(cls, value)
        seen.term = term
        return seen

    __hash__ = Seen.__hash__
    __repr__ = int.__repr__
    __str__ = Seen.__str__


class SeenFloat(Seen, float):
    def __new__(cls, value: float, term: Term) -> SeenFloat:
        seen = float.__new__(cls, value)
        seen.term = term
        return seen

    __hash__ = Seen.__hash__
    __repr__ = float.__repr__
    __str__ = Seen.__str__


def plain(value: Any) -> Any:
    """The number itself; anything else as it is."""
    if isinstance(value, SeenInt):
        return int.__index__(value)
    return float.__add__(value, 0.0) if isinstance(value, SeenFloat) else value


def term_of(value: Any) -> Term:
    return value.term if isinstance(value, Seen) else value


def lose(value: SeenInt, through: int) -> None:
    """The number goes where it is not followed; so many files lie between the user's code and here."""
    _tell(UNKNOWN, value.term, through=through)


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


def _tell(name: str, *terms: Term, through: int = 0) -> None:
    """Tell who listens; `through`: so many files of others lie between the user's code and here."""
    if not _listener:
        return
    frame: FrameType | None = sys._getframe(1)
    for _ in range(1 + through):
        frame = _out_of_file(frame)
    if frame is None or str(frame.f_globals.get("__name__")).partition(".")[0] in NOT_ASKED:
        return
    code = frame.f_code
    shown = linecache.getline(code.co_filename, frame.f_lineno).strip()
    line = f"{code.co_filename.rpartition('/')[2]}:{frame.f_lineno}: {shown}"
    _listener[-1](Question(name, terms, (code.co_filename, code.co_name, *_position(frame)), line))


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
    def method(self: Any, other: Any) -> Any:
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
