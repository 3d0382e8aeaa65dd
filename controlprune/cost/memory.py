"""Peak bytes of one training step on the example inputs, as a polynomial in the widths.

    C(n) = Σ_parameters (weight + gradient + optimizer state)(n) + Σ_buffers(n) + Σ_saved activations(n)

which is what is held when the forward pass has ended and the backward pass begins, gradients of the step
before still there:

    weight      element size × Π sizes                      gradient    the same, where it is trainable
    state       what this optimizer keeps (`optimizer_state`)
    activation  every storage that autograd saves in a forward pass in training mode, once; parameters and
                buffers excluded, inputs included. It is matched to what the trace saw being allocated, by
                module, operator and shape, so it is a polynomial; what cannot be matched (tensors that no
                operator of the trace made) is a constant, and `unmatched` says how many bytes that is.

Not part of it: what is parked of dormant units (it waits wherever `park_on` says, and is gone after
`finalize`), the loss function's own tensors, temporaries inside a kernel or inside `optimizer.step` (smaller
than the activations, which are free by then), the allocator's rounding, the context of a GPU. Units: bytes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..structure.extents import Extent, Fixed, size
from ..structure.groups import Structure, Work
from ..structure.record import ExampleInputs, call_model, copied, input_tensors, module_names
from ..structure.tape.memory import storage_of
from ..structure.untouched import untouched
from .optimizer_state import kept_state
from .polynomial import Polynomial

__all__ = ["Memory", "memory", "saved_storages"]

Terms: TypeAlias = "list[tuple[float, tuple[Extent, ...]]]"


@dataclass(frozen=True)
class Memory:
    """`peak` is the sum of `parts` (weights, gradients, optimizer, buffers, activations), all in bytes."""

    peak: Polynomial
    parts: Mapping[str, Polynomial]
    unmatched: int  # bytes of saved activations that enter as a constant


def memory(
    structure: Structure, model: nn.Module, optimizer: Optimizer | None, example_inputs: ExampleInputs
) -> Memory:
    """Peak bytes of a training step of the dense `model`; one forward pass, which leaves nothing behind.

    `example_inputs` should be a batch as it is trained on. ValueError where the forward does not run in
    training mode, or where the optimizer cannot tell what it keeps.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with untouched(model):
        state = _state_terms(structure, tensors, optimizer)
        activations, unmatched = _activation_terms(structure, model, example_inputs)
    trained = [name for name in sorted(structure.parameters) if tensors[name].requires_grad]
    parts: dict[str, Terms] = {
        "weights": _tensor_terms(structure, tensors, sorted(structure.parameters)),
        "gradients": _tensor_terms(structure, tensors, trained),
        "optimizer": state,
        "buffers": _tensor_terms(structure, tensors, sorted(structure.tensors.keys() - structure.parameters)),
        "activations": activations,
    }
    count = len(structure.groups)
    peak = Polynomial.of([term for terms in parts.values() for term in terms], count)
    return Memory(peak, {name: Polynomial.of(terms, count) for name, terms in parts.items()}, unmatched)


def _tensor_terms(structure: Structure, tensors: Mapping[str, Tensor], names: Iterable[str]) -> Terms:
    return [(float(tensors[name].element_size()), structure.tensors[name]) for name in names]


def _state_terms(structure: Structure, tensors: Mapping[str, Tensor], optimizer: Optimizer | None) -> Terms:
    kept = {} if optimizer is None else kept_state(optimizer)
    return [
        (float(entry.element), tuple(structure.tensors[name][d] for d in entry.dims))
        for name in sorted(structure.parameters)
        for entry in kept.get(tensors[name], ())
    ]


