"""Functions that remember their answers (functools.lru_cache) are asked anew about sizes that are followed.

    f(n)  ->  f.__wrapped__(n)      where n is followed: so is what comes back, and none of it is remembered

einops keeps what becomes of a shape so; a followed number must neither be answered for a plain one, nor stay
behind for the user's own calls.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .reading import has_seen
from .seen import NOT_ASKED

__all__ = ["asked_anew"]

REMEMBERS: Any = type(functools.lru_cache(lambda: None))
NOT_THE_MODELS = {*NOT_ASKED, *sys.stdlib_module_names, "__main__"}  # that one is read at every pass
Place = tuple[dict[str, Any], str, Any, Callable[..., Any]]  # where it stands, itself, and what asks it anew


@contextmanager
def asked_anew() -> Iterator[None]:
    """Inside, such functions that stand in modules (not torch's, nor Python's own) do."""
    places = [*_places(len(sys.modules), next(reversed(sys.modules))), *_places_in(sys.modules["__main__"])]
    found = [place for place in places if place[0].get(place[1]) is place[2]]
    try:
        for names, name, _, anew in found:
            names[name] = anew
        yield
    finally:
        for names, name, value, _ in found:
            names[name] = value


@functools.lru_cache(maxsize=1)
def _places(count: int, last: str) -> list[Place]:
    """In all modules; looked for again as more are imported: reading every name takes 20 ms."""
    return [
        place
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] not in NOT_THE_MODELS and isinstance(module, ModuleType)
        for place in _places_in(module)
    ]


def _places_in(module: ModuleType) -> list[Place]:
    names = vars(module)
    return [(names, n, value, _anew(value)) for n, value in list(names.items()) if type(value) is REMEMBERS]


def _anew(remembers: Any) -> Callable[..., Any]:
    @functools.wraps(remembers)
    def asked(*given: Any, **named: Any) -> Any:
        follows = has_seen((given, tuple(named.values())))
        return (remembers.__wrapped__ if follows else remembers)(*given, **named)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(asked, name, getattr(remembers, name))
    return asked
