"""Residual branches: what a layer adds to the stream that goes past it, found in one forward pass.

    y = s + B(s)        B: every operator between s and its sum with s, if nothing else hears any of them

Off, the branch adds nothing. Masked, the parameters of its last module are zero, so that B(s) is; compact,
the modules that lie wholly in B are not run and hand on zeros. What of B stands in the code of a module
around them still runs, on those zeros, and may write into them (`relu_`, `out += s`). A branch whose two
forms do not agree on the model itself (granularity/layers.py) is left alone.

A parameter of B is told by its use: by operators of B only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .record import ExampleInputs, call_model, copied, output_tensors, reference_kernels
from .untouched import untouched

__all__ = ["Found", "branches_of"]

ADD = ("aten::add", "aten::add_")
MOVES = (
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::transpose", "aten::permute", "aten::clone",
    "aten::t", "aten::alias", "aten::squeeze", "aten::unsqueeze", "aten::contiguous", "aten::expand",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A branch as it was found: what is exchanged, and the tensors that are its own."""

    name: str
    ends: str  # the module whose answer is added
    last: str  # the one whose parameters are zero while masked
    passes: tuple[str, ...]  # modules before it
    returns: Mapping[str, int]  # of how many each of them returns a tuple; 0: a tensor
    tensors: tuple[str, ...]  # parameters and buffers


@dataclass
class Node:
    operator: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    place: str  # the innermost module that runs
    fixed: bool  # made of parameters and constants only
    tensor: str = ""  # the parameter or buffer that it is


@dataclass
class Flow:
    """What feeds what, in one forward pass."""

    nodes: list[Node] = field(default_factory=list)
    latest: dict[int, int] = field(default_factory=dict)  # id(tensor) -> its node
    kept: list[Tensor] = field(default_factory=list)  # so that no id is used twice
    places: list[str] = field(default_factory=lambda: [""])
    plain: dict[str, int] = field(
        default_factory=dict
    )  # modules that give a tensor (0), or a tuple of so many

    def of(self, tensor: Tensor) -> int:
        if id(tensor) not in self.latest:
            self.add(Node("", (), tuple(tensor.shape), "", False), tensor)
        return self.latest[id(tensor)]

    def add(self, node: Node, tensor: Tensor) -> None:
        self.latest[id(tensor)] = len(self.nodes)
        self.kept.append(tensor)
        self.nodes.append(node)


class Watching(TorchDispatchMode):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flow = self.flow
        given = [x for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        inputs = tuple(flow.of(x) for x in given)
        result = func(*args, **(kwargs or {}))
        fixed = all(flow.nodes[i].fixed for i in inputs)
        for x in (x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)):
            flow.add(Node(func._schema.name, inputs, tuple(x.shape), flow.places[-1], fixed), x)
        return result


def branches_of(model: nn.Module, example_inputs: ExampleInputs) -> list[Found]:
    """The branches of `model`, in the order in which they are added; the model is left as it was."""
    with untouched(model, example_inputs):
        model.eval()
        flow, heard = _flow(model, example_inputs)
    return _found(flow, heard, dict(model.named_modules()))


def _flow(model: nn.Module, example_inputs: ExampleInputs) -> tuple[Flow, set[int]]:
    flow = Flow()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flow.add(Node("", (), tuple(tensor.shape), "", True, name), tensor)
    inputs = copied(example_inputs)
    with torch.no_grad(), reference_kernels(model), _placed(model, flow), Watching(flow):
        output = call_model(model, inputs)
    return flow, {flow.of(x) for x in output_tensors(output)}


