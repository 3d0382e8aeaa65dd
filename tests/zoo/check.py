"""One model through the contract: every group, a random half of its units off; and any number of them.

    masked output = shrunk output     ‖masked − shrunk‖∞ / ‖masked‖∞ ≤ 1e-4 in float32 and ≤ 1e-6 in
                                      float64 (where small weights hide nothing), on the example inputs
                                      and on others of the same shape
    expand(shrink(m)) = m             every entry of the state dict, bit for bit
    FLOPs                             shrunk / dense, by torch's FlopCounterMode, MHA's fast path off

Before the check, constant parameters (norms at 1, biases at 0, layer scale at 1e-6) and BatchNorm
statistics are made different for every channel: a slice that is taken at the wrong place must show.
"""

from __future__ import annotations

import copy
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from controlprune.plant.plant import Plant
from controlprune.structure import analyse
from controlprune.structure.groups import Refusal, Structure

from .parts import Factory, Inputs

__all__ = ["FULL", "Result", "check", "limited", "run", "scatter"]

FULL = 0.8  # a model is fully handled when halving all its groups brings its FLOPs under this
TOLERANCE, EXACT = 1e-4, 1e-6


@dataclass(frozen=True)
class Result:
    """What one model showed. `status` is "full", "partial", "refused", "WRONG" or "error"."""

    groups: int = 0
    refused: tuple[Refusal, ...] = ()
    flop_ratio: float = 1.0
    max_error: float = 0.0
    max_error_float64: float | None = None  # None where the model does not run in float64
    max_error_training: float | None = None  # None where training mode draws random numbers of its own
    restored: bool = True
    trains: bool = True  # the shrunk model runs forward and backward in training mode
    seconds: float = 0.0
    forwards: int = 0  # of the traced model, while attaching
    attach: float = 0.0  # seconds of CPU time that this took
    failure: str = ""

    @property
    def exact(self) -> bool:
        training = self.max_error_training or 0.0
        if self.max_error_float64 is None:
            return max(self.max_error, training) <= TOLERANCE
        return max(self.max_error_float64, training) <= EXACT  # then float32 differs by rounding alone

    @property
    def status(self) -> str:
        if self.failure:
            return "error"
        if not (self.exact and self.restored):
            return "WRONG"
        if not self.groups:
            return "refused"
        return "full" if self.flop_ratio < FULL and self.trains else "partial"


def scatter(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every channel its own value where an initialisation gave them all the same (in place)."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.is_floating_point():
                _spread(parameter, random)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=random) * 0.3)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=random) + 0.5)
    return model


def _spread(parameter: Tensor, random: torch.Generator) -> None:
    first = float(parameter.flatten()[0])
    if not bool((parameter == first).all()):
        return
    noise = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
    if abs(first) > 0.01:
        parameter.copy_(first * (1 + 0.2 * noise))
    else:
        parameter.copy_(0.2 * noise if first == 0 else 0.5 + 0.2 * noise)


def call(model: nn.Module, inputs: Inputs, seed: int = 0) -> list[Tensor]:
    """Tensors among the outputs, in order; caches and other objects are left out."""
    torch.manual_seed(seed)
    out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _grouped_mm(tokens: tuple[int, ...], experts: tuple[int, ...], *_: Any, **__: Any) -> int:
    """(M, K) @ (E, K, N): every row meets one expert; torch's counter has no formula of its own."""
    return 2 * tokens[0] * tokens[1] * experts[-1]


COUNTED = {torch.ops.aten._grouped_mm: _grouped_mm} if hasattr(torch.ops.aten, "_grouped_mm") else {}


def flops(model: nn.Module, inputs: Inputs) -> int:
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:  # torch's counter fails on a parameter that is given to a module, under no_grad
        for parameter in needed:
            parameter.requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            call(model, inputs)
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
    return counter.get_total_flops()


def error(masked: Sequence[Tensor], shrunk: Sequence[Tensor]) -> float:
    """Largest relative difference over the outputs; infinite where shapes or finiteness differ."""
    worst = 0.0 if len(masked) == len(shrunk) else float("inf")
    for a, b in zip(masked, shrunk, strict=False):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.is_floating_point() and a.numel():
            if not torch.equal(a.isfinite(), b.isfinite()):
                return float("inf")
            finite = a.isfinite()
            gap = (
                (a - b)[finite].abs().amax() / a[finite].abs().amax().clamp_min(1e-12)
                if finite.any()
                else 0.0
            )
            worst = max(worst, float(gap))
        elif not torch.equal(a, b):
            return float("inf")
    return worst


