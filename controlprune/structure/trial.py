"""One joint mask tried on the model itself: do masked and shrunk outputs agree, and if not, where and why?

    shrunk:  every tensor index_select-ed, size attributes written      y_s = f(W[live])
    masked:  reader slices of the units that are off are zero           y_m = f(W ⊙ mask)
    agree:   max |y_m − y_s| ≤ tolerance · max |y_m| for every output tensor

The two sum in different orders. What differs in the model's own numbers is asked again in float64 where the
model runs in it, and else against what rounding alone does: outputs of weights that are one rounding apart.

Tensors that are constant (zero biases, unit gains, layer scales of 1e-6) would hide errors and are replaced
by random values. The model's own tensors come back untouched: only `.data` is exchanged, and put back
whatever happens.
"""

from __future__ import annotations

import linecache
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .exchange import at_widths, select_live, tensors_of
from .extents import Extent, groups_in, keep
from .groups import Structure
from .record import ExampleInputs, call_model, copied, output_tensors, reference_kernels
from .standins import count_live
from .tape.attributes import traced_attributes
from .tape.reading import SizeReader
from .tape.remembered import asked_anew
from .tape.seen import Question, listening
from .untouched import Memory, seed_all

__all__ = ["DIFFERS", "FIXED", "Failure", "Trial", "agree"]

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
EXACT = 1e-5  # in float64, where norms and angles compute in float32 all the same (1e-7 of it, measured)
NOISE = 32.0  # times what rounding the weights once does: rounding goes on in every layer
MOST_NOISE = 1e-2  # of the largest output: a model that is noisier tells nothing
QUIET = 1e-3  # vectors below it (layer scales) count as constant
DIFFERS = "the numeric check failed: masked and shrunk outputs differ"
ELSEWHERE = "at some widths the model's code asks about sizes that it does not ask about when dense"
FIXED = "the model's code fixes its size"
VIEW = r"shape '\[[^-]*\]' is invalid"  # of a view's error, where no size is inferred
KEPT = "a size that the module keeps, as self.head_dim"
REWRITES = (  # how an error's text begins, and what to write instead
    (r"shape '\[-1, \d+\]'", "write x.flatten(1), or -1 for the size that shrinks"),
    (r"shape '", f"write -1 for the size that shrinks, or {KEPT}"),
    (r".*SymIntArrayRef expected", "write torch.empty(n, m) for torch.Tensor(n, m)"),
    (r"split_with_sizes expects", f"split by {KEPT.replace('head_dim', 'width')}, or write x.chunk(n, dim)"),
)

NOT_THE_MODELS = ("torch", __name__.partition(".")[0])  # packages whose lines are not the user's

Values: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Failure:
    """Why a joint mask can't be: for people, and in which module it was raised ("": nowhere)."""

    reason: str
    module: str = ""
    view: bool = False  # was it a view that the sizes given do not fit?


