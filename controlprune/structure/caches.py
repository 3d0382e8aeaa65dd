"""What modules keep of their weights, dropped whenever the weights change shape or value.

Some modules save, in eval mode, a tensor that they derive from their parameters (attention biases gathered by
offset, merged kernels) and throw it away in a `train` method of their own, the one place where torch tells
them that weights may be about to change. Masks and layouts change weights in eval mode too, so those modules
are told the same way: training mode and back. Which mode each module is in stays as it was.
"""

from __future__ import annotations

from torch import nn

__all__ = ["drop_caches", "own_train"]


def own_train(module: nn.Module) -> bool:
    """Does its class do something of its own when the mode is set?"""
    return type(module).train is not nn.Module.train


def drop_caches(model: nn.Module) -> None:
    """Training mode and back for every module with a `train` of its own; the flags stay as they were."""
    modules = list(model.modules())
    own = [module for module in modules if own_train(module)]
    if not own:
        return
    flags = [module.training for module in modules]
    try:
        for module in own:
            mode = module.training
            module.train(True)
            module.train(mode)
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
