"""Pooling, resampling and padding in space: leading dimensions are carried, positions in space are mixed."""

from __future__ import annotations

from ..tape.axes import Axis, product
from ..tape.tape import Call, Dim, Dims, Tape
from .contraction import MIXED
from .table import fresh, rule


def _space(tape: Tape, call: Call, ndim: int) -> list[Dims]:
    """The last `ndim` dimensions are pinned and replaced by those of the output."""
    dims = call.dims("self" if "self" in call.arguments else "input")
    lead = [dim.plain for dim in dims[: len(dims) - ndim]]
    tape.pin_dims(dims[len(dims) - ndim :], MIXED)
    return [[*lead, *fresh(output.shape[len(lead) :])] for output in call.outputs]


@rule("avg_pool1d", "max_pool1d", "max_pool1d_with_indices", "adaptive_avg_pool1d", "adaptive_max_pool1d",
      "upsample_linear1d", "upsample_nearest1d", "_upsample_nearest_exact1d", "reflection_pad1d",
      "replication_pad1d")  # fmt: skip
def space_1d(tape: Tape, call: Call) -> list[Dims]:
    return _space(tape, call, 1)


@rule("avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_avg_pool2d",
      "adaptive_max_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d",
      "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad2d",
      "replication_pad2d", "fractional_max_pool2d", "mkldnn_max_pool2d", "upsample_lanczos2d")  # fmt: skip
def space_2d(tape: Tape, call: Call) -> list[Dims]:
    return _space(tape, call, 2)


@rule("avg_pool3d", "max_pool3d", "max_pool3d_with_indices", "_adaptive_avg_pool3d", "adaptive_avg_pool3d",
      "adaptive_max_pool3d", "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d",
      "reflection_pad3d", "replication_pad3d")  # fmt: skip
def space_3d(tape: Tape, call: Call) -> list[Dims]:
    return _space(tape, call, 3)


@rule("im2col")
def im2col(tape: Tape, call: Call) -> list[Dims]:
    """(channel, window position) at every place of the window."""
    *lead, channels, height, width = call.dims("self")
    tape.pin_dims([height, width], MIXED)
    window = Axis(call.shape[-2] // channels.size, "")
    return [[*lead, Dim(product([channels.axis, window]), channels.sources), *fresh(call.shape[-1:])]]


@rule("col2im")
def col2im(tape: Tape, call: Call) -> list[Dims]:
    """Sums windows back into places: (channel, window position) -> channel."""
    *lead, columns, places = call.dims("self")
    channels, window = tape.regroup([columns.axis], [call.shape[-3], columns.size // call.shape[-3]])
    tape.pin(window, MIXED)
    tape.pin(places.axis, MIXED)
    return [[*lead, Dim(channels), *fresh(call.shape[-2:])]]


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(tape: Tape, call: Call) -> list[Dims]:
    batch, channels, *space = call.dims("input")
    batch_of_grid, *rest = call.dims("grid")
    tape.unify(batch.axis, batch_of_grid.axis)
    tape.pin_dims([*space, *rest], MIXED)
    return [[batch.plain, channels.plain, *fresh(call.shape[2:])]]


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(tape: Tape, call: Call) -> list[Dims]:
    ndim = 2 if "2d" in call.name else 3
    for mine, its in zip(call.dims("self"), call.dims("indices"), strict=True):
        tape.unify(mine.axis, its.axis)
    return _space(tape, call, ndim)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(tape: Tape, call: Call) -> list[Dims]:
    dims = [dim.plain for dim in call.dims("self")]
    for d in call.integers("dim"):
        tape.pin(dims[d].axis, "a Fourier transform runs along it")
        dims[d] = fresh([call.shape[d]])[0]
    return [dims]


@rule("pixel_shuffle")
def pixel_shuffle(tape: Tape, call: Call) -> list[Dims]:
    """(channel, r, r) at one place become r × r places."""
    *lead, channels, height, width = call.dims("self")
    r = call.integer("upscale_factor")
    out, one, two = tape.regroup([channels.axis], [channels.size // r**2, r, r])
    for axis in (one, two, height.axis, width.axis):
        tape.pin(axis, MIXED)
    return [[*lead, Dim(out), *fresh(call.shape[-2:])]]


@rule("pixel_unshuffle")
def pixel_unshuffle(tape: Tape, call: Call) -> list[Dims]:
    *lead, channels, height, width = call.dims("self")
    r = call.integer("downscale_factor")
    tape.pin_dims([height, width], MIXED)
    return [[*lead, Dim(product([channels.axis, Axis(r * r, "")])), *fresh(call.shape[-2:])]]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(tape: Tape, call: Call) -> list[Dims]:
    """(group, member) -> (member, group)."""
    batch, channels, *space = call.dims("self")
    groups = call.integer("groups")
    group, member = tape.regroup([channels.axis], [groups, channels.size // groups])
    return [[batch, Dim(product([member, group])), *space]]
