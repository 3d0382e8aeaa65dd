"""What `attach` takes for a model: a plain module with values, not compiled, not scripted."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

__all__ = ["require_plain_model"]


def require_plain_model(model: object) -> None:
    """TypeError or ValueError that says what it is instead, and what to do."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: give a torch.nn.Module")
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError("model: torch.compile has already wrapped it; attach first, then compile")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model: torch.jit.script made it; attach to the plain module, script what finalize gives"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"model: its parameter {name!r} has no shape yet (a lazy module); run one forward pass "
                "first, and give the optimizer the parameters that it made"
            )
        if parameter.is_inference():
            raise ValueError(
                "model: it was made in torch.inference_mode(), so nothing of it can be trained; make it "
                "outside"
            )
        if parameter.device.type == "meta":
            raise ValueError(
                f"model: its parameter {name!r} is on the meta device and has no values; load or initialise "
                "it first. A trace needs none: controlprune.trace(model, inputs)"
            )
