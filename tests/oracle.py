"""The dumb oracle: deepcopy, index by hand, a fresh optimizer with hand-sliced state. And small nets to try.

Nothing here shares code with `controlprune.plant`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from controlprune.structure.analyse import analyse
from controlprune.structure.extents import Concat, Fixed, Product, Units, keep, size
from controlprune.structure.groups import Group, SizeAttribute, Slice, Structure, Work


def cut(tensor: Tensor, extents: Sequence, masks: Sequence[Tensor]) -> Tensor:
    """The live entries of a dense tensor."""
    for dim, extent in enumerate(extents):
        if tensor.shape[dim] == size(extent):  # factored state has length 1 where the parameter has more
            live = keep(extent, masks).nonzero().flatten()
            tensor = tensor.index_select(dim, live.to(tensor.device))
    return tensor.clone()


def small_copy(model: nn.Module, structure: Structure, masks: Sequence[Tensor]) -> nn.Module:
    """A plain model that has only the live units of a dense one."""
    small = copy.deepcopy(model)
    widths = [int(m.sum()) for m in masks]
    for name, extents in structure.tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = small.get_submodule(owner)
        old = getattr(module, leaf)
        new = cut(old.detach(), extents, masks)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, leaf, new)
    for alias, name in structure.aliases.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(small.get_submodule(owner), leaf, small.get_parameter(name))
    for item in structure.attributes:
        module, value = small.get_submodule(item.module), size(item.extent, widths)
        if item.index is not None:
            entries = list(getattr(module, item.attribute))
            entries[item.index] = value
            value = tuple(entries)
        setattr(module, item.attribute, value)
    return small


def small_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    small: nn.Module,
    structure: Structure,
    masks: Sequence[Tensor],
) -> torch.optim.Optimizer:
    """A fresh optimizer of the small model, with the dense one's settings and its state cut by hand."""
    names = {id(p): name for name, p in model.named_parameters()}
    small_parameters = dict(small.named_parameters())
    groups = [
        {**group, "params": [small_parameters[names[id(p)]] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    make: Callable = type(optimizer)
    fresh = make(groups)
    for parameter, entries in optimizer.state.items():
        name = names[id(parameter)]
        fresh.state[small_parameters[name]] = {
            key: cut(value, structure.tensors[name], masks)
            if isinstance(value, Tensor) and value.ndim == parameter.ndim and value.ndim > 0
            else copy.deepcopy(value)
            for key, value in entries.items()
        }
    return fresh


def write_back(dense: Tensor, part: Tensor, extents: Sequence, masks: Sequence[Tensor]) -> None:
    """Write the live entries over those of a dense tensor, one index per dimension."""
    index = [
        keep(extent, masks).nonzero().flatten()
        if dense.shape[d] == size(extent)
        else torch.arange(dense.shape[d])
        for d, extent in enumerate(extents)
    ]
    if index:
        grid = torch.meshgrid(*index, indexing="ij")
        dense[grid] = part
    else:
        dense.copy_(part)


SUMMED = {"row_var": -1, "col_var": -2}  # what Adafactor averages over


class Truth:
    """A dense model and optimizer; small ones are cut from it, trained elsewhere and written back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, structure: Structure) -> None:
        self.model, self.optimizer, self.structure = model, optimizer, structure

    def cut(self, masks: Sequence[Tensor]) -> tuple[nn.Module, torch.optim.Optimizer]:
        small = small_copy(self.model, self.structure, masks)
        return small, small_optimizer(self.optimizer, self.model, small, self.structure, masks)

    @torch.no_grad()
    def absorb(self, small: nn.Module, optimizer: torch.optim.Optimizer, masks: Sequence[Tensor]) -> None:
        dense_tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        small_tensors = {**dict(small.named_parameters()), **dict(small.named_buffers())}
        for name, extents in self.structure.tensors.items():
            write_back(dense_tensors[name], small_tensors[name], extents, masks)
        for name, p in small.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                entries = self.optimizer.state[dense_tensors[name]]
                if isinstance(value, Tensor) and value.ndim == p.ndim:
                    shape = list(dense_tensors[name].shape)
                    if key in SUMMED:
                        shape[SUMMED[key]] = 1
                    entries.setdefault(key, torch.zeros(shape, dtype=value.dtype))
                    write_back(entries[key], value, self.structure.tensors[name], masks)
                else:
                    entries[key] = copy.deepcopy(value)

    @torch.no_grad()
    def take_buffers(self, model: nn.Module, masks: Sequence[Tensor]) -> None:
        """Buffers of dormant units as `model` (dense shapes) has them."""
        mine = dict(self.model.named_buffers())
        for name, buffer in model.named_buffers():
            extents = self.structure.tensors[name]
            if extents:
                live = cut(mine[name], extents, masks)
                mine[name].copy_(buffer)
                write_back(mine[name], live, extents, masks)


class Mlp(nn.Module):
    """5 → 7 → 6 → 3, with a LayerNorm-free softplus (does not keep zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(nn.functional.softplus(self.first(x)))))


class Residual(nn.Module):
    """Convolutions and BatchNorm, a residual sum, pooling, flatten into a linear.

    No bias before a BatchNorm: its gradient is zero but for rounding, which adaptive optimizers magnify.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(5)
        self.inner = nn.Conv2d(5, 4, 3, padding=1)
        self.outer = nn.Conv2d(4, 5, 1, bias=False)
        self.outer_norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        inner = nn.functional.softplus(self.inner(x))
        x = torch.relu(x + self.outer_norm(self.outer(inner)))
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


class Concatenated(nn.Module):
    """Two branches concatenated into one linear, and a frozen layer before them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(4, 5)
        self.mix = nn.Linear(11, 4)
        self.head = nn.Linear(4, 2)
        self.right.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([torch.tanh(self.left(x)), torch.sigmoid(self.right(x))], 1)
        return self.head(torch.sigmoid(self.mix(both)))


class Attention(nn.Module):
    """Two query heads to each key/value head, written by hand; a gated feed-forward by chunk; residuals.

    No bias on the keys: softmax does not see it, so its gradient is rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.query = nn.Linear(8, 12)
        self.key = nn.Linear(8, 6, bias=False)
        self.value = nn.Linear(8, 6)
        self.out = nn.Linear(12, 8)
        self.up = nn.Linear(8, 10)
        self.down = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, time, _ = x.shape
        query = self.query(x).view(batch, time, -1, 3).transpose(1, 2)
        key = self.key(x).view(batch, time, -1, 3).transpose(1, 2).repeat_interleave(2, 1)
        value = self.value(x).view(batch, time, -1, 3).transpose(1, 2).repeat_interleave(2, 1)
        attended = torch.softmax(query @ key.transpose(-1, -2) / 3**0.5, -1) @ value
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.up(x).chunk(2, -1)
        x = x + self.down(nn.functional.silu(gate) * up)
        return self.head(x).mean(1)


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(2, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.project = nn.Conv2d(6, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.softplus(self.depthwise(torch.relu(self.norm(self.expand(x)))))
        pooled = x.mean((2, 3), keepdim=True)
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))
        x = torch.tanh(self.grouped(torch.tanh(self.project(x))))
        return self.head(x.mean((2, 3)))


class Twice(nn.Module):
    """One square weight used by two modules, both of its dimensions in one group; a BatchNorm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        x = x + torch.tanh(self.first(x))
        return self.head(torch.sigmoid(self.second(x)))


class OwnNorm(nn.Module):
    """RMSNorm as written by hand, its gain stored as what it is above 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.tiny) * (1 + self.weight)


class Normed(nn.Module):
    """A residual width under a LayerNorm, a RMSNorm and one by hand; what enters it reads it at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 8, bias=False)
        self.place = nn.Parameter(torch.randn(4, 8))
        self.first, self.second, self.last = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6), OwnNorm(8)
        self.mix = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 5), nn.Linear(5, 8)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.place
        x = x + torch.tanh(self.mix(self.first(x)))
        x = x + self.down(nn.functional.softplus(self.up(self.second(x))))
        return self.head(nn.functional.linear(self.last(x), self.enter.weight.t())).mean(1)


