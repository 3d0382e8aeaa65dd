"""`PruneCallback` in transformers' own Trainer: three lines, resumed bit for bit, best weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from hf_tiny import FAMILIES
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint

import controlprune as cp
from controlprune.integrations.transformers import PruneCallback

QUICK = cp.Control(update_every=4, observe_every=1)


class Rows(Dataset):
    """Sentences whose label is whether their first token is even."""

    def __init__(self, count: int = 64, image: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 64, (count, 8), generator=generator)
        self.images = torch.randn(count, 3, 16, 16, generator=generator) if image else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        label = self.ids[i, 0] % 2
        if self.images is not None:
            return {"pixel_values": self.images[i], "labels": label}
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.long), "labels": label}


def trainer(
    folder: Path,
    prune: PruneCallback,
    steps: int = 48,
    model: Any = None,
    callbacks: Any = (),
    **settings: Any,
) -> tr.Trainer:
    torch.manual_seed(0)
    model = FAMILIES["bert"]() if model is None else model
    defaults = {"save_strategy": "no", "logging_steps": 4, "learning_rate": 1e-3}
    args = tr.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, report_to="none", use_cpu=True,
        disable_tqdm=True, seed=0, **{**defaults, **settings},
    )  # fmt: skip
    return tr.Trainer(
        model, args, train_dataset=Rows(), eval_dataset=Rows(16), callbacks=[prune, *callbacks],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip


def test_three_lines_end_in_a_small_model_inside_the_budget(tmp_path: Path) -> None:
    prune = PruneCallback(budget=cp.Budget(flops=0.6), policy=QUICK)
    run = trainer(tmp_path, prune)
    dense = run.model.num_parameters()
    run.train()
    assert run.model.num_parameters() < dense
    assert prune.controller is not None
    last = prune.controller.history[-1]
    assert last.realised["flops"] <= 0.6
    assert last.step == 48
    assert all(torch.isfinite(torch.tensor(row.loss)) for row in list(prune.controller.history)[1:])
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert all("prune/flops/use" in entry for entry in logged)
    assert logged[-1]["prune/flops/use"] <= 0.6 < logged[0]["prune/flops/use"]
    assert not run.model._forward_hooks
    run.evaluate()


def test_the_loss_of_accumulated_batches_is_the_one_that_is_logged(tmp_path: Path) -> None:
    prune = PruneCallback(budget=cp.Budget(flops=0.8), policy=QUICK, finalize=False)
    run = trainer(tmp_path, prune, steps=8, gradient_accumulation_steps=2, logging_steps=1)
    run.train()
    assert prune.controller is not None
    assert prune.controller.steps == 8
    assert prune.controller.skipped == 0
    logged = {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
    rows = [row for row in prune.controller.history if row.step > 0]
    assert rows
    for row in rows:
        assert row.loss == pytest.approx(logged[row.step], rel=1e-3)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("at", [20, 40])
def test_resumed_bit_for_bit_from_a_checkpoint(at: int, tmp_path: Path) -> None:
    whole = PruneCallback(budget=cp.Budget(flops=0.6), policy=QUICK)
    run = trainer(tmp_path / "whole", whole, save_strategy="steps", save_steps=at)
    run.train()
    folder = tmp_path / "whole" / f"checkpoint-{at}"
    assert (folder / "controlprune.pt").is_file()

    again = PruneCallback(budget=cp.Budget(flops=0.6), policy=QUICK)
    torch.manual_seed(1)
    second = trainer(tmp_path / "whole", again, save_strategy="steps", save_steps=at)
    second.train(resume_from_checkpoint=str(folder))
    one, two = weights(run.model), weights(second.model)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert whole.controller is not None
    assert again.controller is not None
    rows = [[(r.step, r.active, r.loss) for r in p.controller.history] for p in (whole, again)]
    assert rows[0] == rows[1]


def test_a_small_checkpoint_elsewhere_is_found_by_its_argument_or_refused(tmp_path: Path) -> None:
    first = PruneCallback(budget=cp.Budget(flops=0.5), policy=cp.Control(start="budget", update_every=4))
    trainer(tmp_path / "a", first, save_strategy="steps", save_steps=20, steps=20).train()
    folder = str(tmp_path / "a" / "checkpoint-20")
    lost = PruneCallback(budget=cp.Budget(flops=0.5), policy=cp.Control(start="budget", update_every=4))
    with pytest.raises(ValueError, match="resume_from_checkpoint=folder"):
        trainer(tmp_path / "b", lost, steps=24).train(resume_from_checkpoint=folder)
    told = PruneCallback(budget=cp.Budget(flops=0.5), policy=cp.Control(start="budget", update_every=4))
    run = trainer(tmp_path / "b", told, steps=24, resume_from_checkpoint=folder)
    run.train(resume_from_checkpoint=folder)
    assert told.controller is not None
    assert told.controller.steps == 24


def test_only_checkpoints_inside_the_budget_compete_for_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "controlprune")
    prune = PruneCallback(budget=cp.Budget(flops=0.6), policy=QUICK)
    run = trainer(
        tmp_path, prune, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="accuracy", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert any("no candidate for the best model" in r.getMessage() for r in caplog.records)
    assert prune.controller is not None
    inside = [r.step for r in prune.controller.history if r.realised["flops"] <= 0.6 + 1e-9]
    assert run.state.best_global_step in range(min(inside), 49)
    saved = torch.load(
        tmp_path / f"checkpoint-{run.state.best_global_step}" / "controlprune.pt", weights_only=True
    )
    kept = saved["controller"]["plant"]
    widths = tuple(int(kept[f"mask/{name}"].sum()) for name in prune.controller.history.names)
    assert prune.controller.history[-1].active == widths
    best = cp.from_pretrained(get_last_checkpoint(str(tmp_path)), type(run.model)) if inside else None
    assert best is None or type(best) is type(run.model)
    found = run.evaluate()["eval_accuracy"]
    assert found == pytest.approx(run.state.best_metric)


def test_early_stopping_waits_for_the_budget(tmp_path: Path) -> None:
    prune = PruneCallback(budget=cp.Budget(flops=0.6), policy=QUICK)
    stop = tr.EarlyStoppingCallback(early_stopping_patience=1)
    run = trainer(
        tmp_path, prune, callbacks=[stop], eval_strategy="steps", eval_steps=4, save_strategy="steps",
        save_steps=4, load_best_model_at_end=True, metric_for_best_model="accuracy",
        greater_is_better=True, learning_rate=0.0,
    )  # fmt: skip
    run.train()
    assert prune.controller is not None
    first = min(r.step for r in prune.controller.history if r.realised["flops"] <= 0.6)
    assert first < run.state.global_step < 48


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"activation_checkpointing": True}, {"optim": "sgd"}], ids=str
)
def test_with_what_the_trainer_offers(settings: dict[str, Any], tmp_path: Path) -> None:
    prune = PruneCallback(budget=cp.Budget(params=0.8), policy=QUICK)
    run = trainer(tmp_path, prune, steps=24, **settings)
    run.train()
    assert prune.controller is not None
    assert prune.controller.history[-1].realised["params"] <= 0.8
    assert prune.controller.skipped == 0


def test_the_data_order_is_that_of_a_run_without_it(tmp_path: Path) -> None:
    """Taking example rows draws nothing from the random state."""
    seen: list[list[torch.Tensor]] = []
    rows = Rows(48)
    for callbacks in ([], [PruneCallback(budget=cp.Budget(flops=0.9))]):
        torch.manual_seed(0)
        batches: list[torch.Tensor] = []

        def collate(items: list[Any], kept: list[torch.Tensor] = batches) -> dict[str, Any]:
            batch = tr.default_data_collator(items)
            kept.append(batch["input_ids"])
            return batch

        args = tr.TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=8, report_to="none", use_cpu=True,
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        tr.Trainer(
            FAMILIES["bert"](), args, train_dataset=rows, callbacks=callbacks, data_collator=collate
        ).train()
        seen.append(batches)
    first_rows = seen[1].pop(0)
    assert torch.equal(first_rows, rows.ids[:8])
    assert len(seen[0]) == len(seen[1]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