@contextmanager
def _placed(model: nn.Module, flow: Flow) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, inputs: Any) -> None:
        flow.places.append(names.get(module, flow.places[-1]))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            flow.plain[flow.places[-1]] = 0
        elif type(output) is tuple and output and isinstance(output[0], Tensor):
            flow.plain[flow.places[-1]] = len(output)
        flow.places.pop()

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _found(flow: Flow, heard: set[int], modules: Mapping[str, nn.Module]) -> list[Found]:
    nodes = flow.nodes
    before: list[int] = []  # bit sets of ancestors, the node itself among them
    for i, node in enumerate(nodes):
        before.append(functools.reduce(lambda bits, j: bits | before[j], node.inputs, 1 << i))
    told = functools.reduce(lambda bits, j: bits | before[j], heard, 0)  # what the outputs are made of
    live = [k for k in range(len(nodes)) if told >> k & 1]
    users: list[list[int]] = [[] for _ in nodes]
    for i in live:
        for j in nodes[i].inputs:
            users[j].append(i)
    uses = _uses(nodes, before, live)
    found: list[Found] = []
    taken: set[int] = set()
    for i in live:
        node = nodes[i]
        if node.operator not in ADD or len(node.inputs) != 2 or node.fixed:
            continue
        for o, s in (node.inputs, node.inputs[::-1]):
            if o == s or not before[o] >> s & 1 or nodes[o].shape != nodes[s].shape:
                continue
            inside = {k for k in range(s + 1, o + 1) if before[o] >> k & 1 and before[k] >> s & 1}
            closed = all(set(users[k]) <= (inside | {i}) and k not in heard for k in inside)
            if not closed or inside & taken or users[o] != [i]:
                continue
            branch = _branch(flow, live, inside, o, uses, modules)
            if branch is not None:
                found.append(branch)
                taken |= inside
                break
    return found


def _uses(nodes: Sequence[Node], before: Sequence[int], live: Sequence[int]) -> dict[str, set[int]]:
    """Parameter or buffer -> the operators on activations that take it, or what is made of it."""
    numbers = {k: node.tensor for k, node in enumerate(nodes) if node.tensor}
    found: dict[str, set[int]] = {name: set() for name in numbers.values()}
    for i in (i for i in live if not nodes[i].fixed):
        for j in nodes[i].inputs:
            if nodes[j].fixed:
                for k, name in numbers.items():
                    if before[j] >> k & 1:
                        found[name].add(i)
    return found


def _branch(
    flow: Flow,
    live: Sequence[int],
    inside: set[int],
    o: int,
    uses: Mapping[str, set[int]],
    modules: Mapping[str, nn.Module],
) -> Found | None:
    nodes = flow.nodes
    whole = _whole_modules([(k, nodes[k]) for k in live], inside, modules)
    at = o
    while nodes[at].operator in MOVES and (live := [j for j in nodes[at].inputs if not nodes[j].fixed]):
        at = live[0]
    last = nodes[at].place
    if isinstance(modules[last], nn.MultiheadAttention):
        last = f"{last}.out_proj"  # which it does not call
    ends = next((name for name in whole if last == name or last.startswith(f"{name}.")), None)
    own = [name for name, where in uses.items() if where and where <= inside]
    needed = [f"{last}.{name}" if last else name for name, _ in modules[last].named_parameters(recurse=False)]
    if ends is None or not needed or not set(needed) <= set(own) or ends not in flow.plain:
        return None
    passes = tuple(name for name in whole if name != ends)
    if not set(passes) <= flow.plain.keys():
        return None
    name = ends if not passes else _common([ends, *passes])
    returns = {module: flow.plain[module] for module in (ends, *passes)}
    return Found(name or ends, ends, last, passes, returns, tuple(own))


def _whole_modules(
    live: Sequence[tuple[int, Node]], inside: set[int], modules: Mapping[str, nn.Module]
) -> list[str]:
    """The largest modules that run in the branch and nowhere else."""
    runs: dict[str, bool] = {}
    for k, node in live:
        if node.fixed or not node.operator:
            continue
        path = node.place.split(".") if node.place else []
        for depth in range(1, len(path) + 1):
            name = ".".join(path[:depth])
            runs[name] = runs.get(name, True) and k in inside
    whole = [name for name, only in runs.items() if only and name in modules]
    return [n for n in whole if not any(n != other and n.startswith(f"{other}.") for other in whole)]


def _common(names: Sequence[str]) -> str:
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(p) > same and p[same] == parts[0][same] for p in parts):
        same += 1
    return ".".join(parts[0][:same])