class GroupNormed(nn.Module):
    """GroupNorm by member and as a whole, and an InstanceNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.members = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.GroupNorm(2, 6)
        self.second, self.whole = nn.Conv2d(6, 5, 1, bias=False), nn.GroupNorm(1, 5)
        self.third, self.each = nn.Conv2d(5, 4, 3, bias=False), nn.InstanceNorm2d(4, affine=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.softplus(self.members(self.first(x)))
        x = torch.tanh(self.whole(self.second(x)))
        return self.head(torch.sigmoid(self.each(self.third(x))).mean((2, 3)))


class Routed(nn.Module):
    """Experts in stacked weights, all at work on every token, mixed by a softmax; their load is evened."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router = nn.Linear(3, 4), nn.Linear(4, 5)
        self.up, self.down = nn.Parameter(torch.randn(5, 4, 6)), nn.Parameter(torch.randn(5, 6, 4))
        self.bias = nn.Parameter(torch.randn(5, 1, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        p = torch.softmax(self.router(x) / 2, -1)
        hidden = torch.tanh(x.flatten(0, 1) @ self.up)
        given = (hidden @ self.down + self.bias) * p.flatten(0, 1).t().unsqueeze(-1)
        mixed = given.sum(0).view(x.shape)
        load = p.mean((0, 1)).square().sum()
        return self.head(x + mixed).mean(1) + torch.stack([load, -load, load * 0])


class Picking(nn.Module):
    """A router that picks two experts of five, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(x, self.weight)
        top, picked = torch.topk(torch.softmax(logits, -1), 2, -1)
        return top / top.sum(-1, keepdim=True), picked


class Picked(nn.Module):
    """Experts in stacked weights, taken out by index for each token that they were picked for."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.inner, self.head = Picking(), nn.Linear(4, 6), nn.Linear(4, 3)
        self.up, self.down = nn.Parameter(torch.randn(5, 4, 8)), nn.Parameter(torch.randn(5, 8, 4))
        self.bias, self.after = nn.Parameter(torch.randn(5, 4)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, picked = self.router(flat)
        hidden = torch.tanh(flat.repeat_interleave(2, 0).unsqueeze(1) @ self.up[picked.flatten()])
        given = (hidden @ self.down[picked.flatten()]).squeeze(1) + self.bias[picked.flatten()]
        mixed = (given.view(len(flat), 2, -1) * weights.unsqueeze(-1)).sum(1).view(x.shape)
        return self.head(x + mixed + self.after(torch.tanh(self.inner(x)))).mean(1)


Specification = list[tuple[str, int, list[tuple[str, int]], list[tuple[str, int]]]]


def _structure(
    model: nn.Module,
    specification: Specification,
    extents: dict[str, tuple],
    attributes: list[tuple[str, str, object]],
    work: list[Work],
) -> Structure:
    groups = tuple(
        Group(
            name,
            units,
            "unit",
            tuple(Slice(t, d, extents[t][d], "producer") for t, d in producers)
            + tuple(Slice(t, d, extents[t][d], "reader") for t, d in readers),
        )
        for name, units, producers, readers in specification
    )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Structure(
        groups=groups,
        refused=(),
        tensors={n: extents.get(n, tuple(Fixed(k) for k in t.shape)) for n, t in tensors.items()},
        parameters=frozenset(dict(model.named_parameters())),
        attributes=tuple(SizeAttribute(m, a, None, e) for m, a, e in attributes),  # type: ignore[arg-type]
        work=tuple(work),
    )


def mlp_structure(model: Mlp, batch: int) -> Structure:
    a, b = Units(0, 7), Units(1, 6)
    extents = {
        "first.weight": (a, Fixed(5)),
        "first.bias": (a,),
        "second.weight": (b, a),
        "second.bias": (b,),
        "head.weight": (Fixed(3), b),
    }
    return _structure(
        model,
        [
            ("first", 7, [("first.weight", 0), ("first.bias", 0)], [("second.weight", 1)]),
            ("second", 6, [("second.weight", 0), ("second.bias", 0)], [("head.weight", 1)]),
        ],
        extents,
        [
            ("first", "out_features", a),
            ("second", "in_features", a),
            ("second", "out_features", b),
            ("head", "in_features", b),
        ],
        [
            Work("first", "addmm", 2 * batch * 5, (a,)),
            Work("second", "addmm", 2 * batch, (a, b)),
            Work("head", "mm", 2 * batch * 3, (b,)),
        ],
    )


def residual_structure(model: Residual, batch: int) -> Structure:
    r, i = Units(0, 5), Units(1, 4)
    one, three = Fixed(1), Fixed(3)
    extents = {
        "stem.weight": (r, Fixed(2), three, three),
        "inner.weight": (i, r, three, three),
        "inner.bias": (i,),
        "outer.weight": (r, i, one, one),
        "head.weight": (three, Product((r, Fixed(4)))),
    }
    norm = ("weight", "bias", "running_mean", "running_var")
    extents |= {f"{m}_norm.{leaf}": (e,) for m, e in (("stem", r), ("outer", r)) for leaf in norm}
    rows = [("stem.weight", 0), ("outer.weight", 0)]
    rows += [(f"{m}_norm.{leaf}", 0) for m in ("stem", "outer") for leaf in norm]
    inner = [("inner.weight", 0), ("inner.bias", 0)]
    return _structure(
        model,
        [
            ("stem", 5, rows, [("inner.weight", 1), ("head.weight", 1)]),
            ("inner", 4, inner, [("outer.weight", 1)]),
        ],
        extents,
        [
            ("stem", "out_channels", r),
            ("stem_norm", "num_features", r),
            ("inner", "in_channels", r),
            ("inner", "out_channels", i),
            ("outer", "in_channels", i),
            ("outer", "out_channels", r),
            ("outer_norm", "num_features", r),
            ("head", "in_features", Product((r, Fixed(4)))),
        ],
        [
            Work("stem", "convolution", 2 * batch * 16 * 9 * 2, (r,)),
            Work("inner", "convolution", 2 * batch * 16 * 9, (r, i)),
            Work("outer", "convolution", 2 * batch * 16, (r, i)),
            Work("head", "addmm", 2 * batch * 3 * 4, (r,)),
        ],
    )


def concatenated_structure(model: Concatenated, batch: int) -> Structure:
    left, right, mix = Units(0, 6), Units(1, 5), Units(2, 4)
    both = Concat((left, right))
    extents = {
        "left.weight": (left, Fixed(4)),
        "left.bias": (left,),
        "right.weight": (right, Fixed(4)),
        "right.bias": (right,),
        "mix.weight": (mix, both),
        "mix.bias": (mix,),
        "head.weight": (Fixed(2), mix),
    }
    return _structure(
        model,
        [
            ("left", 6, [("left.weight", 0), ("left.bias", 0)], [("mix.weight", 1)]),
            ("right", 5, [("right.weight", 0), ("right.bias", 0)], [("mix.weight", 1)]),
            ("mix", 4, [("mix.weight", 0), ("mix.bias", 0)], [("head.weight", 1)]),
        ],
        extents,
        [
            ("left", "out_features", left),
            ("right", "out_features", right),
            ("mix", "in_features", both),
            ("mix", "out_features", mix),
            ("head", "in_features", mix),
        ],
        [
            Work("left", "addmm", 2 * batch * 4, (left,)),
            Work("right", "addmm", 2 * batch * 4, (right,)),
            Work("mix", "addmm", 2 * batch, (both, mix)),
            Work("head", "addmm", 2 * batch * 2, (mix,)),
        ],
    )


BATCH = 6
SHAPES = {
    "mlp": (5,),
    "residual": (2, 4, 4),
    "concatenated": (4,),
    "attention": (4, 3),
    "grouped": (2, 4, 4),
    "twice": (4,),
    "normed": (4, 3),
    "group_normed": (2, 4, 4),
    "routed": (4, 3),
    "picked": (4, 4),
}
NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "residual": Residual,
    "concatenated": Concatenated,
    "attention": Attention,
    "grouped": Grouped,
    "twice": Twice,
    "normed": Normed,
    "group_normed": GroupNormed,
    "routed": Routed,
    "picked": Picked,
}


@lru_cache
def structure_of(net: str) -> Structure:
    """By hand for the first three; by the tracer for the others. It depends on names and shapes only."""
    if net == "mlp":
        return mlp_structure(Mlp(), BATCH)
    if net == "residual":
        return residual_structure(Residual(), BATCH)
    if net == "concatenated":
        return concatenated_structure(Concatenated(), BATCH)
    return analyse(NETS[net](), (torch.randn(BATCH, *SHAPES[net]),))


def make(
    net: str, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Structure, Tensor, Tensor]:
    """A net by name with its structure, a batch of inputs and targets."""
    structure = structure_of(net)
    torch.manual_seed(seed)
    model = NETS[net]().to(dtype).train()
    x = torch.randn(BATCH, *SHAPES[net], dtype=dtype)
    return model, structure, x, torch.randint(2, (BATCH,))
