"""Torch-Pruning as its documentation says: group magnitude, one ratio for all layers, the head left alone.

Cut before the training, then fine-tuned; the optimizer is made after the cut, as it must be there. The ratio
is the one whose FLOPs are just inside the budget, found by bisection on copies. Heads go as wholes, and the
numbers that a module keeps of its heads are set by hand, as its examples do for transformers and for timm.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .side import Run, Side

__all__ = ["TorchPruning"]

HALVINGS = 8  # of the interval of ratios


class TorchPruning(Side):
    def begin(self, run: Run) -> None:
        super().begin(run)
        with run.clock.paused():
            whole, low, high = _flops(run.model, run.example), 0.0, 1.0
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                small = _flops(_pruned(run.model, run.example, middle), run.example) / whole
                low, high = (low, middle) if small <= run.budget else (middle, high)
            run.model = _pruned(run.model, run.example, high)
            self._share = _flops(run.model, run.example) / whole
            run.optimizer = run.task.optimizer(run.model)

    @property
    def share(self) -> float:
        return self._share


def _pruned(model: nn.Module, example: Any, ratio: float) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(model)
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(True)  # it traces by gradients
    heads = _heads(model)
    inputs: Any = example if isinstance(example, dict) or len(example) > 1 else example[0]
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=_ignored(model, example),
        num_heads=heads,
        prune_num_heads=bool(heads),
        head_pruning_ratio=ratio,
        output_transform=_logits,
    )
    pruner.step()
    _tell_heads(model, pruner.num_heads)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen[name])
    return model


def _ignored(model: nn.Module, example: Any) -> list[nn.Module]:
    """The head; and the residual stream where an embedding's weights are read without calling it."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    called: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, *_: called.append(m)) for m in embeddings]
    with torch.no_grad():
        _run(model, example)
    for hook in hooks:
        hook.remove()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return [last] if len(called) == len(embeddings) else [last, *embeddings]


def _run(model: nn.Module, example: Any) -> None:
    _ = model(**example) if isinstance(example, dict) else model(*example)


def _logits(output: Any) -> Tensor:
    """A tensor with a dimension of channels: torch-pruning 1.6.0 asks a scalar for its second."""
    return output if isinstance(output, Tensor) else output.logits


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Of every projection that makes heads: BERT's three, or one fused."""
    found: dict[nn.Module, int] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "num_attention_heads"):
            found |= dict.fromkeys((module.query, module.key, module.value), module.num_attention_heads)
        elif hasattr(module, "qkv"):
            found[module.qkv] = module.heads
    return found


def _tell_heads(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    module: Any
    for module in model.modules():
        if hasattr(module, "num_attention_heads"):
            module.num_attention_heads = heads[module.query]
            module.all_head_size = module.query.out_features
            module.attention_head_size = module.all_head_size // module.num_attention_heads
        elif hasattr(module, "qkv"):
            module.heads = heads[module.qkv]
            module.size = module.qkv.out_features // (3 * module.heads)


def _flops(model: nn.Module, example: Any) -> int:
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _run(model, example)
    model.train(training)
    return counter.get_total_flops()
