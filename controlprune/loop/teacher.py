"""A teacher from the run itself: the dense model as it was when units first left it, and the usual loss.

    teacher = cp.ancestor(controller)                     # right after attach
    …
    loss = cp.distillation(model(x), teacher(x), y)       # in the loop; until the first cut only CE

With student logits s, teacher logits t, labels y, a temperature T and a weight w (arXiv 1503.02531):

    L = (1 − w) CE(s, y) + w T² KL(softmax(t/T) ‖ softmax(s/T)),        means over the labelled examples

The teacher costs a dense forward pass a step from the first cut on. It counts in `train_flops`; what the
clock and the meter see of it is in `train_time` and `train_energy` anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ..plant.base import named_tensors
from ..plant.copies import dense_copies, dense_copy
from ..plant.plant import Plant
from .controller import Controller

__all__ = ["Ancestor", "ancestor", "distillation"]

IGNORED = -100  # a label of torch's that says: no label


class Ancestor(nn.Module):
    """Frozen, in eval mode. Its state dict is the dense model's, and whether the weights were `taken`."""

    taken: Tensor

    def __init__(self, controller: Controller) -> None:
        super().__init__()
        self._run_of = [controller]  # in a list: no submodule, not in the state dict
        self.model = dense_copy(controller.plant).requires_grad_(False)
        self.register_buffer("taken", torch.tensor(False))
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense model's output; None until a unit has left: till then student and teacher are one."""
        if not self.ready:
            return None
        (controller,) = self._run_of
        if controller.live:
            controller.count_forward()
        with torch.no_grad():
            return self.model(*args, **kwargs)

    @property
    def ready(self) -> bool:
        """Has a unit left? Before the next step is made the weights are those at the cut, and kept here."""
        if self.taken:
            return True
        (controller,) = self._run_of
        if all(bool(mask.all()) for mask in controller.plant.masks):
            return False
        tensors = named_tensors(self.model)
        with torch.no_grad():
            for name, dense in dense_copies(controller.plant).items():
                tensors[name].copy_(dense)
        self.taken.fill_(True)
        return True

    def train(self, mode: bool = True) -> Ancestor:
        """It stays in eval mode."""
        return super().train(False)


def ancestor(controller: Controller) -> Ancestor:
    """The run's dense ancestor, frozen: the weights at the first cut. Call it right after `attach`.

    Called later, when units are off already, it has the live weights of now and the parked ones of the cut.
    """
    if controller.plant.group is not None:
        raise ValueError(
            "controller: its parameters are sharded, no process holds the dense model; give distillation a "
            "teacher of your own"
        )
    if not isinstance(controller.plant, Plant):
        raise ValueError(
            "controller: under its granularity what is switched off is not kept; give distillation a teacher "
            "of your own, a copy.deepcopy of the model before the cut"
        )
    return Ancestor(controller)


def distillation(
    student: Any, teacher: Any, labels: Tensor | None = None, *, temperature: float = 2.0, weight: float = 0.5
) -> Tensor:
    """The loss of a student that is shown what the teacher says.

    `student`, `teacher`: logits [..., classes], or what has them as `.logits`; without a teacher (None)
    cross-entropy is all. `labels`: [...] of int64 (−100: none there); None: the teacher alone is heard.
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight={weight}: the teacher's share of the loss is between 0 and 1")
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature}: give a positive number")
    if teacher is None and labels is None:
        raise ValueError(
            "labels=None: there is no teacher yet (before the first cut) and so nothing to learn"
        )
    s = _flat(student, "student")
    y = None if labels is None else labels.flatten()
    own = torch.zeros((), device=s.device) if y is None else cross_entropy(s, y, ignore_index=IGNORED)
    if teacher is None:
        return own
    t = _flat(teacher, "teacher")
    if s.shape != t.shape:
        raise ValueError(f"teacher: logits of shape {[*t.shape]}, the student's are {[*s.shape]}")
    if y is not None:
        s, t = s[y != IGNORED], t[y != IGNORED]
    told = kl_div(
        log_softmax(s / temperature, 1),
        log_softmax(t / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    share = 1.0 if y is None else weight
    return (1.0 - share) * own + share * temperature**2 * told


def _flat(output: Any, which: str) -> Tensor:
    """[examples, classes]"""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{which}={type(output).__name__}: give logits, or an output that has them as .logits"
        )
    return logits.flatten(0, -2) if logits.dim() > 1 else logits[None]
