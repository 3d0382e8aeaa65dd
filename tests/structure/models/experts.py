"""Mixtures of experts: routed by index, by grouped products, or all of them at work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import VECTOR, Cases

__all__ = ["CASES"]


class Routed(nn.Module):
    """Tokens are picked by index, experts (modules) run on what they got."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, choice = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (choice == number).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, expert(flat[token]) * weight[token, slot, None])
        return out.view_as(x)


class Slabs(nn.Module):
    """All experts in one tensor, one picked after the other; scores are sigmoids, two of them win."""

    def __init__(self, inner: int = 10) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, inner)), nn.Parameter(torch.randn(4, inner, 8))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, choice = self.router(x).sigmoid().topk(2)
        return weight, choice

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.scores(x)
        out = torch.zeros_like(x)
        for number in range(len(self.up)):
            token, slot = (choice == number).nonzero(as_tuple=True)
            hidden = F.relu(x[token] @ self.up[number])
            out.index_add_(0, token, hidden @ self.down[number] * weight[token, slot, None])
        return out


class GroupedProducts(Slabs):
    """The same with tokens sorted by expert and one grouped product for all, which wants aligned widths."""

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.scores(x)
        order = choice.flatten().argsort()
        ends = choice.flatten().bincount(minlength=len(self.up)).cumsum(0).to(torch.int32)
        hidden = F.relu(F.grouped_mm(x[order // 2], self.up, offs=ends))
        mixed = F.grouped_mm(hidden, self.down, offs=ends) * weight.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, order // 2, mixed)


class AllAtWork(nn.Module):
    """Every expert sees every token, each behind a gate of its own: whole experts can go."""

    def __init__(self, contracted: bool) -> None:
        super().__init__()
        self.contracted, self.router, self.out = contracted, nn.Linear(5, 4), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.randn(4, 5, 10)), nn.Parameter(torch.randn(4, 10, 6))
        self.bias = nn.Parameter(torch.randn(4, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.router(x).sigmoid()
        hidden = torch.einsum("bd,edh->ebh", x, self.up).tanh()
        if self.contracted:
            mixed = torch.einsum("be,ebh,eho->bo", gate, hidden, self.down)
        else:
            mixed = ((torch.bmm(hidden, self.down) + self.bias) * gate.t().unsqueeze(-1)).sum(0)
        return self.out(mixed.relu())


class SoftlyMixed(AllAtWork):
    """The same behind one softmax: an expert that is off has a logit of -inf."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.router(x).softmax(-1)
        hidden = torch.einsum("bd,edh->ebh", x, self.up).tanh()
        return self.out(torch.einsum("be,ebh,eho->bo", gate, hidden, self.down).relu())


CASES: Cases = {
    "experts": (Routed, (2, 5, 6), [10, 10, 10]),
    "expert_slabs": (Slabs, (5, 8), [10]),
    "experts_contracted": (lambda: AllAtWork(True), VECTOR, [4, 6, 10]),
    "experts_summed": (lambda: AllAtWork(False), VECTOR, [4, 6, 10]),
    "experts_softmax": (lambda: SoftlyMixed(True), VECTOR, [4, 6, 10]),
}
