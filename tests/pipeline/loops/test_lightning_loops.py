"""Lightning: automatic optimization steps with a closure, manual optimization with a wrapped optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import rig
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import controlprune as cp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the library, as it is imported
    import lightning

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # it warns of few workers, of hooks, of the GPU that is not there
STEPS, BUDGET = 60, 0.5
X = torch.zeros(2, 8)


class Net(lightning.LightningModule):
    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.net, self.rate = rig.mlp(), rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)


class Manual(Net):
    """Two batches to a step of the optimizer, by hand."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.automatic_optimization, self.every = False, every

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        optimizer = self.optimizers()
        loss = cross_entropy(self(x), y) / self.every
        self.manual_backward(loss)
        if (index + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class Prune(lightning.Callback):
    """The controller of the inner net; `wrapped`: with the optimizer as Lightning hands it out."""

    def __init__(self, *, wrapped: bool = False, given: bool = True, whole: bool = False) -> None:
        self.wrapped, self.given, self.whole = wrapped, given, whole

    def on_train_start(self, trainer: Any, module: Any) -> None:
        optimizer = module.optimizers() if self.wrapped else trainer.optimizers[0]
        self.controller = cp.attach(
            module if self.whole else module.net,
            optimizer,
            budget=cp.Budget(flops=BUDGET),
            example_inputs=(X,),
            total_steps=int(trainer.estimated_stepping_batches) * trainer.accumulate_grad_batches,
            policy=cp.Control(observe_every=1, update_every=4),
        )

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.controller.step(outputs["loss"] if self.given else None)


def fit(module: Net, prune: Prune, batches: int = STEPS, **options: Any) -> None:
    data = [rig.batch(step, (8,)) for step in range(batches)]
    loader = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), rig.BATCH)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[prune],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader)


def assert_small(net: nn.Module, controller: cp.Controller) -> None:
    assert controller.skipped == 0
    assert controller.history[-1].realised["flops"] <= BUDGET
    controller.finalize()
    assert rig.flops(net, X) <= BUDGET * rig.flops(rig.mlp(), X)
    cross_entropy(net(X), torch.zeros(2, dtype=torch.long)).backward()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_automatic_optimization(wrapped: bool, every: int) -> None:
    module, prune = Net(), Prune(wrapped=wrapped)
    fit(module, prune, STEPS * every, accumulate_grad_batches=every)
    assert all(row.loss == row.loss for row in prune.controller.history)
    assert_small(module.net, prune.controller)


def test_the_loss_of_a_closure_is_found() -> None:
    module, prune = Net(), Prune(given=False)
    fit(module, prune, gradient_clip_val=0.5)
    assert all(row.loss == row.loss for row in prune.controller.history)
    assert_small(module.net, prune.controller)


def test_a_whole_module() -> None:
    module, prune = Net(), Prune(whole=True)
    fit(module, prune, precision="bf16-mixed")
    assert_small(module.net, prune.controller)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_manual_optimization(every: int, wrapped: bool) -> None:
    module, prune = Manual(every), Prune(wrapped=wrapped)
    fit(module, prune, STEPS * every)
    assert_small(module.net, prune.controller)