def halves(structure: Structure, seed: int) -> list[Tensor]:
    """Per group, a random half of the units (rounded up) on."""
    return _draw(structure, seed, lambda steps, _: steps - steps // 2)


def uneven(structure: Structure, seed: int) -> list[Tensor]:
    """Per group, any number of units on: widths that should be equal must not only happen to be."""
    return _draw(
        structure, seed + 1, lambda steps, random: int(torch.randint(1, steps + 1, (), generator=random))
    )


def _draw(structure: Structure, seed: int, count: Callable[[int, torch.Generator], int]) -> list[Tensor]:
    """Random masks; `count` of the multiples that the group's width may be."""
    random = torch.Generator().manual_seed(seed)
    masks = []
    for group in structure.groups:
        live = max(group.multiple * count(group.size // group.multiple, random), group.least)
        masks.append(torch.randperm(group.size, generator=random) < live)
    return masks


def others(inputs: Inputs, seed: int) -> Inputs:
    """A batch of three with other noise; only the noise is other where tensors share no batch (graphs)."""
    random = torch.Generator().manual_seed(seed + 1)
    batched = {leaf.shape[0] for leaf in tree_leaves(inputs)} == {2} and not _is_graph(inputs)

    def other(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and batched:
            leaf = torch.cat([leaf, leaf[:1]])
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=random).to(leaf.dtype)
        return leaf

    return tree_map(other, inputs)


def _is_graph(inputs: Inputs) -> bool:
    return not isinstance(inputs, Mapping) and len(inputs) > 1 and inputs[1].shape[0] == 2


def _disagreement(plant: Plant, masks: list[Tensor], inputs: Sequence[Inputs]) -> float:
    """Largest error of the shrunk against the masked model over the inputs; leaves the model shrunk."""
    outputs = []
    for compact in (False, True):
        plant.apply(masks, compact=compact)
        with torch.no_grad():
            outputs.append([call(plant.model, example) for example in inputs])
    return max(error(masked, shrunk) for masked, shrunk in zip(*outputs, strict=True))


def _trains(model: nn.Module, inputs: Inputs) -> bool:
    """One forward and backward in training mode of a copy of the shrunk model."""
    model = copy.deepcopy(model).train()
    loss = sum(leaf.square().mean() for leaf in call(model, inputs) if leaf.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()
    return all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def check(model: nn.Module, inputs: Inputs, seed: int = 0) -> Result:
    """Analyse, switch a random half of every group off, compare masked, shrunk and expanded."""
    began = time.process_time()
    model = scatter(model.eval(), seed)
    structure = analyse(model, inputs)
    attach = time.process_time() - began
    if not structure.groups:
        return Result(0, structure.refused, seconds=attach, forwards=structure.forwards, attach=attach)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = flops(model, inputs)
    masks, more = halves(structure, seed), uneven(structure, seed)
    examples = (inputs, others(inputs, seed))
    plant = Plant(model, None, structure)
    gap = max(_disagreement(plant, draw, examples) for draw in (more, masks))
    ratio = flops(model, inputs) / dense if dense else 1.0
    trains = _trains(model, inputs)
    plant.release()
    after = model.state_dict()
    restored = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    precise = _in_float64(model, structure, (masks, more), examples)
    training = _in_training(model, structure, masks, inputs)
    seconds = time.process_time() - began
    return Result(
        *(len(structure.groups), structure.refused, ratio, gap, precise, training),
        *(restored, trains, seconds, structure.forwards, attach),
    )


def _in_float64(
    model: nn.Module, structure: Structure, draws: Sequence[list[Tensor]], examples: Sequence[Inputs]
) -> float | None:
    model.double()
    doubled = [tree_map(_double, example) for example in examples]
    try:
        with torch.no_grad():
            call(model, doubled[0])
    except RuntimeError:  # some operators and some models know float32 only
        model.float()
        return None
    plant = Plant(model, None, structure)
    gap = max(_disagreement(plant, masks, doubled) for masks in draws)
    plant.release()
    return gap


def _in_training(model: nn.Module, structure: Structure, masks: list[Tensor], inputs: Inputs) -> float | None:
    """The same in training mode (in float64 where it can), without dropout, unless random numbers remain."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    example = tree_map(_double, inputs) if next(model.parameters()).dtype == torch.float64 else inputs
    with torch.no_grad():
        first, again = call(model, example, seed=0), call(model, example, seed=1)
    if error(first, again) > 0:
        return None
    return _disagreement(Plant(model, None, structure), masks, (example,))


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds of CPU time."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(factory: Factory, seed: int = 0, seconds: int = 120) -> Result:
    """`check` on a fresh model; what is raised is part of the result."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with limited(seconds):
            torch.manual_seed(seed)
            return check(*factory(), seed=seed)
    except Exception as raised:
        place = traceback.extract_tb(raised.__traceback__)[-1]
        where = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}"
        return Result(failure=f"{type(raised).__name__} at {where}: {str(raised).splitlines()[:1]}")
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
