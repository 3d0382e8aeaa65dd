"""`analyse`: from a model and example inputs to its `Structure`.

Two traces write one tape: in eval mode, whose operators are the work that is counted, and in training mode
for couplings that exist only there (auxiliary heads). The model is left exactly as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .extents import groups_in
from .formula import recognised
from .groups import Group, Structure
from .record import ExampleInputs, record
from .saying import printable
from .sizes import bind_module_attributes
from .surroundings import plainly
from .tape.build import build
from .tape.rows import Rows
from .tape.tape import Tape
from .trial import FIXED
from .untouched import Memory
from .verify import flops, verify, without
from .views import inferring

__all__ = ["analyse", "find_groups", "require_groups", "tensors_in"]

Trace: TypeAlias = "Callable[[], tuple[Structure, bool]]"
Check: TypeAlias = "Callable[..., tuple[Structure, tuple[str, ...]]]"  # verify, of this model


def analyse(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ignored_layers: Sequence[nn.Module | str] = (),
    check: bool = True,
    head_dim: bool = False,
) -> Structure:
    """Groups, refusals, extents of every tensor, and counted work of `model` on `example_inputs`.

    `example_inputs`: a tuple (positional), a dict (keywords) or one tensor. `ignored_layers`: modules or
    their names, left alone. `check`: try masked against shrunk on the model, and refuse what disagrees.
    `head_dim`: index spaces over which two activations are multiplied too (structure/tape/rows.py).
    """
    ignored = tensors_in(model, ignored_layers)
    example_inputs = _on_meta(model, example_inputs)
    memory = Memory(model, example_inputs)
    with memory.kept():
        trace = partial(_traced, model, example_inputs, ignored, head_dim, memory)
        structure, trains = trace()
        memory.drop_copies(model.parameters())  # no forward wrote these: of a large model they are much
        if not check:
            return structure
        tried = partial(verify, model, example_inputs, memory=memory)
        found, views = tried(structure, trains=trains)
        if not views:
            return found
        structure = replace(structure, forwards=found.forwards)
        return _with_views(model, views, structure, trace, partial(tried, trains=trains))


def _with_views(
    model: nn.Module, views: tuple[str, ...], structure: Structure, trace: Trace, tried: Check
) -> Structure:
    """What is found while these modules infer sizes of views, unless as much is without."""
    traced, more = _inferring(model, views, structure.forwards, trace, tried)
    if _reach(more) >= _reach(structure):
        return more
    forwards, left = more.forwards, _but_for(structure, traced, more)
    if left is not None:
        left, views = tried(replace(left, forwards=forwards))
        forwards = left.forwards
        if views:
            return replace(more, forwards=forwards)
    found, _ = tried(replace(structure, forwards=forwards), infer=False)
    return replace(max(found, more, key=_reach), forwards=found.forwards)


def _inferring(
    model: nn.Module, views: tuple[str, ...], forwards: int, trace: Trace, tried: Check
) -> tuple[Structure, Structure]:
    """Traced and checked while these modules infer sizes, and any others whose views fail then."""
    while True:
        with inferring(model, views):
            structure, trains = trace()
            structure = replace(structure, views=views, forwards=forwards + structure.forwards)
            found, more = tried(structure, trains=trains)
        if not more:
            return structure, found
        views, forwards = (*views, *more), found.forwards


def _but_for(structure: Structure, traced: Structure, found: Structure) -> Structure | None:
    """The structure without the groups that were refused because the code raised, where no other reason did.

    Code that raises where sizes are inferred raises without, so nothing more can be had: None where that is
    not known, as numbers differed, or other groups were traced.
    """
    if (traced.names, traced.sizes) != (structure.names, structure.sizes):
        return None
    reasons = {refusal.name: refusal.reason for refusal in found.refused}
    gone = {n: reasons[name] for n, name in enumerate(structure.names) if name not in found.names}
    return without(structure, gone) if all(reason.startswith(FIXED) for reason in gone.values()) else None


def _reach(structure: Structure) -> float:
    """The share of the work in which a width can shrink."""
    shrinks = [work for work in structure.work if any(map(groups_in, work.factors))]
    return flops(shrinks) / (flops(structure.work) or 1)


def _traced(
    model: nn.Module, example_inputs: ExampleInputs, ignored: Collection[str], head_dim: bool, memory: Memory
) -> tuple[Structure, bool]:
    """What two forward passes tell, and whether there is one in training mode."""
    tape = Tape(model, norms=recognised(model), rows=Rows() if head_dim else None)
    with memory.kept(weights=False):
        model.eval()
        try:
            record(tape, example_inputs)
        except Exception as error:
            raise ValueError(
                f"example_inputs do not fit the model: its forward raised {type(error).__name__}: {error}. "
                "Give example_inputs as a tuple (positional), a dict (keywords) or one tensor."
            ) from error
    tape.counting, trains = False, True
    with memory.kept(weights=False):
        model.train()
        try:
            record(tape, example_inputs)
        except Exception:  # e.g. BatchNorm refuses one value per channel: eval mode has told what there is
            tape.where, trains = "", False
    bind_module_attributes(tape)
    return replace(build(tape, ignored), forwards=2 if trains else 1), trains


def _on_meta(model: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs:
    """A model without memory gets inputs without memory."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"meta"}:
        return example_inputs
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), example_inputs)


@plainly
def find_groups(
    model: nn.Module, example_inputs: ExampleInputs, *, ignored_layers: Sequence[nn.Module | str] = ()
) -> tuple[Group, ...]:
    """The groups of units of a model that can be pruned together; usable alone."""
    return analyse(model, example_inputs, ignored_layers=ignored_layers).groups


def require_groups(structure: Structure, model: str = "this model") -> Structure:
    """The structure itself, or an error that says why nothing in the model can be pruned."""
    if not structure.groups:
        reasons = printable("\n".join(f"  {r.name} ({r.size}): {r.reason}" for r in structure.refused))
        raise ValueError(
            f"model: nothing in {model} can be pruned:\n{reasons or '  it has no parameters that are read'}"
        )
    return structure


def tensors_in(model: nn.Module, ignored_layers: Sequence[nn.Module | str]) -> Collection[str]:
    """The parameters of these modules, by their canonical names; ValueError if one is none of the model."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    found: dict[str, None] = {}
    for layer in ignored_layers:
        if isinstance(layer, str) and layer not in modules:
            raise ValueError(f"ignored_layers: the model has no module called {layer!r}")
        if isinstance(layer, nn.Module) and layer not in names:
            raise ValueError(f"ignored_layers: {type(layer).__name__} is not a module of the model")
        prefix = layer if isinstance(layer, str) else names[layer]
        for name, _ in modules[prefix].named_parameters():
            found[f"{prefix}.{name}" if prefix else name] = None
    canonical = {name for name, _ in model.named_parameters()}
    return [name for name in found if name in canonical]