@dataclass
class Trial:
    """Tries joint masks, and counts the forward passes that this took."""

    model: nn.Module
    example_inputs: ExampleInputs
    structure: Structure
    seed: int
    memory: Memory | None = None  # of the model; what a run leaves behind (caches) must not matter
    forwards: int = 0
    _values: dict[str, Tensor] = field(default_factory=dict)
    _readers: dict[str, list[tuple[int, int, Extent]]] = field(default_factory=dict)  # group, dim, extent
    _rooms: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)  # see _room
    _elsewhere: list[str] = field(default_factory=list)  # lines that ask (more) about sizes only when shrunk
    _doubles: bool | None = None  # does the model run in float64? None: not tried

    def __post_init__(self) -> None:
        self._own = tensors_of(self.model)
        self._values = _disturbed(self._own, self.structure, self.seed)
        for number, group in enumerate(self.structure.groups):
            for entry in group.readers:
                self._readers.setdefault(entry.tensor, []).append((number, entry.dim, entry.extent))
        self._memory = self.memory or Memory(self.model, weights=False)
        self._all = [torch.ones(n, dtype=torch.bool) for n in self.structure.sizes]

    def run(self, masks: Sequence[Tensor], *, trains: bool = False) -> Failure | None:
        """None where masked and shrunk agree (`trains`: and the shrunk model runs in training mode too)."""
        with self._memory.kept(weights=False):
            self._elsewhere.clear()
            try:
                if trains:
                    with self._memory.kept(weights=False):  # the next pass is a first one too, as traced
                        self.model.train()
                        self._shrunk(self._values, self.example_inputs, masks)
                self.model.eval()
                shrunk = self._shrunk(self._values, self.example_inputs, masks)
                masked = self._masked(self._values, self.example_inputs, masks)
            except Exception as error:
                return _told(error, self.model)
            if self._elsewhere:
                return Failure(f"{ELSEWHERE}: {self._elsewhere[0]}")
            if agree(masked, shrunk) or self._is_rounding(masked, shrunk, masks):
                return None
            return Failure(DIFFERS)

    def _is_rounding(self, masked: list[Tensor], shrunk: list[Tensor], masks: Sequence[Tensor]) -> bool:
        if [y.shape for y in masked] != [y.shape for y in shrunk]:
            return False
        if self._doubles is not False:
            inputs = pytree.tree_map_only(Tensor, _double, self.example_inputs)
            try:
                exact = self._masked(self._values, inputs, masks, double=True)
                self._doubles = any(y.dtype == torch.float64 for y in exact)
                shrunk_exactly = self._shrunk(self._values, inputs, masks, double=True)
                if self._doubles and agree(exact, shrunk_exactly, EXACT):
                    return True
            except Exception:
                self._doubles = False
        noise = self._noise(masked, masks)
        return noise is not None and agree(masked, shrunk, NOISE * noise)

    def _noise(self, masked: list[Tensor], masks: Sequence[Tensor]) -> float | None:
        """What one rounding of every weight does to the outputs, relative to the largest; None: too much."""
        generator = torch.Generator().manual_seed(self.seed)
        values = {}
        for name, value in self._values.items():
            if value.is_floating_point():
                signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
                value = value * (1 + torch.finfo(value.dtype).eps / 2 * signs)
            values[name] = value
        again = self._masked(values, self.example_inputs, masks)
        noise = max((_gap(a, b) for a, b in zip(masked, again, strict=True)), default=0.0)
        return noise if NOISE * noise <= MOST_NOISE else None

    def _shrunk(
        self, values: Values, inputs: ExampleInputs, masks: Sequence[Tensor], *, double: bool = False
    ) -> list[Tensor]:
        live = {name: self._live(name, value, masks, double) for name, value in values.items()}
        widths = [int(mask.sum()) for mask in masks]
        asked: list[Question] = []
        with listening(asked.append), traced_attributes(self.model), asked_anew(), SizeReader():
            outputs = self._forward(live, inputs, widths)
        more = Counter(question.place for question in asked) - Counter(self.structure.asked)
        self._elsewhere += [question.line for question in asked if question.place in more]
        return outputs

    def _masked(
        self, values: Values, inputs: ExampleInputs, masks: Sequence[Tensor], *, double: bool = False
    ) -> list[Tensor]:
        zeroed = {name: self._zeroed(name, value, masks, double) for name, value in values.items()}
        with _counting(self.model, self.structure, masks):
            return self._forward(zeroed, inputs, None)

    def _live(self, name: str, value: Tensor, masks: Sequence[Tensor], double: bool) -> Tensor:
        live = select_live(value, self.structure.tensors[name], masks)
        if live is value:
            return self._as(name, value, double)
        room = self._room(name, value, double)
        return room.as_strided((live.numel(),), (1,)).view(live.shape).copy_(live)

    def _zeroed(self, name: str, value: Tensor, masks: Sequence[Tensor], double: bool) -> Tensor:
        """Reader slices of units that are off times 0: one pass over memory, as the copy alone would be."""
        zeroed = value
        for number, dim, extent in self._readers.get(name, ()):
            if not bool(masks[number].all()):
                alone = [*self._all[:number], masks[number], *self._all[number + 1 :]]
                shape = [-1 if d == dim else 1 for d in range(value.dim())]
                on = keep(extent, alone).to(value).view(shape)
                zeroed = torch.mul(zeroed, on, out=self._room(name, value, double))
        return self._as(name, value, double) if zeroed is value else zeroed

    def _as(self, name: str, value: Tensor, double: bool) -> Tensor:
        return self._room(name, value, double).copy_(value) if double else value

    def _room(self, name: str, value: Tensor, double: bool) -> Tensor:
        """Memory for this tensor that every pass uses again: fresh pages would cost more than a pass does."""
        dtype = torch.float64 if double and value.is_floating_point() else value.dtype
        if (name, dtype) not in self._rooms:
            self._rooms[name, dtype] = torch.empty_like(value, dtype=dtype)
        return self._rooms[name, dtype]

    def _forward(self, values: Values, inputs: ExampleInputs, widths: list[int] | None) -> list[Tensor]:
        self.forwards += 1
        with at_widths(self.model, self.structure, values, widths, self._own), torch.no_grad():
            seed_all(0)
            with reference_kernels(self.model):
                outputs = output_tensors(call_model(self.model, copied(inputs)))
                return [y.clone() for y in outputs]  # one may be a weight, whose memory is used again


