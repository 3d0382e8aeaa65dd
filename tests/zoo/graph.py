"""Models of torch_geometric on one fixed random graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch_geometric.nn as g
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import CLASSES, Factory

NODES, EDGES, FEATURES, WIDTH = 24, 80, 16, 32


def graph() -> tuple[Tensor, Tensor]:
    """Node features (24, 16) and edges (2, 80)."""
    seed = torch.Generator().manual_seed(1)
    return torch.randn(NODES, FEATURES, generator=seed), torch.randint(0, NODES, (2, EDGES), generator=seed)


class Stack(nn.Module):
    """Two message-passing layers with an activation between, then a linear classifier."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int = WIDTH):
        super().__init__()
        self.first, self.second, self.classify = first, second, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = F.relu(self.first(x, edges))
        return self.classify(F.elu(self.second(x, edges)))


class Lift(nn.Module):
    """A linear layer that ignores the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.linear(x)


def _two(layer: Callable[[int, int], nn.Module]) -> Factory:
    return lambda: (Stack(layer(FEATURES, WIDTH), layer(WIDTH, WIDTH)), graph())


def _ready(model: Callable[[], nn.Module]) -> Factory:
    return lambda: (model(), graph())


class Deep(nn.Module):
    """DeepGCN: residual pre-norm layers ("res+")."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.layers = nn.ModuleList(
            g.DeepGCNLayer(g.GENConv(WIDTH, WIDTH, "softmax"), nn.LayerNorm(WIDTH), nn.ReLU(), "res+", 0.1)
            for _ in range(2)
        )
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, edges)
        return self.classify(x)


class Propagate(nn.Module):
    """APPNP: an MLP, then personalised-PageRank propagation of its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.hidden = nn.Linear(FEATURES, 64), nn.Linear(64, WIDTH)
        self.propagate, self.classify = g.APPNP(3, 0.1), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.hidden(F.relu(self.enter(x)))
        return self.classify(self.propagate(x, edges))


class Pooled(nn.Module):
    """Graph classification: GIN layers, jumping knowledge, global pooling by graph index."""

    def __init__(self) -> None:
        super().__init__()
        self.body = g.GIN(FEATURES, WIDTH, 2, jk="cat", norm="BatchNorm")
        self.classify = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        x = self.body(x, edges)
        return self.classify(torch.cat([g.global_mean_pool(x, batch), g.global_add_pool(x, batch)], 1))


def _pooled() -> tuple[nn.Module, tuple[Tensor, ...]]:
    x, edges = graph()
    return Pooled(), (x, edges % 12 + 12 * (torch.arange(EDGES) % 2), torch.arange(NODES) // 12)


def _mlp(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(), nn.Linear(after, after))


def _pna() -> nn.Module:
    degrees = torch.bincount(graph()[1][1], minlength=NODES)
    histogram = torch.bincount(degrees)
    return g.PNA(
        *(FEATURES, WIDTH, 2, CLASSES),
        aggregators=["mean", "max", "std"],
        scalers=["identity", "amplification"],
        deg=histogram,
    )


GRAPH: dict[str, Factory] = {
    "gcn": _ready(lambda: g.GCN(FEATURES, WIDTH, 3, CLASSES, norm="BatchNorm")),
    "graphsage": _ready(lambda: g.GraphSAGE(FEATURES, WIDTH, 3, CLASSES)),
    "graphsage_layernorm": _ready(lambda: g.GraphSAGE(FEATURES, WIDTH, 3, CLASSES, norm="LayerNorm")),
    "gin": _ready(lambda: g.GIN(FEATURES, WIDTH, 3, CLASSES)),
    "gat": _ready(lambda: g.GAT(FEATURES, WIDTH, 2, CLASSES, heads=4)),
    "gatv2": _ready(lambda: g.GAT(FEATURES, WIDTH, 2, CLASSES, v2=True, heads=4)),
    "edgecnn": _ready(lambda: g.EdgeCNN(FEATURES, WIDTH, 2, CLASSES)),
    "pna": _ready(_pna),
    "gcn_jump": _ready(lambda: g.GCN(FEATURES, WIDTH, 2, CLASSES, jk="max")),
    "gin_pooled": _pooled,
    "chebconv": _two(lambda a, b: g.ChebConv(a, b, 3)),
    "graphconv": _two(lambda a, b: g.GraphConv(a, b)),
    "sgconv": _two(lambda a, b: g.SGConv(a, b, 2)),
    "tagconv": _two(lambda a, b: g.TAGConv(a, b)),
    "armaconv": _two(lambda a, b: g.ARMAConv(a, b, 2)),
    "transformerconv": _two(lambda a, b: g.TransformerConv(a, b // 4, 4)),
    "resgatedgraphconv": _two(lambda a, b: g.ResGatedGraphConv(a, b)),
    "gatedgraphconv": _ready(lambda: Stack(Lift(), g.GatedGraphConv(WIDTH, 2))),
    "gineconv_mlp": _two(lambda a, b: g.GINConv(_mlp(a, b), train_eps=True)),
    "dynamic_edge_mlp": _two(lambda a, b: g.EdgeConv(_mlp(2 * a, b), "mean")),
    "clusterconv": _two(lambda a, b: g.ClusterGCNConv(a, b)),
    "gatconv": _two(lambda a, b: g.GATConv(a, b // 4, 4)),
    "leconv": _two(lambda a, b: g.LEConv(a, b)),
    "mfconv": _two(lambda a, b: g.MFConv(a, b, 4)),
    "appnp": _ready(Propagate),
    "deepgcn": _ready(Deep),
}