class Allocations(TorchDispatchMode):
    """What the operators of a forward pass allocate, in order, and which of it autograd saves.

    `made`: storage -> number of its allocation; `terms`: each as a `Work` of fixed sizes; `saved`: storages
    that are held for the backward pass, parameters and buffers excluded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.where = model, ""
        self.terms: list[Work] = []
        self.made: dict[int, int] = {}
        self.saved: dict[int, Tensor] = {}
        self.given: set[int] = set()  # storages of the inputs
        self.owned = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage_of(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := storage_of(tensor)) not in given:
                self.made[storage] = len(self.terms)
                sizes = tuple(Fixed(n) for n in tensor.shape)
                self.terms.append(Work(self.where, func._schema.name, tensor.element_size(), sizes))
        return result

    def pack(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage not in self.owned:
            self.saved[storage] = tensor  # kept alive, so that no later storage has this number


def saved_storages(model: nn.Module, example_inputs: ExampleInputs) -> Allocations:
    """Run one forward pass in the model's present mode and tell what is allocated and saved."""
    seen = Allocations(model)

    def never(_: None) -> Tensor:
        raise RuntimeError("internal: no backward pass follows")

    inputs = copied(example_inputs)
    seen.given = {storage_of(tensor) for tensor in input_tensors(inputs)}
    with (
        torch.enable_grad(),
        module_names(seen),
        seen,
        torch.autograd.graph.saved_tensors_hooks(seen.pack, never),
    ):
        call_model(model, inputs)
    return seen


def _activation_terms(
    structure: Structure, model: nn.Module, example_inputs: ExampleInputs
) -> tuple[Terms, int]:
    model.train()
    try:
        seen = saved_storages(model, example_inputs)
    except Exception as error:
        raise ValueError(
            "example_inputs: for a memory budget the model must run on them in training mode, but its "
            f"forward raised {type(error).__name__}: {error}. Give a batch as it is trained on."
        ) from error
    matched = _match(seen.terms, structure.activations)
    terms: Terms = []
    unmatched = 0
    for storage, tensor in seen.saved.items():
        number = seen.made.get(storage)
        length = tensor.untyped_storage().nbytes()
        extents = None if number is None else matched[number]
        element = 0 if number is None else seen.terms[number].coefficient
        if extents is not None and element * math.prod(map(size, extents)) == length:
            terms.append((float(element), extents))
        else:
            terms.append((float(length), ()))
            unmatched += 0 if storage in seen.given else length
    return terms, unmatched


def _match(seen: Sequence[Work], traced: Sequence[Work]) -> list[tuple[Extent, ...] | None]:
    """The extents of each allocation: the k-th of a module, operator and shape is the k-th in the trace.

    Else (the two passes chose different kernels) one of as many elements in the same module, else anywhere
    if all such agree; else None.
    """
    exact: dict[tuple[Any, ...], list[tuple[Extent, ...]]] = defaultdict(list)
    within: dict[tuple[Any, ...], list[tuple[Extent, ...]]] = defaultdict(list)
    anywhere: dict[tuple[Any, ...], set[frozenset[tuple[Extent, int]]]] = defaultdict(set)
    example: dict[tuple[Any, ...], tuple[Extent, ...]] = {}
    for work in traced:
        shape = tuple(map(size, work.factors))
        number = (math.prod(shape), work.coefficient)
        exact[(work.where, work.operator, shape, work.coefficient)].append(work.factors)
        within[(work.where, *number)].append(work.factors)
        free = Counter(f for f in work.factors if not isinstance(f, Fixed))
        anywhere[number].add(frozenset(free.items()))
        example[number] = work.factors
    met: dict[tuple[Any, ...], int] = defaultdict(int)
    found: list[tuple[Extent, ...] | None] = []
    for work in seen:
        shape = tuple(map(size, work.factors))
        key = (work.where, work.operator, shape, work.coefficient)
        number = (math.prod(shape), work.coefficient)
        candidates = exact.get(key) or within.get((work.where, *number))
        if candidates:
            found.append(candidates[min(met[key], len(candidates) - 1)])
        else:
            found.append(example[number] if len(anywhere.get(number, ())) == 1 else None)
        met[key] += 1
    return found