@contextmanager
def _counting(model: nn.Module, structure: Structure, masks: Sequence[Tensor]) -> Iterator[None]:
    count_live(model, structure, masks)
    try:
        yield
    finally:
        count_live(model, structure, None)


def _disturbed(own: Mapping[str, Tensor], structure: Structure, seed: int) -> dict[str, Tensor]:
    """Values for the check: the model's own, but constants made random."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: tensor.detach() for name, tensor in own.items()}
    for name, value in values.items():
        grouped = any(groups_in(extent) for extent in structure.tensors[name])
        if (grouped or name in structure.parameters) and _is_constant(value):
            level = float(value.flatten()[0])
            noise = torch.rand(value.shape, generator=generator)
            around = (noise + 0.5) * (level if abs(level) > 0.1 else 1.0)
            values[name] = (0.2 * (noise - 0.5) if level == 0 else around).to(value)
    return values


def _is_constant(value: Tensor) -> bool:
    if not value.is_floating_point() or value.numel() < 2:
        return False
    flat = value.flatten()
    if value.dim() == 1 and float(flat.abs().max()) < QUIET:
        return True
    return bool((flat[:8] == flat[0]).all()) and bool((flat == flat[0]).all())


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def agree(masked: list[Tensor], shrunk: list[Tensor], least: float = 0.0) -> bool:
    """Within the tolerance of their number type, or `least` where that is more."""
    return len(masked) == len(shrunk) and all(
        a.shape == b.shape and _gap(a, b) <= max(TOLERANCE.get(a.dtype, 1e-4), least)
        for a, b in zip(masked, shrunk, strict=True)
    )


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry; infinite where holes (nan) lie elsewhere."""
    if not (a.is_floating_point() or a.is_complex()) or not a.numel():
        return 0.0  # decisions (argmax, counts) may flip on rounding; the floats tell
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    difference = float((a - b).abs().nan_to_num(0.0, 0.0).amax())
    scale = float(a.abs().nan_to_num(0.0, 1.0).amax())
    return difference / scale if scale else (0.0 if difference == 0.0 else float("inf"))


# --- what is told of an error --------------------------------------------------------------------------


def _told(error: Exception, model: nn.Module) -> Failure:
    """Its first line, the line of the model's own code that it came from, and what to write there."""
    names = {id(module): name for name, module in model.named_modules()}
    module, place = "", ""
    for frame, line in _frames(error.__traceback__):
        module = names.get(id(frame.f_locals.get("self")), module)
        path, package = frame.f_code.co_filename, str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in NOT_THE_MODELS:
            place = f"; {path.rpartition('/')[2]}:{line}: {linecache.getline(path, line).strip()}"
    text = next(iter(str(error).strip().splitlines()), "")
    instead = next((f"; to prune it, {hint}" for begin, hint in REWRITES if re.match(begin, text)), "")
    return Failure(
        f"{FIXED} ({type(error).__name__}: {text}{place}{instead})", module, bool(re.match(VIEW, text))
    )


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
