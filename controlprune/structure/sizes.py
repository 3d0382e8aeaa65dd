"""Sizes that live in Python attributes: found by the type of the module, written when tensors shrink.

getattr(module, attribute)  =  size(extent, widths)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .extents import size
from .groups import SizeAttribute, Structure
from .heads import OwnHeads
from .standins import no_fused_layers, restore, stand_in
from .tape.axes import Axis, pin
from .tape.tape import MEET, SCALE, Tape
from .views import infer_sizes

__all__ = ["bind_module_attributes", "get_size", "let_heads_leave", "set_size", "set_sizes"]

ATTENTION = "nn.MultiheadAttention with add_bias_kv or add_zero_attn has keys of its own: no head can leave"
PROJECTED = "nn.LSTM with proj_size tells its two states by their sizes: only the projected one can shrink"


def set_sizes(model: nn.Module, structure: Structure, widths: Sequence[int] | None) -> None:
    """Write every size attribute of the structure at the given widths (`None`: dense)."""
    modules = dict(model.named_modules())
    for entry in structure.attributes:
        set_size(modules, entry.module, entry.attribute, entry.index, size(entry.extent, widths))
    _let_heads_leave(model, modules.values())
    infer_sizes(model, structure.views, away=widths is not None and tuple(widths) != structure.sizes)


def set_size(
    modules: Mapping[str, nn.Module], module: str, attribute: str, index: int | None, value: int
) -> None:
    """Write one; entry `index` of it where it is a tuple."""
    owner: object = modules[module]
    *path, last = attribute.split(".")
    for name in path:
        owner = getattr(owner, name)
    written: object = value
    if index is not None:
        entries = list(getattr(owner, last))
        entries[index] = value
        written = type(getattr(owner, last))(entries)
    object.__setattr__(owner, last, written)


def let_heads_leave(model: nn.Module) -> None:
    """Attention that is not as wide as its heads together goes by structure/heads.py."""
    _let_heads_leave(model, model.modules())


def _let_heads_leave(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    attentions = [module for module in modules if isinstance(module, nn.MultiheadAttention)]
    for module in attentions:
        as_wide = module.num_heads * module.head_dim == module.embed_dim
        (restore if as_wide else stand_in)(module, OwnHeads)
    if attentions:
        no_fused_layers(model)


def get_size(modules: Mapping[str, nn.Module], entry: SizeAttribute) -> object:
    """What stands there now; KeyError, AttributeError, IndexError or TypeError if there is nothing."""
    value: object = modules[entry.module]
    for name in entry.attribute.split("."):
        value = getattr(value, name)
    return value if entry.index is None else value[entry.index]  # type: ignore[index]


# (module types, attribute, index, tensor, dimension): the attribute is the length of that dimension
TABLE: tuple[tuple[tuple[type[nn.Module], ...], str, int | None, str, int], ...] = (
    ((nn.Linear,), "in_features", None, "weight", 1),
    ((nn.Linear,), "out_features", None, "weight", 0),
    ((nn.Embedding, nn.EmbeddingBag), "embedding_dim", None, "weight", 1),
    ((nn.modules.batchnorm._NormBase,), "num_features", None, "weight", 0),
    ((nn.modules.batchnorm._NormBase,), "num_features", None, "running_mean", 0),
    ((nn.GroupNorm,), "num_channels", None, "weight", 0),
    ((nn.LayerNorm, nn.RMSNorm), "normalized_shape", -1, "weight", -1),
    ((nn.Transformer,), "d_model", None, "encoder.layers.0.linear1.weight", 1),
    ((nn.PReLU,), "num_parameters", None, "weight", 0),
    ((nn.RNNBase,), "input_size", None, "weight_ih_l0", 1),
    ((nn.RNNCellBase,), "input_size", None, "weight_ih", 1),
    ((nn.RNNCellBase,), "hidden_size", None, "weight_hh", 1),
    ((nn.Bilinear,), "in1_features", None, "weight", 1),
    ((nn.Bilinear,), "in2_features", None, "weight", 2),
    ((nn.Bilinear,), "out_features", None, "weight", 0),
)


def bind_module_attributes(tape: Tape) -> None:
    """Tell the tape which attributes of torch's own modules are sizes of which axes."""
    for path, module in tape.model.named_modules():
        for types, attribute, index, tensor, dim in TABLE:
            if isinstance(module, types) and (axis := _axis(tape, path, tensor, dim)) is not None:
                shape = getattr(module, attribute)
                tape.bind(path, attribute, index if index is None else len(shape) + index, axis)
        if isinstance(module, nn.modules.conv._ConvNd):
            _bind_convolution(tape, path, module)
        if isinstance(module, nn.GroupNorm) and (axis := _axis(tape, path, "weight", 0)) is not None:
            groups, _ = tape.regroup([axis], [module.num_groups, axis.size // module.num_groups])
            tape.bind(path, "num_groups", None, groups)
        if (axis := tape.counted.get(path)) is not None:
            _bind_plain_norm(tape, path, module, axis)
        if isinstance(module, nn.RNNBase):
            _bind_recurrent(tape, path, module)
        if isinstance(module, nn.MultiheadAttention):
            _bind_attention(tape, path, module)


def _bind_plain_norm(tape: Tape, path: str, module: nn.Module, channels: Axis) -> None:
    """A norm without parameters has its sizes all the same."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        tape.bind(path, "normalized_shape", 0, channels)
    if isinstance(module, nn.GroupNorm):
        groups, _ = tape.regroup([channels], [module.num_groups, channels.size // module.num_groups])
        tape.bind(path, "num_channels", None, channels)
        tape.bind(path, "num_groups", None, groups)


def _axis(tape: Tape, path: str, tensor: str, dim: int) -> Axis | None:
    name = f"{path}.{tensor}" if path else tensor
    dims = tape.tensors.get(tape.aliases.get(name, name))
    return None if dims is None or not dims else dims[dim]


def _bind_convolution(tape: Tape, path: str, module: nn.modules.conv._ConvNd) -> None:
    """in_channels = groups × i, out_channels = groups × o, whichever of the two the weight holds."""
    first, second = _axis(tape, path, "weight", 0), _axis(tape, path, "weight", 1)
    if first is None or second is None:
        return
    group, _ = tape.regroup([first], [module.groups, first.size // module.groups])
    (other,) = tape.regroup([group, second], [module.groups * second.size])
    into, out = (first, other) if module.transposed else (other, first)
    tape.bind(path, "in_channels", None, into)
    tape.bind(path, "out_channels", None, out)
    if module.groups > 1:
        tape.bind(path, "groups", None, group)


def _bind_recurrent(tape: Tape, path: str, module: nn.RNNBase) -> None:
    """All layers and directions have one hidden size, and one of what it is projected to.

    torch tells projections by P ≠ H: only the smaller may shrink, so that they never meet.
    """
    for name, _ in module.named_parameters(recurse=False):
        axis = _axis(tape, path, name, 1) if name.startswith(("weight_hh", "weight_hr")) else None
        if axis is None:
            continue
        if name.startswith("weight_hr"):
            pin(axis, PROJECTED)
        else:
            tape.bind(path, "proj_size" if module.proj_size else "hidden_size", None, axis)


def _bind_attention(tape: Tape, path: str, module: nn.MultiheadAttention) -> None:
    """Whole heads leave, and units of the width around them; the size of a head stays."""
    if module.bias_k is not None or module.add_zero_attn:
        for name, parameter in module.named_parameters():
            for dim in range(parameter.dim()):
                if (axis := _axis(tape, path, name, dim)) is not None:
                    pin(axis, ATTENTION)
        return
    inner = _axis(tape, path, "out_proj.weight", 1)
    if inner is not None:
        heads, member = tape.regroup([inner], [module.num_heads, module.head_dim])
        pin(member, MEET if tape.rows is None else SCALE)
        tape.bind(path, "num_heads", None, heads)
    for attribute, letter in (("embed_dim", "q"), ("kdim", "k"), ("vdim", "v")):
        weight = "in_proj_weight" if module._qkv_same_embed_dim else f"{letter}_proj_weight"
        if (axis := _axis(tape, path, weight, 1)) is not None:
            tape.bind(path, attribute, None, axis)
