"""Task 5: two layers of hidden width 256 on Cora (public split: 140 papers to learn from, 1,000 to test on).

With a_ij the weight of the edge from j to i and n(i) the neighbours of i,

    graph-sage   h_i = W₁ x_i + W₂ Σ_{j ∈ n(i)} a_ij x_j + b,         a_ij = 1 / |n(i)|
    graph-gcn    h_i =         W  Σ_{j ∈ n(i) ∪ {i}} a_ij x_j + b,     a_ij = 1 / √(d_i d_j),  d = |n| + 1

Projected first, then summed over edges. Full batches, Adam at 0.01, dropout of a half on the hidden units.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..task import Task

__all__ = ["gcn", "sage"]

HIDDEN, FEATURES, CLASSES = 256, 1433, 7
Graph = tuple[Tensor, Tensor, Tensor, Tensor]  # features [n, f]; per edge: from, to, weight


class Layer(nn.Module):
    """Messages of the neighbours; with `own`, the node itself apart from them."""

    def __init__(self, before: int, after: int, own: bool) -> None:
        super().__init__()
        self.near = nn.Linear(before, after, bias=False)
        self.own = nn.Linear(before, after, bias=False) if own else None
        self.bias = nn.Parameter(torch.zeros(after))

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        sent = self.near(x)
        found = torch.zeros_like(sent).index_add(0, target, sent[source] * weight[:, None])
        return found + self.bias if self.own is None else found + self.own(x) + self.bias


class Net(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.first, self.second = Layer(FEATURES, HIDDEN, own), Layer(HIDDEN, CLASSES, own)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.first(x, source, target, weight)))
        return self.second(hidden, source, target, weight)


def sage(data: Path, steps: int = 100) -> Task:
    return _task("graph-sage", data / "planetoid" / "Cora" / "raw", steps, own=True)


def gcn(data: Path, steps: int = 100) -> Task:
    return _task("graph-gcn", data / "planetoid" / "Cora" / "raw", steps, own=False)


def _task(name: str, folder: Path, steps: int, *, own: bool) -> Task:
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Net(own)

    return Task(
        name=name,
        steps=steps,
        budgets=(0.25,),
        dense=net,
        blank=net,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4),
        batches=lambda seed: _always(slice(0, 140)),
        outputs=lambda model, rows: (model(*_graph(folder, own))[rows], _labels(folder)[rows]),
        evaluate=lambda model: {"accuracy": _accuracy(model, folder, own, slice(-1000, None))},
        example=lambda rows: _graph(folder, own),
        glance=partial(_accuracy, folder=folder, own=own, rows=slice(140, 640)),
    )


def _always(rows: slice) -> Iterator[slice]:
    while True:
        yield rows


def _accuracy(model: nn.Module, folder: Path, own: bool, rows: slice) -> float:
    with torch.no_grad():
        right = model(*_graph(folder, own)).argmax(1)[rows] == _labels(folder)[rows]
    return 100.0 * float(right.float().mean())


@cache
def _graph(folder: Path, own: bool) -> Graph:
    x = _features(folder)
    neighbours: dict[int, list[int]] = _read(folder, "graph")
    pairs = {(j, i) for i, near in neighbours.items() for k in near for j, i in ((i, k), (k, i)) if j != i}
    if not own:
        pairs |= {(i, i) for i in range(len(x))}
    source, target = torch.tensor(sorted(pairs)).t().contiguous()
    degree = torch.bincount(target, minlength=len(x)).float()
    weight = 1 / degree[target] if own else (degree[source] * degree[target]).rsqrt()
    return x, source, target, weight


@cache
def _features(folder: Path) -> Tensor:
    """Rows scaled to sum to one."""
    x = torch.from_numpy(_stacked(folder, "allx", "tx", lambda part: part.toarray())).float()
    return x / x.sum(1, keepdim=True).clamp_min(1.0)


@cache
def _labels(folder: Path) -> Tensor:
    return torch.from_numpy(_stacked(folder, "ally", "ty", np.asarray).argmax(1))


def _stacked(folder: Path, known: str, test: str, dense: Any) -> np.ndarray:
    """The papers to test on stand at the end, in an order of their own."""
    order = np.loadtxt(folder / "ind.cora.test.index", dtype=np.int64)
    rows = np.concatenate([dense(_read(folder, known)), dense(_read(folder, test))])
    rows[order] = rows[np.sort(order)]
    return rows


def _read(folder: Path, name: str) -> Any:
    """The files of Planetoid are pickles of Python 2."""
    with (folder / f"ind.cora.{name}").open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy and scipy, about how old they are
        return pickle.load(file, encoding="latin1")
