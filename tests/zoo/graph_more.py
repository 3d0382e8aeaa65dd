"""Further layers and models of torch_geometric: edge features, relations, points, hypergraphs, pooling."""

from __future__ import annotations

import torch
import torch_geometric.nn as g
from torch import Tensor, nn
from torch.nn import functional as F

from .graph import EDGES, FEATURES, NODES, WIDTH, Stack, _mlp, _ready, _two, graph
from .parts import CLASSES, Factory


class WithEdges(nn.Module):
    """Two layers that also read features (or types) of the edges."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int = WIDTH):
        super().__init__()
        self.first, self.second, self.classify = first, second, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, extra: Tensor) -> Tensor:
        x = F.relu(self.first(x, edges, extra))
        return self.classify(F.relu(self.second(x, edges, extra)))


def _features(first: nn.Module, second: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return WithEdges(first, second), (
        *graph(),
        torch.randn(EDGES, 4, generator=torch.Generator().manual_seed(2)),
    )


def _types(first: nn.Module, second: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return WithEdges(first, second), (*graph(), torch.arange(EDGES) % 3)


class Initial(nn.Module):
    """Layers that also read the first layer's output (GCN2, FA)."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.enter, self.layers = nn.Linear(FEATURES, WIDTH), nn.ModuleList(layers)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = first = F.relu(self.enter(x))
        for layer in self.layers:
            x = F.relu(layer(x, first, edges))
        return self.classify(x)


class Points(nn.Module):
    """PointNet layers on positions, pooled to one vector per graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = g.PointNetConv(_mlp(FEATURES + 3, WIDTH), _mlp(WIDTH, WIDTH))
        self.second = g.PointNetConv(_mlp(WIDTH + 3, WIDTH), None)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, place: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x, place, edges)), place, edges))
        return self.classify(g.global_max_pool(x, batch))


def _points() -> tuple[nn.Module, tuple[Tensor, ...]]:
    x, edges = graph()
    return Points(), (x, torch.randn(NODES, 3), edges, torch.arange(NODES) // 12)


class Transformer(nn.Module):
    """GraphGPS: message passing and global attention side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.layers = nn.ModuleList(g.GPSConv(WIDTH, g.GINConv(_mlp(WIDTH, WIDTH)), 4) for _ in range(2))
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, edges)
        return self.classify(x)


class Enter(nn.Module):
    """A linear layer that reads the nodes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor, edges: Tensor, extra: Tensor) -> Tensor:
        return self.linear(x)


class Links(nn.Module):
    """LINKX, called with the features second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = g.LINKX(NODES, FEATURES, WIDTH, CLASSES, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.body(x, edges)


GRAPH_MORE: dict[str, Factory] = {
    "gineconv": lambda: _features(
        g.GINEConv(_mlp(FEATURES, WIDTH), edge_dim=4), g.GINEConv(_mlp(WIDTH, WIDTH), edge_dim=4)
    ),
    "gatv2_edges": lambda: _features(
        g.GATv2Conv(FEATURES, 8, 4, edge_dim=4), g.GATv2Conv(WIDTH, 8, 4, edge_dim=4)
    ),
    "nnconv": lambda: _features(
        g.NNConv(FEATURES, WIDTH, nn.Linear(4, FEATURES * WIDTH)),
        g.NNConv(WIDTH, WIDTH, nn.Linear(4, WIDTH * WIDTH)),
    ),
    "cgconv": lambda: _features(Enter(), g.CGConv(WIDTH, 4)),
    "rgcn": lambda: _types(g.RGCNConv(FEATURES, WIDTH, 3), g.RGCNConv(WIDTH, WIDTH, 3)),
    "fast_rgcn": lambda: _types(g.FastRGCNConv(FEATURES, WIDTH, 3), g.FastRGCNConv(WIDTH, WIDTH, 3)),
    "rgat": lambda: _types(g.RGATConv(FEATURES, 8, 3, heads=4), g.RGATConv(WIDTH, 8, 3, heads=4)),
    "filmconv": _two(lambda a, b: g.FiLMConv(a, b)),
    "supergat": _two(lambda a, b: g.SuperGATConv(a, b // 4, 4)),
    "egconv": _two(lambda a, b: g.EGConv(a, b, num_heads=4, num_bases=2)),
    "generalconv": _two(lambda a, b: g.GeneralConv(a, b, heads=2, attention=True)),
    "genconv": _two(lambda a, b: g.GENConv(a, b, norm="batch")),
    "ssgconv": _two(lambda a, b: g.SSGConv(a, b, 0.1)),
    "feastconv": _two(lambda a, b: g.FeaStConv(a, b, 2)),
    "mixhop": _ready(lambda: Stack(g.MixHopConv(FEATURES, 16), g.MixHopConv(48, 16), 48)),
    "hypergraph": _two(lambda a, b: g.HypergraphConv(a, b)),
    "dirgnn": _two(lambda a, b: g.DirGNNConv(g.SAGEConv(a, b))),
    "gcn2": _ready(lambda: Initial(g.GCN2Conv(WIDTH, 0.1), g.GCN2Conv(WIDTH, 0.1, shared_weights=False))),
    "faconv": _ready(lambda: Initial(g.FAConv(WIDTH), g.FAConv(WIDTH))),
    "antisymmetric": _ready(lambda: Stack(g.GCNConv(FEATURES, WIDTH), g.AntiSymmetricConv(WIDTH))),
    "pointnet": _points,
    "graphgps": _ready(Transformer),
    "linkx": _ready(Links),
    "graph_unet": _ready(lambda: g.GraphUNet(FEATURES, WIDTH, CLASSES, 2, 0.5)),
    "pmlp": _ready(lambda: g.PMLP(FEATURES, WIDTH, CLASSES, 2)),
    "graphsage_batchnorm": _ready(lambda: g.GraphSAGE(FEATURES, WIDTH, 3, CLASSES, norm="BatchNorm")),
    "gcn_lstm_jump": _ready(lambda: g.GCN(FEATURES, WIDTH, 3, CLASSES, jk="lstm")),
}
