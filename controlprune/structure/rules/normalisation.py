"""Normalisations: which dimensions share statistics, which only carry entries.

BatchNorm   statistics per channel            channels free, batch and space pinned
GroupNorm   statistics per (example, group)   channels are (group, member): groups free
LayerNorm   statistics over the last dims
weight_norm w = g·v/‖v‖ over all dims but one zeroed columns add nothing to ‖v‖: read exactly

Members of a GroupNorm and the dims of a LayerNorm or RMSNorm are pinned, unless the module that runs is one
whose formula is known: then it counts the live ones (structure/formula.py).
"""

from __future__ import annotations

from ..tape.axes import Axis
from ..tape.tape import Call, Dim, Dims, Read, Tape
from .reduction import NORM_ALONE, STANDARDISED
from .table import rule

NORM = "a norm takes statistics over it: with units off, the others would be normalised differently"


def _affine(tape: Tape, call: Call, axis: Dim) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            tape.unify(axis.axis, call.dims(name)[0].axis)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm",
      "_native_batch_norm_legit_functional")  # fmt: skip
def batch_norm(tape: Tape, call: Call) -> list[Dims]:
    dims = [dim.plain for dim in call.dims("input")]
    _affine(tape, call, dims[1])
    if call.arguments.get("training", True) or not call.has("running_mean"):
        tape.pin_dims([dims[0], *dims[2:]], STANDARDISED if call.weight("input") else NORM)
    return [dims]


@rule("native_layer_norm")
def layer_norm(tape: Tape, call: Call) -> list[Dims]:
    dims = [dim.plain for dim in call.dims("input")]
    normal = dims[len(dims) - len(call.integers("normalized_shape")) :]
    for dim in normal:
        tape.statistics(dim.axis, NORM + NORM_ALONE)
    _unify_last(tape, call, normal)
    return [dims]


@rule("_fused_rms_norm", "rms_norm")
def rms_norm(tape: Tape, call: Call) -> list[Dims]:
    return layer_norm(tape, call)


def _unify_last(tape: Tape, call: Call, normal: Dims) -> None:
    for name in ("weight", "bias"):
        if call.has(name):
            for dim, entry in zip(normal, call.dims(name), strict=True):
                tape.unify(dim.axis, entry.axis)


@rule("native_group_norm")
def group_norm(tape: Tape, call: Call) -> list[Dims]:
    dims = [dim.plain for dim in call.dims("input")]
    groups = call.integer("group")
    _, member = tape.regroup([dims[1].axis], [groups, dims[1].size // groups])
    tape.statistics(member, NORM, dims[1].axis)
    tape.pin_dims(dims[2:], NORM)
    _affine(tape, call, dims[1])
    return [dims]


@rule("_weight_norm_interface")
def weight_norm(tape: Tape, call: Call) -> list[Dims]:
    dims, scale, free = call.dims("v"), call.dims("g"), call.integer("dim")
    out = list(dims)
    for d, dim in enumerate(dims):
        if d == free:
            out[d] = Dim(tape.unify(dim.axis, scale[d].axis), dim.sources | scale[d].sources)
        elif dim.sources:
            tape.reads.append(Read(dim.axis, dim.sources))
        else:
            tape.pin(dim.axis, "weight_norm takes a norm over it")
    norms = [out[d].plain if d == free else Dim(Axis(1)) for d in range(len(dims))]
    return [out, norms]
