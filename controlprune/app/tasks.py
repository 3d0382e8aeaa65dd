"""Small real tasks with their networks: what the demo, `controlprune train` and the studies train on.

Images are float tensors [examples, channels, height, width], standardised by the training set's mean
and deviation (digits: scaled to [0, 1]); labels int64. digits ships with scikit-learn; mnist and cifar10
are read from parquet files (columns `image` or `img`, and `label`) in `data/mnist` and `data/cifar10`, or
fetched from the Hugging Face hub by their usual names where no folder is given. Decoded images are cached
in the temporary folder.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..control.ramp import Plan

__all__ = ["TASKS", "Task", "load"]

Split = tuple[Tensor, Tensor]
Bytes = NDArray[np.uint8]


class TaskError(ValueError):
    """The data is not there, or what reads it is not installed; the message says what to do."""


@dataclass(frozen=True)
class Task:
    """Data, a factory of the dense network, and the settings it trains well with."""

    name: str
    train: Split
    test: Split
    factory: Callable[[], nn.Module]
    steps: int
    batch: int
    learning_rate: float = 1e-3  # of Adam
    plan: Plan | None = None  # when to cut; None: by default

    def example(self, count: int = 1) -> Tensor:
        return self.train[0][:count]


class Residual(nn.Module):
    """x + f(x), f two 3×3 convolutions with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(hidden)))


