"""What steps a model, as one: a wrapped optimizer, several, or one inside another.

    AcceleratedOptimizer, LightningOptimizer, Lookahead, …   share the state of what they wrap: it is taken
    SAM                         calls the step of a base optimizer, and has state of its own: both are carried
    [a, b]                      each holds some of the parameters; one held by both is refused
    an object with a `step`     the optimizers that it holds
    None                        the loop changes the weights by itself

Wrappers are told by what they hold, not by their names. `Joint` shows several to the plant as one optimizer:
state[p] has the entries of all of them, those of the n-th (n ≥ 1) under "key@n".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["as_one", "inside", "key_of", "members", "stepped"]


def as_one(given: object) -> Optimizer | None:
    """The optimizer that steps, or several as one; an error that begins with "optimizer" if it cannot be."""
    if given is None:
        return None
    several = list(given) if isinstance(given, Sequence) else [given]
    found: list[Optimizer] = []
    for one in several:
        found += [o for o in _chain(one) if not any(o is other for other in found)]
    if not found:
        raise TypeError(
            f"optimizer={type(given).__name__}: give a torch.optim.Optimizer, or a list of those that step "
            "the model"
        )
    _require_apart(found)
    return found[0] if len(found) == 1 else cast(Optimizer, Joint(found))


def members(optimizer: Optimizer | None) -> list[Optimizer]:
    """All optimizers that keep state of the parameters."""
    if optimizer is None:
        return []
    return optimizer.members if isinstance(optimizer, Joint) else [optimizer]


def stepped(optimizer: Optimizer | None) -> list[Optimizer]:
    """Those that change the parameters by their gradients: in the end every step calls theirs."""
    found = members(optimizer)
    outer = [o for o in found if any(part is other for part in inside(o) for other in found)]
    return [o for o in found if not any(o is other for other in outer)]


def inside(holder: object) -> list[Optimizer]:
    """The optimizers that an object holds, outermost first."""
    found: list[Optimizer] = []
    for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
        items = value if isinstance(value, (list, tuple)) else [value]
        for item in items:
            if isinstance(item, Optimizer) and not any(item is o for o in found):
                found += [item, *inside(item)]
    return found


def key_of(key: str, number: int) -> str:
    """The name of state `key` of the n-th optimizer."""
    return f"{key}@{number}" if number else key


def _chain(one: object) -> list[Optimizer]:
    """An optimizer and those that it holds; not those that have no state of their own."""
    parts = inside(one)
    if isinstance(one, Optimizer) and not any(one.state is part.state for part in parts):
        parts = [one, *parts]
    for part in parts:
        if not getattr(type(part).step, "hooked", False):
            raise ValueError(
                f"optimizer: {type(part).__name__} never called Optimizer.__init__, so its step() runs no "
                "hooks and nothing of it can be observed; call super().__init__(params, defaults) in it, or "
                "give the optimizer that it wraps"
            )
    return parts


def _require_apart(found: Sequence[Optimizer]) -> None:
    """No parameter may be stepped by two."""
    holder: dict[int, Optimizer] = {}
    for optimizer in stepped(cast(Optimizer, Joint(found))):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            other = holder.setdefault(id(parameter), optimizer)
            if other is not optimizer:
                raise ValueError(
                    f"optimizer: a parameter of shape {tuple(parameter.shape)} is held by two of them "
                    f"({type(other).__name__} and {type(optimizer).__name__}); every parameter may be "
                    "stepped by one"
                )


class Joint:
    """Several optimizers, as the plant and its checkpoints see one."""

    def __init__(self, found: Sequence[Optimizer]) -> None:
        self.members = list(found)
        self.state = JointState(self.members)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Each once: an outer optimizer mostly shares those of the inner."""
        groups = {id(group): group for o in self.members for group in o.param_groups}
        return list(groups.values())

    def register_step_pre_hook(self, hook: Callable[..., None]) -> Handles:
        return Handles([o.register_step_pre_hook(hook) for o in self.members])

    def register_step_post_hook(self, hook: Callable[..., None]) -> Handles:
        return Handles([o.register_step_post_hook(hook) for o in self.members])

    def state_dict(self) -> dict[str, Any]:
        return {str(n): o.state_dict() for n, o in enumerate(self.members)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for n, o in enumerate(self.members):
            o.load_state_dict(state[str(n)])


class Handles:
    """Of several hooks."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class JointState(Mapping[Tensor, "Entries"]):
    """parameter -> entries of all optimizers that keep some of it; written through."""

    def __init__(self, found: Sequence[Optimizer]) -> None:
        self.found = found

    def __getitem__(self, parameter: Tensor) -> Entries:
        return Entries([o.state.get(parameter, {}) for o in self.found])

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in o.state for o in self.found)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(dict.fromkeys(parameter for o in self.found for parameter in o.state))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Entries(MutableMapping[str, Any]):
    """Entry `key` of the n-th dict is called `key_of(key, n)` here."""

    def __init__(self, parts: Sequence[dict[str, Any]]) -> None:
        self.parts = parts

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        key, _, number = name.rpartition("@")
        if key and number.isdigit() and int(number) < len(self.parts):
            return self.parts[int(number)], key
        return self.parts[0], name

    def __getitem__(self, name: str) -> Any:
        part, key = self._place(name)
        return part[key]

    def __setitem__(self, name: str, value: Any) -> None:
        part, key = self._place(name)
        part[key] = value

    def __delitem__(self, name: str) -> None:
        part, key = self._place(name)
        del part[key]

    def __iter__(self) -> Iterator[str]:
        return (key_of(key, n) for n, part in enumerate(self.parts) for key in part)

    def __len__(self) -> int:
        return sum(map(len, self.parts))
