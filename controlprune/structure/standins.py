"""Stand-ins: subclasses that a module of the user's belongs to while units are away, and its own class again.

    while masked   a norm takes its statistics over live units only (structure/formula.py)
                   a router's logits of units that are off are -inf (structure/rules/routing.py)
    while shrunk   nn.MultiheadAttention has heads of their own size (structure/heads.py)
                   sizes of views that do not follow are inferred (structure/views.py)
    either         torch's fused encoder layer, which knows neither, is off around them

Only `module.__class__` changes, and back. The object, its parameters, hooks and state-dict keys are the
user's; nothing is wrapped: torch.compile guards on the class (and compiles once for it, whatever the masks),
DDP and FSDP see the module they saw. A stand-in goes by the name of the class it stands for, knows nothing of
a controller, and can be copied and pickled: a copy of a masked model computes what the model computes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .extents import keep
from .formula import answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .groups import LiveNorm, LiveRouter, Structure

__all__ = ["HandsZeros", "StandIn", "count_live", "no_fused_layers", "restore", "stand_in"]


class StandIn(nn.Module):
    """What is mixed in before the class that is stood for."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revived, _lineage(type(self)), self.__dict__.copy()


class HandsZeros(nn.Module):
    """A module that is not run: its answer is zeros like the first tensor that it is given.

    Zeros of their own, never that tensor: code around it may write into what it gets (`relu_`, `out += x`),
    and that tensor may be the stream which goes past the branch.
    """

    _skip: int  # of how many its answer is a tuple (0: a tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = torch.zeros_like(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        return (found, *[None] * (self._skip - 1)) if self._skip else found

    def extra_repr(self) -> str:
        return "skipped: hands on zeros"


class CountsLive(StandIn):
    """A norm whose statistics are those of its live channels."""

    _formula: Any
    _live: Tensor

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return answer(self, self._formula, x, self._live.to(x.device), gate)


class ChoosesLive(StandIn):
    """A linear layer whose logits of units that are off are -inf: softmax gives them 0, and no gradient."""

    _live: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return _lost(super().forward(x), self._live)


class PicksLive(StandIn):
    """The same in a module with a forward of its own, that calls torch's linear with this parameter."""

    _live: Tensor
    _weight: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Losing(getattr(self, self._weight), self._live):
            return super().forward(*args, **kwargs)


class Losing(TorchFunctionMode):
    """Inside, what torch's linear function makes of this weight is -inf for units that are off."""

    def __init__(self, weight: Tensor, live: Tensor) -> None:
        super().__init__()
        self.weight, self.live = weight, live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (
            func is nn.functional.linear
            and kwargs.get("weight", args[1] if len(args) > 1 else None) is self.weight
        ):
            return _lost(result, self.live)
        return result


def _lost(logits: Tensor, live: Tensor) -> Tensor:
    return logits.masked_fill(~live.to(logits.device), -torch.inf)


class NotFused(StandIn):
    """An encoder (layer) of torch's that takes the plain path, also in eval mode."""

    activation_relu_or_gelu = property(lambda self: 0, lambda self, value: None)
    use_nested_tensor = property(lambda self: False, lambda self, value: None)


def stand_in(module: nn.Module, mixin: type[StandIn]) -> None:
    """Let the module belong to `mixin` before its own class; as it is if it does already."""
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, type(module))


def restore(module: nn.Module, mixin: type[StandIn]) -> None:
    """The module's own class again."""
    if isinstance(module, mixin):
        module.__class__ = type(module).__bases__[1]


@cache
def _mixed(mixin: type[StandIn], own: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (mixin, own), names)


def _lineage(kind: type) -> tuple[type, ...]:
    """The class that is stood for, then the stand-ins, inmost first."""
    mixins = []
    while issubclass(kind, StandIn):
        mixin, kind = kind.__bases__
        mixins.append(mixin)
    return kind, *reversed(mixins)


def _revived(own: type[nn.Module], *mixins: type[StandIn]) -> nn.Module:
    for mixin in mixins:
        own = _mixed(mixin, own)
    return own.__new__(own)


def count_live(model: nn.Module, structure: Structure, masks: Sequence[Tensor] | None) -> None:
    """Let norms and routers go by what is live under `masks`; None: by all they get."""
    if not structure.norms and not structure.routers:
        return
    modules = dict(model.named_modules())
    for norm in structure.norms:
        live = _live(norm, masks)
        own = live is None or _whole_groups(live, norm.formula.groups)
        _stands(modules[norm.module], CountsLive, {} if own else {"_formula": norm.formula, "_live": live})
    for router in structure.routers:
        live = _live(router, masks)
        own = live is None or bool(live.all())
        module = modules[router.module]
        if type(module).forward in (nn.Linear.forward, ChoosesLive.forward):
            _stands(module, ChoosesLive, {} if own else {"_live": live})
        else:
            _stands(module, PicksLive, {} if own else {"_live": live, "_weight": router.parameter})
    no_fused_layers(model)


def _live(part: LiveNorm | LiveRouter, masks: Sequence[Tensor] | None) -> Tensor | None:
    return None if masks is None else keep(part.extent, masks)


def _stands(module: nn.Module, mixin: type[StandIn], known: dict[str, Any]) -> None:
    """The module is a `mixin` that knows this; its own class where that is nothing."""
    if not known:
        restore(module, mixin)
        for name in mixin.__annotations__:
            vars(module).pop(name, None)
        return
    stand_in(module, mixin)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    vars(module).update(known, _live=known["_live"].to(device))


def _whole_groups(live: Tensor, groups: int) -> bool:
    """Nothing is off, or only whole groups, each with statistics of its own."""
    per_group = live.view(groups or 1, -1)
    return bool((per_group.all(1) | ~per_group.any(1)).all() if groups else live.all())


def no_fused_layers(model: nn.Module) -> None:
    """torch's fused encoder layers are off where a stand-in is inside, and only there."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            inside = any(
                isinstance(part, StandIn | HandsZeros) and not isinstance(part, NotFused)
                for part in module.modules()
            )
            (stand_in if inside else restore)(module, NotFused)
