"""Experts that a router picks by index are units where the code asks for them in ways that are followed."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from controlprune.plant.plant import Plant
from controlprune.structure import Structure, analyse
from controlprune.structure.extents import size

from .models.experts import GroupedProducts, Slabs

Scores = tuple[Tensor, Tensor]


class Grouped(GroupedProducts):
    """Tokens sorted by expert, one grouped product for all."""

    def scores(self, x: Tensor) -> Scores:
        return self.router(x).softmax(-1).topk(2)


class OfLogits(GroupedProducts):
    def scores(self, x: Tensor) -> Scores:
        top, picked = self.router(x).topk(2)
        return top.softmax(-1), picked


class Gathered(Slabs):
    """Each token's experts taken out by index; weights gathered from the softmax once more."""

    each = 2

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        picked = p.topk(self.each)[1]
        hidden = torch.einsum("td,tkdh->tkh", x, self.up[picked]).relu()
        return torch.einsum("tkh,tkhd,tk->td", hidden, self.down[picked], p.gather(1, picked))


class Shared(Grouped):
    """Half as hot."""

    def scores(self, x: Tensor) -> Scores:
        return (self.router(x).softmax(-1) / 2).contiguous().topk(2)


class Around(Grouped):
    """Recomputed as a module, which is told."""

    def scores(self, x: Tensor) -> Scores:
        logits = checkpoint(self.router, x, use_reentrant=False)
        assert isinstance(logits, Tensor)
        return logits.softmax(-1).topk(2)


FOLLOWED = {
    "around": Around,
    "shared": Shared,
    "grouped": Grouped,
    "of_logits": OfLogits,
    "gathered": Gathered,
}


