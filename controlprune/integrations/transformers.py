"""`PruneCallback`: a budget for transformers' `Trainer`, without a subclass.

    prune = PruneCallback(budget=cp.Budget(flops=0.5))
    trainer = Trainer(model, args, train_dataset=data, callbacks=[prune])
    trainer.train()                                     trainer.model is the small model now

on_init_end        weights that are resumed later and do not fit wait (integrations/late.py)
on_train_begin     attach, for the steps the trainer will make; resume from the file beside the checkpoint
on_optimizer_step  controller.step(loss)
on_log             its numbers join the trainer's (`state.log_history`, and every callback that comes after)
on_evaluate        where `load_best_model_at_end`: an evaluation above the budget is no candidate
on_save            controlprune.pt beside the checkpoint
on_train_end       finalize

The loss is what the model's forward returned as `.loss`, over accumulated batches as the trainer logs it;
unknown where it returns none. Example inputs are the first rows of the training set through the trainer's own
collator, labels left out, unless given. The trainer tells its boards before this callback: for numbers there
use `on_attach=lambda controller: controller.on_update(…)`.
"""

from __future__ import annotations

import inspect
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..budget import Budget, Price, require_budget
from ..loop.attach import attach
from ..loop.controller import Controller
from ..loop.telling import inside
from ..plant.hooks import Link
from ..state.files import replacing
from .late import LateWeights

__all__ = ["PruneCallback"]

log = logging.getLogger("controlprune")
FILE = "controlprune.pt"
ROWS = 8  # of the training set, for example inputs


class PruneCallback(TrainerCallback):
    """Prunes while the trainer trains. `options`: what `controlprune.attach` takes besides.

    `example_inputs`: a dict by keyword; None: from the training set. `finalize=False` leaves the controller
    attached when training ends. `controller` is there from the beginning of the training.
    """

    def __init__(
        self,
        budget: Budget | Price,
        example_inputs: Mapping[str, Tensor] | None = None,
        *,
        finalize: bool = True,
        on_attach: Callable[[Controller], object] | None = None,
        **options: Any,
    ) -> None:
        require_budget(budget)
        self.budget, self.example_inputs, self.options = budget, example_inputs, options
        self.finalize, self.on_attach = finalize, on_attach
        self.controller: Controller | None = None
        self._late: LateWeights | None = None
        self._best: str | None = None  # the checkpoint that load_best_model_at_end would load
        self._losses: list[Tensor] = []
        self._handle: Any = None

    @property
    def _live(self) -> bool:
        return self.controller is not None and self.controller.live

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        if isinstance(told.get("model"), nn.Module):
            self._late = LateWeights(told["model"], lambda: self._live, self._best_arrives)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        if self.controller is not None:
            log.warning("PruneCallback: it has pruned already; make a new one to prune further")
            return
        model, loader = told["model"], told["train_dataloader"]
        saved = _saved_beside(args, state)
        if saved is None and self._late is not None and self._late.waiting is not None:
            raise ValueError(
                f"resume_from_checkpoint: its weights are a small model's, and no {FILE} was found in "
                f"{_folder(args, state)}; set "
                "TrainingArguments(resume_from_checkpoint=folder) to the checkpoint's folder"
            )
        given = self.example_inputs
        self.controller = attach(
            model,
            told["optimizer"],
            budget=self.budget,
            example_inputs=dict(given) if given is not None else _first_rows(model, loader),
            total_steps=state.max_steps - (0 if saved is not None else state.global_step),
            **self.options,
        )
        if saved is not None:
            self.controller.load_state_dict(saved)
            if self.controller.total_steps != state.max_steps:  # trained for longer, or not as long
                self.controller.total_steps = state.max_steps
            if self._late is not None:
                self._late.load()
        saver = vars(model).get("save_pretrained")
        if saver is not None:
            saver.quiet = True  # what the class cannot load is looked after here
        self._handle = model.register_forward_hook(Link(self, PruneCallback._see_loss))
        if self.on_attach is not None:
            self.on_attach(self.controller)

    def _see_loss(self, model: nn.Module, args: Any, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        if self.controller is not None and self.controller.live:
            self.controller.step(_as_logged(told["model"], self._losses))
            self._losses.clear()  # with those of batches that the controller looked at

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        logs = told.get("logs")
        if self.controller is not None and self.controller.live and logs and "loss" in logs:
            mine = {f"prune/{name}": value for name, value in self.controller.metrics().items()}
            logs.update(mine)
            state.log_history[-1].update(mine)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        metrics, name = told.get("metrics"), args.metric_for_best_model
        if metrics is None or name is None or self.controller is None or not self.controller.live:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        if self.controller.history.budget and not inside(self.controller.history) and name in metrics:
            log.info("step %d: above the budget, so it is no candidate for the best model", state.global_step)
            metrics[name] = -math.inf if args.greater_is_better else math.inf
            if state.best_metric is not None and math.isinf(state.best_metric):
                state.best_metric = None  # early stopping waits for a first one

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        if self.controller is None or not self.controller.live:
            return
        self.controller.sync()
        self._best = state.best_model_checkpoint
        folder = _folder(args, state)
        if args.should_save and folder.is_dir():
            with replacing(folder / FILE) as part:
                torch.save({"step": state.global_step, "controller": self.controller.state_dict()}, part)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self._late is not None:
            self._late.remove()
        if self.controller is not None and self.controller.live and self.finalize:
            self.controller.finalize()

    def _best_arrives(self, metadata: Mapping[str, Any]) -> None:
        """Weights are loaded into the attached model: those of the best checkpoint, with its own units."""
        if "controlprune" in metadata or self._best is None or self.controller is None:
            return
        saved = _read(Path(self._best) / FILE)
        if saved is None:
            return
        plant = saved["controller"]["plant"]
        names = [group.name for group in self.controller.groups]
        self.controller.set_masks({name: plant[f"mask/{name}"] for name in names})
        self.controller.shrink() if bool(plant["compact"]) else self.controller.expand()


def _as_logged(model: nn.Module, losses: list[Tensor]) -> Tensor | None:
    """The step's loss as the trainer logs it: a sum where the model is told how many items there are."""
    if not losses:
        return None
    parameters = inspect.signature(model.forward).parameters.values()
    told = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    together = torch.stack(losses).float()
    return together.sum() if getattr(model, "accepts_loss_kwargs", told) else together.mean()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _saved_beside(args: TrainingArguments, state: TrainerState) -> Mapping[str, Any] | None:
    """The controller's state that was saved with the checkpoint which is resumed."""
    if state.global_step == 0:
        return None
    given = args.resume_from_checkpoint
    for folder in (*([Path(given)] if isinstance(given, str) else []), _folder(args, state)):
        saved = _read(folder / FILE)
        if saved is not None and saved["step"] == state.global_step:
            return saved["controller"]
    return None


def _read(file: Path) -> dict[str, Any] | None:
    return torch.load(file, weights_only=True, map_location="cpu") if file.is_file() else None


def _first_rows(model: nn.Module, loader: Any) -> dict[str, Any]:
    """What the model's forward takes of the first rows, without labels; the random state is left alone."""
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or collate is None:
        raise ValueError("example_inputs: the training set has no rows by number; give PruneCallback some")
    with _random_state_kept():
        batch = collate([dataset[i] for i in range(min(ROWS, len(dataset)))])  # type: ignore[index, arg-type]
    takes = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name in takes and "label" not in name
    }


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 — what collators may draw from
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
