"""Trace: run the model's real forward and let the rules write the tape.

A TorchDispatchMode sees every ATen operator of one forward pass, whatever Python did to get there
(control flow that depends on data, dict or dataclass outputs, keyword inputs, caches). The pass runs under
no_grad; `untouched` around it leaves the model as it was found.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .rules import contraction as rules_contraction
from .rules import indexing as rules_indexing
from .rules import normalisation as rules_normalisation
from .rules import reduction as rules_reduction
from .rules import spatial as rules_spatial
from .rules import views as rules_views
from .rules.elementwise import elementwise
from .rules.following import follow
from .rules.routing import require_fit, require_unkept
from .rules.table import fresh, lookup, taint
from .surroundings import as_found
from .tape.attributes import SizeWatcher, traced_attributes
from .tape.memory import storage_of
from .tape.remembered import asked_anew
from .tape.seen import listening
from .tape.tape import Call, Dims, Rule, Tape

__all__ = [
    "ExampleInputs",
    "Recorder",
    "batch_size",
    "call_model",
    "copied",
    "input_tensors",
    "module_names",
    "output_tensors",
    "record",
]

ExampleInputs: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any]"
RULE_MODULES = (
    rules_contraction,
    rules_indexing,
    rules_normalisation,
    rules_reduction,
    rules_spatial,
    rules_views,
)


class Recorder(TorchDispatchMode):
    """Applies the rule of every operator that runs."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import torch._dynamo (seconds) only to tell it to leave this class alone."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = lookup(func._schema.name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = elementwise
        if rule is None:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
            from torch._decomp import decomposition_table  # takes a fifth of a second to import

            if (decompose := decomposition_table.get(func)) is not None:
                with self:
                    return decompose(*args, **kwargs)
        call = self._call(func, args, kwargs)
        result = func(*args, **kwargs)
        call.outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._write(rule or taint, call)
        if self.tape.rows is not None:
            follow(self.tape, self.tape.rows, call, func, args, kwargs)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Call:
        arguments: dict[str, object] = {}
        for position, argument in enumerate(func._schema.arguments):
            if position < len(args):
                arguments[argument.name] = args[position]
            else:
                arguments[argument.name] = kwargs.get(argument.name, argument.default_value)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        entries = {id(tensor): self.tape.entry(tensor) for tensor in tensors}
        storages = frozenset(map(storage_of, tensors))
        return Call(func._schema.name, arguments, [], entries, [], storages, func._schema.is_mutable)

    def _write(self, rule: Rule, call: Call) -> None:
        weight = all(entry.weight for entry in call.entries.values())
        found = self._apply(rule, call)
        require_fit(self.tape, call, found)
        labels = [*call.labels, *[""] * len(found)][: len(found)]
        for output, dims, label in zip(call.outputs, found, labels, strict=True):
            self.tape.set(output, dims, weight, call.pending, label)
            self.tape.write(call, output, dims)

    def _apply(self, rule: Rule, call: Call) -> list[Dims]:
        """What the rule says of each output; a call that the rule doesn't foresee taints."""
        try:
            found = rule(self.tape, call)
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
            return taint(self.tape, call)
        found = [*found, *(fresh(output.shape) for output in call.outputs[len(found) :])]
        sizes = [[dim.size for dim in dims] for dims in found[: len(call.outputs)]]
        fits = sizes == [list(output.shape) for output in call.outputs]
        return found[: len(call.outputs)] if fits else taint(self.tape, call)


def call_model(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """model(*tuple), model(**dict) or model(tensor)."""
    with warnings.catch_warnings(), as_found():
        warnings.simplefilter("ignore")  # the user hears the model's own warnings from the user's own calls
        if isinstance(example_inputs, Tensor):
            return model(example_inputs)
        if isinstance(example_inputs, Mapping):
            return model(**example_inputs)
        return model(*example_inputs)


def copied(example_inputs: ExampleInputs) -> ExampleInputs:
    """The same inputs in new tensors and objects: a forward may write on them (caches, in-place)."""
    memo: dict[int, Any] = {}
    for tensor in input_tensors(example_inputs):
        memo[id(tensor)] = _plain(tensor).detach().clone().requires_grad_(tensor.requires_grad)
    try:
        return copy.deepcopy(example_inputs, memo)
    except Exception:  # an object that can't be copied is passed as it is
        return example_inputs


def _plain(tensor: Tensor) -> Tensor:
    """Not of a subclass that is there for its name only (torchvision's images): no tracer sees into one."""
    kept = type(tensor) is Tensor or is_traceable_wrapper_subclass(tensor)
    return tensor if kept else tensor.as_subclass(Tensor)


def output_tensors(value: Any) -> list[Tensor]:
    """Tensors in nested lists, tuples, dicts and dataclasses; other objects (caches) are the model's own."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in output_tensors(item)]
    if isinstance(value, (list, tuple, set)):
        return [tensor for item in value for tensor in output_tensors(item)]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in output_tensors(getattr(value, field.name))]
    return []


def input_tensors(value: Any) -> list[Tensor]:
    """Every tensor among the example inputs, those inside the user's objects included."""
    found = output_tensors(value)
    if not found and hasattr(value, "__dict__"):
        return [tensor for item in vars(value).values() for tensor in input_tensors(item)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in input_tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in input_tensors(item)]
    return found


def record(tape: Tape, example_inputs: ExampleInputs) -> Any:
    """One forward pass on the tape (in the model's present mode); returns the model's output."""
    example_inputs, asked = copied(example_inputs), []
    for tensor in input_tensors(example_inputs):
        if not tape.owned(tensor):
            tape.set(tensor, fresh(tensor.shape, "an input of the model"), weight=False)
    with (
        torch.no_grad(),
        reference_kernels(tape.model),
        module_names(tape),
        traced_attributes(tape.model),
        asked_anew(),
        listening(asked.append),
        Recorder(tape),
        SizeWatcher(tape),
    ):
        output = call_model(tape.model, example_inputs)
    tape.reads += tape.grouped.values()
    require_unkept(tape)
    tape.asks(asked)
    tape.where = ""
    for tensor in output_tensors(output):
        tape.pin_dims(tape.entry(tensor).dims, "an output of the model")
    return output


class Located(Protocol):
    """Something that is told which module of its model is running."""

    model: nn.Module
    where: str


@contextmanager
def module_names(tape: Located) -> Iterator[None]:
    """Keep `tape.where` at the dotted name of the module that is running."""
    names = {module: name for name, module in tape.model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        stack.append(tape.where)
        tape.where = names.get(module, tape.where)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        tape.where = stack.pop()

    before = module_hooks.register_module_forward_pre_hook(enter)
    after = module_hooks.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextmanager
def reference_kernels(model: nn.Module) -> Iterator[None]:
    """Fused kernels that hide their operators (MHA fast path, RNNs of oneDNN and cuDNN) are off."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if recurrent:
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)


def batch_size(inputs: Any) -> int:
    """The length of the first dimension of the first tensor."""
    leaves = tree_leaves(inputs)
    return next((int(x.shape[0]) for x in leaves if isinstance(x, Tensor) and x.dim() > 0), 1)
