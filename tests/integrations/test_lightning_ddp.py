"""`BudgetPruning` under Lightning's own DDP strategy: two processes, different data, one small net."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

TRAIN = """
import sys
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import controlprune as cp
from controlprune.integrations.lightning import BudgetPruning


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, rows, index):
        return nn.functional.cross_entropy(self(rows[0]), rows[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(x, (x[:, :4]).argmax(1)), batch_size=16)
    net = Net()
    prune = BudgetPruning(budget=cp.Budget(flops=0.5), policy=cp.Control(update_every=4, observe_every=1))
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=[prune], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=sys.argv[1],
    )
    trainer.fit(net, loader)
    found = {
        "weights": net.state_dict(), "cost": prune.controller.cost()["flops"].fraction,
        "ranks": trainer.world_size, "steps": prune.controller.steps,
    }
    torch.save(found, f"{sys.argv[1]}/rank{trainer.global_rank}.pt")
"""


def test_two_ranks_end_with_one_small_net(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    root = Path(__file__).parent.parent.parent
    environment = {
        **os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["ranks"] == 2
    assert first["steps"] == 32  # 512 rows, 16 a rank and step, two epochs
    assert 0.35 < first["cost"] <= 0.5
    assert first["weights"]["net.0.weight"].shape[0] < 32
    for name, value in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], value, rtol=0, atol=0)
