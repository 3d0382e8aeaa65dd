"""`BudgetPruning` in Lightning's own Trainer: closures, accumulation, bf16, loggers, checkpoints, resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rig import batch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import controlprune as cp
from controlprune.integrations.lightning import BudgetPruning

QUICK = cp.Control(update_every=4, observe_every=1)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (".*does not have many workers", ".*logging interval", ".*exists and is not empty",
                 ".*LeafSpec", ".*treespec", ".*Checkpoint directory", "Be aware that when using `ckpt_path`")
]  # fmt: skip


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, rows: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(rows[0]), rows[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def rows() -> DataLoader:
    parts = [batch(step, (8,)) for step in range(16)]
    x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return DataLoader(TensorDataset(x, y), batch_size=16)


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 4, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, **{**defaults, **settings},
    )  # fmt: skip


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_one_callback_ends_in_a_small_net_and_its_numbers_reach_every_logger(tmp_path: Path) -> None:
    model, prune = net(), BudgetPruning(budget=cp.Budget(flops=0.5), policy=QUICK)
    dense = size(model)
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    trainer(tmp_path, prune, logger=loggers, log_every_n_steps=4).fit(model, rows())
    assert size(model) < 0.7 * dense
    assert prune.controller is not None
    assert prune.controller.steps == 64
    assert prune.controller.history[-1].realised["flops"] <= 0.5
    for logger in loggers:
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            table = list(csv.DictReader(file))
        assert float([r["prune/flops/use"] for r in table if r["prune/flops/use"]][-1]) <= 0.5


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"accumulate_grad_batches": 2}, 32),
        ({"precision": "bf16-mixed"}, 64),
        ({"gradient_clip_val": 0.5}, 64),
    ],
    ids=["accumulation", "bf16", "clipping"],
)
def test_with_what_the_trainer_offers(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    model, prune = net(), BudgetPruning(budget=cp.Budget(params=0.6), policy=QUICK)
    trainer(tmp_path, prune, **settings).fit(model, rows())
    assert prune.controller is not None
    assert prune.controller.steps == steps
    assert prune.controller.skipped == 0
    assert prune.controller.history[-1].realised["params"] <= 0.6


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("policy", [QUICK, cp.Control(start="budget", update_every=4)], ids=["down", "small"])
def test_resumed_bit_for_bit(epoch: int, policy: cp.Control, tmp_path: Path) -> None:
    whole, first = net(), BudgetPruning(budget=cp.Budget(flops=0.5), policy=policy)
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{epoch}")
    trainer(tmp_path, first, keep, enable_checkpointing=True).fit(whole, rows())
    torch.manual_seed(1)
    again, second = Net(), BudgetPruning(budget=cp.Budget(flops=0.5), policy=policy)
    path = tmp_path / "kept" / f"epoch={epoch - 1}.ckpt"
    trainer(tmp_path, second).fit(again, rows(), ckpt_path=path)
    one, two = whole.state_dict(), again.state_dict()
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    model = net()
    model.example_input_array = None
    with pytest.raises(ValueError, match="example_input_array in Net"):
        trainer(tmp_path, BudgetPruning(budget=cp.Budget(flops=0.5))).fit(model, rows())
    by_hand = net()
    by_hand.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes by hand"):
        trainer(tmp_path, BudgetPruning(budget=cp.Budget(flops=0.5))).fit(by_hand, rows())