class Counted(Gathered):
    """An even load is asked for, with a factor that is no size."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        picked = p.topk(2)[1]
        self.loss = (picked.flatten().bincount(minlength=len(self.up)) * p.mean(0)).sum() / len(x)
        return super().forward(x)


class Told(Grouped):
    def scores(self, x: Tensor) -> Scores:
        top, picked = super().scores(x)
        return top * (picked != 2), picked


class Dropped(Grouped):
    """One that is on may weigh 0, as those that are off do: which of them is picked?"""

    def scores(self, x: Tensor) -> Scores:
        return nn.functional.dropout(self.router(x).softmax(-1), 0.3, self.training).topk(2)


class Again(Grouped):
    """Recomputed in the backward pass, where no module that could be told who is off is running."""

    def scores(self, x: Tensor) -> Scores:
        p = checkpoint(self.weights, x, use_reentrant=False)
        assert isinstance(p, Tensor)
        return p.topk(2)

    def weights(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.extra).softmax(-1)

    def __init__(self, inner: int = 10) -> None:
        super().__init__(inner)
        self.extra = nn.Parameter(torch.randn(4, 8))


class InNumpy(Grouped):
    def scores(self, x: Tensor) -> Scores:
        top, picked = super().scores(x)
        return top * torch.from_numpy(picked.numpy() != 2), picked


class Parted(Grouped):
    """Of each half of the experts one."""

    def scores(self, x: Tensor) -> Scores:
        top, picked = self.router(x).softmax(-1).view(len(x), 2, 2).topk(1)
        return top.flatten(1), picked.flatten(1) + torch.tensor([0, 2])


class AlongTokens(Grouped):
    """Of the tokens, too, the largest weights are taken."""

    def scores(self, x: Tensor) -> Scores:
        p = self.router(x).softmax(-1)
        top, picked = p.topk(2)
        return top * p.flatten().view(len(x), -1).topk(2, 0)[0].sum(), picked


class Least(Grouped):
    def scores(self, x: Tensor) -> Scores:
        return self.router(x).softmax(-1).topk(2, largest=False)


class Kept(Grouped):
    def scores(self, x: Tensor) -> Scores:
        top, self.picked = super().scores(x)
        return top, self.picked


class Returned(Grouped):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), super().scores(x)[1]


class OneByOne(Slabs):
    """A loop over the experts, each told by its number."""

    def scores(self, x: Tensor) -> Scores:
        return self.router(x).softmax(-1).topk(2)


class All(Gathered):
    each = 4


REFUSED: dict[str, tuple[type[Slabs], str]] = {
    "told": (Told, "ne takes which: the model's code may tell them by number"),
    "one_by_one": (OneByOne, "eq takes which: the model's code may tell them by number"),
    "least": (Least, "(topk)"),
    "dropped": (Dropped, "(topk)"),
    "again": (Again, "softmax runs over its units: with one off"),
    "in_numpy": (InNumpy, "leaves torch (numpy, tolist)"),
    "parted": (Parted, "a router picks whole experts by index"),
    "along_tokens": (AlongTokens, "its units are summed"),
    "kept": (Kept, "the model keeps or returns"),
    "returned": (Returned, "the model keeps or returns"),
}


def built(kind: type[Slabs]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind(16), torch.randn(5, 8)


@pytest.mark.parametrize("name", FOLLOWED)
def test_experts_that_are_picked_are_units(name: str) -> None:
    model, x = built(FOLLOWED[name])
    structure = analyse(model, (x,))
    (expert,) = (group for group in structure.groups if group.kind == "expert")
    assert (expert.size, expert.least) == (4, 2)
    assert [(s.tensor, s.dim) for s in expert.readers] == [("down", 0)]
    assert {s.tensor for s in expert.producers} == {"router.weight", "router.bias", "up"}


@pytest.mark.parametrize("name", [*FOLLOWED, "counted"])
def test_steps_masked_are_steps_shrunk(name: str) -> None:
    model, x = built({**FOLLOWED, "counted": Counted}[name])
    structure, found = analyse(model, (x,)), []
    masks = [
        torch.arange(g.size) % 4 != 1 if g.kind == "expert" else torch.arange(g.size) < 8
        for g in structure.groups
    ]
    assert any(group.kind == "expert" for group in structure.groups)
    for compact in (False, True):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.1)
        plant = Plant(twin, optimizer, structure)
        plant.apply(masks, compact=compact)
        for _ in range(5):
            loss = twin(x).square().mean() + getattr(twin, "loss", 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found += [twin(x)]
        plant.release()
        found += [twin(x)]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_told(name: str) -> None:
    kind, reason = REFUSED[name]
    structure = analyse(*built(kind), check=False)
    assert all(group.size != 4 for group in structure.groups)
    told = [refusal.reason for refusal in structure.refused if refusal.size == 4]
    assert any(reason in line for line in told), told


def test_where_all_are_picked_none_can_leave() -> None:
    refused = analyse(*built(All)).refused
    assert any(r.reason == "a router picks every one of its units" for r in refused)


def test_no_fewer_than_are_picked() -> None:
    model, structure, _, _ = oracle.make("picked", 0)
    plant = Plant(model, None, structure)
    masks = [torch.arange(g.size) < (1 if g.kind == "expert" else g.size) for g in structure.groups]
    with pytest.raises(ValueError, match="'router' has 1 active units; the model's code takes 2 at least"):
        plant.apply(masks, compact=False)


def flops(structure: Structure, experts: int) -> float:
    total = 0.0
    widths = [experts if g.kind == "expert" else g.size for g in structure.groups]
    for work in structure.work:
        product = work.coefficient
        for factor in work.factors:
            product *= size(factor, widths)
        total += product
    return total


def test_what_is_run_is_counted_and_no_more() -> None:
    """Of five experts two work on a token, of three two: only the router's rows are fewer."""
    structure = analyse(oracle.Picked(), (torch.randn(6, 4, 4),))
    router = 2 * (6 * 4) * 4
    assert flops(structure, 5) - flops(structure, 3) == router * 2
    dense = analyse(oracle.Routed(), (torch.randn(6, 4, 3),))
    assert flops(dense, 5) - flops(dense, 3) == 2 * (router + 2 * 2 * (6 * 4) * 4 * 6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_mixtures_of_transformers(name: str) -> None:
    tr = pytest.importorskip("transformers", minversion="5.0")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    if name == "mixtral":
        model = tr.MixtralForCausalLM(tr.MixtralConfig(**sizes, **heads))
    else:
        model = tr.GptOssForCausalLM(tr.GptOssConfig(**sizes, **heads, head_dim=16))
    structure = analyse(model.eval(), {"input_ids": torch.randint(0, 64, (2, 7))})
    (expert,) = (group for group in structure.groups if group.kind == "expert")
    assert (expert.size, expert.least) == (4, 2)
    assert {s.tensor.rpartition(".")[2] for s in expert.readers} <= {"down_proj", "down_proj_bias"}
    asked = {"input_ids": torch.randint(0, 64, (2, 7)), "output_router_logits": True}
    assert all(group.kind != "expert" for group in analyse(model, asked).groups)


class Listed(nn.Module):
    """Experts that are modules, all of them at work."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.stacked, self.router, self.head = stacked, nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        if self.stacked:
            return self.head(
                (torch.stack([expert(x) for expert in self.experts], 1) * p.unsqueeze(-1)).sum(1)
            )
        return self.head(sum(p[:, k : k + 1] * expert(x) for k, expert in enumerate(self.experts)))


@pytest.mark.parametrize("stacked", [True, False])
def test_modules_of_a_list_stay_and_that_is_told(stacked: bool) -> None:
    torch.manual_seed(0)
    refused = analyse(Listed(stacked), torch.randn(5, 8)).refused
    reason = "softmax runs over its units, and they are taken one by one: modules of a list can't leave it"
    assert ("router", 4, reason) in {(r.name, r.size, r.reason) for r in refused}
