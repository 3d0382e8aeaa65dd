"""Models that take sparse tensors, as graph nets do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from controlprune.structure import analyse


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.spmm(adjacency, torch.relu(torch.spmm(adjacency, x @ self.first)) @ self.second)


def test_a_graph_net_that_takes_a_sparse_adjacency_is_pruned() -> None:
    torch.manual_seed(0)
    model, inputs = Convolution(), (torch.randn(5, 3), torch.eye(5).roll(1, 0).to_sparse())
    structure = analyse(model, inputs)
    assert structure.names == ("first",)
    assert structure.verified
