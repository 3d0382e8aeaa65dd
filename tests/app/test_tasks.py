"""Tasks: the digits need no download; parquet files are read in the hub's own layout, and only once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from controlprune.app.tasks import TaskError, load


def test_the_digits_are_split_the_same_way_every_time_and_never_overlap() -> None:
    first, second = load("digits"), load("digits")
    assert torch.equal(first.train[0], second.train[0])
    assert len(first.train[0]) + len(first.test[0]) == 1797
    assert first.factory()(first.example(2)).shape == (2, 10)
    test = {tuple(image.flatten().tolist()) for image in first.test[0]}
    assert not any(tuple(image.flatten().tolist()) in test for image in first.train[0])


def test_an_unknown_task_or_folder_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"there are digits, .*mnist, .*cifar10"):
        load("imagenet")
    with pytest.raises(TaskError, match="must be the folder that holds cifar10/"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("task", "column", "shape"), [("mnist", "image", (28, 28)), ("cifar10", "img", (32, 32, 3))]
)
def test_parquet_files_in_the_hubs_layout_are_read_and_standardised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, column: str, shape: tuple[int, ...]
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, size=(20, *shape), dtype=np.uint8)
    (tmp_path / task).mkdir()
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    for split, rows in (("train", slice(0, 12)), ("test", slice(12, 20))):
        part = {
            column: list(images[rows]),
            "label": list(range(10))[:8] + [0] * (4 if split == "train" else 0),
        }
        datasets.Dataset.from_dict(part, features=features).to_parquet(tmp_path / task / f"{split}.parquet")
    first, again = load(task, tmp_path), load(task, tmp_path)
    assert first.train[0].shape == (12, shape[2] if len(shape) == 3 else 1, *shape[:2])
    assert first.test[1].tolist() == list(range(8))
    assert first.train[0].mean().abs() < 1e-5
    assert abs(first.train[0].std().item() - 1) < 0.01
    assert torch.equal(first.test[0], again.test[0])
    assert first.factory()(first.example(2)).shape == (2, 10)
