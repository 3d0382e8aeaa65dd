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
from typing import Any

from .reading import has_seen
from .seen import NOT_ASKED

__all__ = ["asked_anew"]

REMEMBERS: Any = type(functools.lru_cache(lambda: None))
NOT_THE_MODELS = {*NOT_ASKED, *sys.stdlib_module_names}


@contextmanager
def asked_anew() -> Iterator[None]:
    """Inside, such functions that stand in modules (not torch's, nor Python's own) do."""
    found = [
        (vars(module), name, value)
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] not in NOT_THE_MODELS and hasattr(module, "__dict__")
        for name, value in list(vars(module).items())
        if type(value) is REMEMBERS
    ]
    try:
        for names, name, value in found:
            names[name] = _anew(value)
        yield
    finally:
        for names, name, value in found:
            names[name] = value


def _anew(remembers: Any) -> Callable[..., Any]:
    @functools.wraps(remembers)
    def asked(*given: Any, **named: Any) -> Any:
        follows = has_seen((given, tuple(named.values())))
        return (remembers.__wrapped__ if follows else remembers)(*given, **named)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(asked, name, getattr(remembers, name))
    return asked