def residual_net(channels: int, width: int) -> nn.Sequential:
    """Two stages of one residual block each, the second at half resolution and twice the width."""
    layers: dict[str, nn.Module] = {
        "stem": _stage(channels, width, stride=1),
        "block1": Residual(width),
        "down": _stage(width, 2 * width, stride=2),
        "block2": Residual(2 * width),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(2 * width, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def plain_net(channels: int, widths: tuple[int, ...] = (32, 64, 128, 128)) -> nn.Sequential:
    """Convolutions with batch norm, the resolution halved after the first three."""
    layers: dict[str, nn.Module] = {}
    for i, (before, after) in enumerate(zip((channels, *widths), widths, strict=False), start=1):
        layers[f"stage{i}"] = _stage(before, after, stride=1)
        if i <= 3:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(widths[-1], 10)}
    return nn.Sequential(OrderedDict(layers))


def mlp(inputs: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between, ten outputs."""
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (before, after) in enumerate(zip((inputs, *hidden), hidden, strict=False), start=1):
        layers |= {f"hidden{i}": nn.Linear(before, after), f"relu{i}": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers | {"head": nn.Linear(hidden[-1], 10)}))


def _stage(before: int, after: int, stride: int) -> nn.Sequential:
    layers: dict[str, nn.Module] = {
        "conv": nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
        "norm": nn.BatchNorm2d(after),
        "relu": nn.ReLU(),
    }
    return nn.Sequential(OrderedDict(layers))


def load(name: str, data: Path | None = None) -> Task:
    """The task called `name`; `data` is the folder that holds its parquet folder."""
    if name not in TASKS:
        raise TaskError(f"task {name!r} is unknown; there are {', '.join(TASKS)}")
    return TASKS[name](data)


def lenet(channels: int, widths: tuple[int, int, int] = (32, 64, 128)) -> nn.Sequential:
    """Two convolutions with batch norm, a pool, two linear layers; for images of 8×8."""
    a, b, c = widths
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(channels, a, 3, padding=1),
        "norm1": nn.BatchNorm2d(a),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(a, b, 3, padding=1),
        "norm2": nn.BatchNorm2d(b),
        "relu2": nn.ReLU(),
        "pool": nn.MaxPool2d(2),
        "flat": nn.Flatten(),
        "hidden": nn.Linear(16 * b, c),
        "relu3": nn.ReLU(),
        "out": nn.Linear(c, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def _digits(_: Path | None) -> Task:
    return _digits_task("digits", partial(residual_net, 1, 32))


def _digits_wide(_: Path | None) -> Task:
    """So wide that convolutions are what a step costs; easy, so an early cut heals."""
    early = Plan(earliest=0.03, latest=0.05, duration=0.1, deadline=0.2)
    task = _digits_task("digits-wide", partial(residual_net, 1, 96))
    return replace(task, steps=500, batch=32, plan=early)


def _digits_mlp(_: Path | None) -> Task:
    return _digits_task("digits-mlp", partial(mlp, 64, (304, 104)))


def _digits_lenet(_: Path | None) -> Task:
    return _digits_task("digits-lenet", partial(lenet, 1))


def _digits_task(name: str, factory: Callable[[], nn.Module]) -> Task:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError('the digits need scikit-learn: pip install "controlprune[demo]"') from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    y = torch.tensor(labels, dtype=torch.int64)[order]
    x, held_out = x / 16, 450
    return Task(
        name=name,
        train=(x[held_out:], y[held_out:]),
        test=(x[:held_out], y[:held_out]),
        factory=factory,
        steps=600,
        batch=64,
    )


def _mnist(data: Path | None) -> Task:
    train, test = _images("mnist", "ylecun/mnist", data)
    return Task("mnist", train, test, partial(mlp, 784, (300, 100)), steps=4680, batch=128)


def _cifar10(data: Path | None) -> Task:
    train, test = _images("cifar10", "uoft-cs/cifar10", data)
    return Task("cifar10", train, test, partial(plain_net, 3), steps=3900, batch=128)


def _cifar10_small(data: Path | None) -> Task:
    train, test = _images("cifar10", "uoft-cs/cifar10", data)
    factory = partial(plain_net, 3, (16, 32, 64, 64))
    return Task("cifar10-small", train, test, factory, steps=3900, batch=128)


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "digits": _digits,
    "digits-wide": _digits_wide,
    "digits-mlp": _digits_mlp,
    "digits-lenet": _digits_lenet,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "cifar10-small": _cifar10_small,
}


def _images(folder: str, hub: str, data: Path | None) -> tuple[Split, Split]:
    """Train and test split, standardised alike."""
    where = None if data is None else data / folder
    (x, y), (x_test, y_test) = (_decoded(hub, where, split) for split in ("train", "test"))
    mean = x.mean((0, 1, 2)) / 255
    deviation = x.std((0, 1, 2)) / 255

    def standardised(images: Bytes) -> Tensor:
        scaled = (images.astype(np.float32) / 255 - mean.astype(np.float32)) / deviation.astype(np.float32)
        return torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous()

    return (standardised(x), torch.from_numpy(y)), (standardised(x_test), torch.from_numpy(y_test))


def _decoded(hub: str, folder: Path | None, split: str) -> tuple[Bytes, NDArray[np.int64]]:
    """Images [examples, height, width, channels] and labels, decoded once per source."""
    source = f"{hub} {split}"
    if folder is not None:
        file = folder / f"{split}.parquet"
        if not file.is_file():
            raise TaskError(f"no {file}: --data must be the folder that holds {folder.name}/")
        source = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
    key = hashlib.sha256(source.encode()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / "controlprune-data" / f"{key}.npz"
    if cache.is_file():
        with np.load(cache) as stored:
            return stored["images"], stored["labels"]
    images, labels = _read(hub, folder, split)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partly = cache.with_suffix(".part.npz")
    np.savez(partly, images=images, labels=labels)
    partly.replace(cache)
    return images, labels


def _read(hub: str, folder: Path | None, split: str) -> tuple[Bytes, NDArray[np.int64]]:
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise TaskError('mnist and cifar10 need datasets: pip install "controlprune[data]"') from error
    if folder is None:
        rows = load_dataset(hub, split=split)
    else:
        rows = load_dataset("parquet", data_files={split: str(folder / f"{split}.parquet")}, split=split)
    column = "image" if "image" in rows.column_names else "img"
    pictures = rows.cast_column(column, Image())[column]
    images = np.stack([np.asarray(picture) for picture in pictures])
    return images.reshape(*images.shape[:3], -1), np.asarray(rows["label"], dtype=np.int64)
