"""What modules keep beside tensors (`get_extra_state`), as plain JSON and tensors, and back.

    None, bool, int, float, str      as they are
    list, tuple, dict                {"list": […]}, {"tuple": […]}, {"dict": [[key, value], …]}
    tensor, bytes                    {"tensor": name}, beside the file's own tensors, {"bytes": base64}

Anything else has no plain form, and a file never holds a pickle: it is left out, and said.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..structure.saying import warn

__all__ = ["PREFIX", "extra_states", "read_extra_states"]

PREFIX = "extra_state/"
PLAIN = (bool, int, float, str)


def extra_states(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Module name -> its extra state in plain form, and the tensors that it names."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in _keepers(model):
        found: dict[str, Tensor] = {}
        try:
            plain[name] = _to_plain(module.get_extra_state(), f"{PREFIX}{name}/", found)
        except TypeError as error:
            warn(
                f"controlprune: the extra state of module {name!r} is not saved: it holds a {error}, which "
                "has no plain form"
            )
        else:
            tensors |= found
    return plain, tensors


def read_extra_states(
    model: nn.Module, plain: Any, tensors: Mapping[str, Tensor]
) -> list[tuple[nn.Module, Any]]:
    """The reverse: modules, and what to give their `set_extra_state`. ValueError where it is not theirs."""
    keepers = dict(_keepers(model))
    if not isinstance(plain, Mapping) or not plain.keys() <= keepers.keys():
        raise ValueError("its extra states are those of other modules")
    return [(keepers[name], _from_plain(value, tensors)) for name, value in plain.items()]


def _keepers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module


def _to_plain(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        name = f"{where}{len(tensors)}"
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_plain(item, where, tensors) for item in value]}
    if isinstance(value, Mapping):
        pairs = [[_to_plain(k, where, tensors), _to_plain(v, where, tensors)] for k, v in value.items()]
        return {"dict": pairs}
    raise TypeError(type(value).__name__)


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if value is None or type(value) in PLAIN:
        return value
    try:
        [(kind, content)] = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "bytes":
            return base64.b64decode(content, validate=True)
        if kind == "dict":
            return {_from_plain(k, tensors): _from_plain(v, tensors) for k, v in content}
        items = [_from_plain(item, tensors) for item in content]
        return {"list": list, "tuple": tuple}[kind](items)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"an extra state cannot be read ({error!r})") from error
