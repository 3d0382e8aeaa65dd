"""Other sizes for a parameter of FSDP2, in place: same object, mesh, placement and policy.

FSDP2 has no public way to give a parameter another shape once `fully_shard` has run. What its own constructor
does with a whole tensor (`FSDPParam._init_sharded_param`) is done again with the new one, and the new shard
moves into the parameter object that user and optimizer hold. All private API of torch's FSDP2 is here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

__all__ = ["managed", "relay", "reshapes", "resharded", "sharded_like"]


def managed(model: nn.Module) -> dict[int, Any]:
    """id of a sharded parameter -> what FSDP2 keeps of it."""
    found = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in groups:
                for kept in () if group is None else group.fsdp_params:
                    found[id(kept.sharded_param)] = kept
    return found


def reshapes(model: nn.Module) -> bool:
    """Can its sharded parameters take other sizes? Those of FSDP2 and HSDP, cut along their rows."""
    known = managed(resharded(model))
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            kept = known.get(id(parameter))
            if kept is None or kept.is_dtensor or kept.fsdp_placement.dim != 0 or kept.offload_to_cpu:
                return False
    return True


def resharded(model: nn.Module) -> nn.Module:
    """With its sharded parameters in place, not the gathered ones that an evaluation leaves."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


@torch.no_grad()
def relay(kept: Any, whole: Tensor) -> None:
    """The parameter has these values and this shape from here on; its gradient is dropped."""
    parameter = kept.sharded_param
    parameter.grad = None
    asked = inspect.signature(kept._init_sharded_param).parameters
    given: Mapping[str, Any] = {"mesh_info": kept.mesh_info} if "mesh_info" in asked else {}
    given = {**given, "device": kept.device, "shard_placement_fn": None}
    kept._init_sharded_param(nn.Parameter(whole.contiguous(), parameter.requires_grad), **given)
    made = kept.sharded_param
    parameter.data = made.data
    parameter._local_tensor, parameter._spec = made._local_tensor, made._spec
    kept.sharded_param = parameter
    kept._setattr_on_modules(parameter)
    if kept.post_forward_mesh_info:
        kept._init_sharded_post_forward_param_metadata(whole)
    kept.all_gather_outputs, kept._unsharded_inner_tensors = [], []
    kept.unsharded_accumulated_grad = None
    vars(kept).pop("_unsharded_param", None)


def sharded_like(parameter: DTensor, local: Tensor) -> DTensor:
    """`local` as the part of a tensor that lies as `parameter` does."""
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
