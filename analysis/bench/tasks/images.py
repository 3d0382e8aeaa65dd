"""Tasks 2 and 3: a plain CNN of four 3×3 convolutions with BatchNorm on CIFAR-10 at 16×16.

    scratch   all ten classes, from random weights
    images    trained dense on the even classes (once, kept in a file), fine-tuned on the odd ones

Images are means over 2×2 pixels, standardised; flipped at random in training. AdamW, cosine with warm-up.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..task import Task, cosine

__all__ = ["images", "scratch"]

WIDTHS = (32, 64, 128, 128)
Split = tuple[Tensor, Tensor]


def scratch(
    data: Path, steps: int = 1000, batch: int = 64, rate: float = 6e-3, widths: Sequence[int] = WIDTHS
) -> Task:
    """Task 3."""
    found = _task("scratch", data, None, steps, batch, rate, (0.5, 0.35, 0.15, 0.08), pretrained=False)
    net = partial(_net, 10, widths=widths)
    return replace(found, dense=net, blank=net)


def images(data: Path, steps: int = 500, batch: int = 64, rate: float = 2e-3) -> Task:
    """Task 2."""
    return _task("images", data, 1, steps, batch, rate, (0.4, 0.15), pretrained=True)


def _task(
    name: str, data: Path, half: int | None, steps: int, batch: int, rate: float,
    budgets: tuple[float, ...], *, pretrained: bool,
) -> Task:  # fmt: skip
    classes = 10 if half is None else 5

    def split(which: str) -> Split:
        return _split(data, which, half)

    return Task(
        name=name,
        steps=steps,
        budgets=budgets,
        dense=(lambda seed: _pretrained(data, seed)) if pretrained else (lambda seed: _net(classes, seed)),
        blank=lambda seed: _net(classes, seed),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05),
        batches=lambda seed: _batches(*split("train"), batch, seed),
        outputs=lambda model, pair: (model(pair[0]), pair[1]),
        evaluate=lambda model: {"accuracy": _accuracy(model, *split("test"))},
        glance=lambda model: _accuracy(model, *(part[:1000] for part in split("test"))),
        example=lambda rows: (split("train")[0][:rows],),
        rate=cosine(),
        pretrained=pretrained,
    )


def _net(classes: int, seed: int, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if 0 < i < 3:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def _pretrained(data: Path, seed: int) -> nn.Module:
    """Dense weights from the other classes, a new head."""
    file = Path(tempfile.gettempdir()) / "controlprune-data" / "cifar-even.pt"
    model = _net(5, 0)
    if not file.is_file():
        train = _split(data, "train", 0)
        optimizer, steps, rate = (
            torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05),
            2000,
            cosine(),
        )
        for step, (x, y) in zip(range(steps), _batches(*train, 64, 0), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * rate((step + 0.5) / steps)
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(seed)
    head = model[-1]
    assert isinstance(head, nn.Linear)
    head.reset_parameters()
    return model


def _batches(x: Tensor, y: Tensor, batch: int, seed: int) -> Iterator[Split]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(order) - len(order) % batch].split(batch):
            flipped = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
            yield torch.where(flipped, x[rows].flip(-1), x[rows]), y[rows]


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        pairs = zip(x.split(500), y.split(500), strict=True)
        return 100.0 * sum(int((model(a).argmax(1) == b).sum()) for a, b in pairs) / len(x)


@cache
def _split(data: Path, which: str, half: int | None) -> Split:
    pixels, labels = _decoded(data / "cifar10" / f"{which}.parquet")
    x = torch.from_numpy(pixels).float().permute(0, 3, 1, 2) / 255
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    y = torch.from_numpy(labels)
    if half is None:
        return x, y
    own = y % 2 == half
    return x[own], y[own] // 2


def _decoded(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """[n, 16, 16, 3] float16 in 0 … 255, decoded once."""
    kept = Path(tempfile.gettempdir()) / "controlprune-data" / f"cifar16-{file.stem}.npz"
    if not kept.is_file():
        from PIL import Image
        from pyarrow import parquet

        table = parquet.read_table(file)
        labels = np.asarray(table["label"].to_pylist(), dtype=np.int64)
        pictures = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in table["img"].to_pylist()]
        small = np.stack(pictures).reshape(-1, 16, 2, 16, 2, 3).mean((2, 4)).astype(np.float16)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part.npz")
        np.savez(part, x=small, y=labels)
        part.replace(kept)
    with np.load(kept) as stored:
        return stored["x"], stored["y"]
