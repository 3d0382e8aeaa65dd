"""`BudgetPruning`: a budget for Lightning's `Trainer`.

    trainer = L.Trainer(max_epochs=3, callbacks=[BudgetPruning(budget=cp.Budget(flops=0.5))])
    trainer.fit(net)                                    net is small now

setup                weights that are resumed later and do not fit wait (integrations/late.py)
on_fit_start         attach, for `trainer.estimated_stepping_batches` steps; resume from the checkpoint
on_train_batch_end   controller.step(loss), where the optimizer has stepped; its numbers to all loggers
state_dict           the controller's state, inside the checkpoints that Lightning writes
on_fit_end           finalize

Example inputs are the module's `example_input_array` unless given, and its `forward` is what is traced.
Automatic optimization is what is meant; with manual optimization call `controller.step` yourself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from ..budget import Budget, Price, require_budget
from ..loop.attach import attach
from ..loop.controller import Controller
from .late import LateWeights

__all__ = ["BudgetPruning"]


class BudgetPruning(pl.Callback):
    """Prunes while Lightning trains. `options`: what `controlprune.attach` takes besides.

    `finalize=False` leaves the controller attached when fitting ends.
    """

    def __init__(
        self, budget: Budget | Price, example_inputs: Any = None, *, finalize: bool = True, **options: Any
    ) -> None:
        require_budget(budget)
        self.budget, self.example_inputs, self.options = budget, example_inputs, options
        self.finalize = finalize
        self.controller: Controller | None = None
        self._late: LateWeights | None = None
        self._saved: Mapping[str, Any] | None = None
        self._seen = 0

    @property
    def _live(self) -> bool:
        return self.controller is not None and self.controller.live

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.controller is None:
            self._late = LateWeights(pl_module, lambda: self._live)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.controller is not None:
            raise RuntimeError("BudgetPruning: it has pruned already; make a new one to prune further")
        if not pl_module.automatic_optimization:
            raise ValueError(
                "BudgetPruning: this module optimizes by hand; call controlprune.attach in its on_fit_start, "
                "and controller.step(loss) after optimizer.step()"
            )
        self.controller = attach(
            pl_module,
            trainer.optimizers,
            budget=self.budget,
            example_inputs=self._inputs(pl_module),
            total_steps=int(trainer.estimated_stepping_batches),
            **self.options,
        )
        if self._saved is not None:
            self.controller.load_state_dict(self._saved)
        if self._late is not None:
            self._late.load()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.global_step

    def _inputs(self, pl_module: pl.LightningModule) -> Any:
        given = self.example_inputs if self.example_inputs is not None else pl_module.example_input_array
        if given is None:
            raise ValueError(
                "example_inputs: give BudgetPruning(example_inputs=…), or set self.example_input_array in "
                f"{type(pl_module).__name__}"
            )
        moved = pl_module._apply_batch_transfer_handler(given)
        return (moved,) if isinstance(moved, Tensor) else moved

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.controller is None or not self.controller.live or trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self.controller.step(outputs["loss"] if isinstance(outputs, Mapping) else outputs)
        mine = {f"prune/{name}": value for name, value in self.controller.metrics().items()}
        pl_module.log_dict(mine, rank_zero_only=True, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        if self.controller is None or not self.controller.live:
            return {}
        return {"controller": self.controller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("controller")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._late is not None:
            self._late.remove()
        if self.controller is not None and self.controller.live and self.finalize:
            self.controller.finalize()
