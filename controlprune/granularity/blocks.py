"""Tiles of R × C weights of a linear layer, a unit each: zero in place while training, gone when finalized.

Masks are those of single weights, constant over a tile (plant/entries.py); a unit's norm is Σ w² over its
tile, its gate Σ w ∂w, what RigL asks of it ‖∂w‖. What is finalized has a `BlockLinear` in the place of every
layer with tiles off (plant/block_linear.py), the optimizer's state with it: forward and backward skip what is
off, on a CPU too. Wide tiles run well (64x32), small ones do not.

A layer has tiles if it is an `nn.Linear`, they divide it, and nothing but its own forward reads its weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..plant.base import Kind, named_tensors
from ..plant.block_linear import BlockLinear, panels, tiles, to_blocks
from ..plant.entries import EntryPlant
from ..plant.place import Place
from ..structure.groups import Group, Structure
from .entries import STEPS
from .weights import Weights

__all__ = ["Blocks"]

FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # they read the weights of layers inside


class Blocks(Weights):
    """granularity="block:RxC"."""

    def __init__(self, rows: int, columns: int) -> None:
        if rows < 1 or columns < 1:
            raise ValueError(f'granularity="block:{rows}x{columns}": give block:RxC with R, C >= 1')
        self.rows, self.columns = rows, columns

    def __str__(self) -> str:
        return f'"block:{self.rows}x{self.columns}"'

    def why_not(self, name: str, shape: torch.Size, model: nn.Module, traced: Structure) -> str:
        path = name.rpartition(".")[0]
        if type(model.get_submodule(path)) is not nn.Linear:
            return "it is no nn.Linear's"
        within = (model.get_submodule(path[:n]) for n in range(len(path)) if path[n] == "." or n == 0)
        if any(isinstance(module, FUSED) for module in within) or any(
            name in work.weights and work.where != path for work in traced.work
        ):
            return "it is also read outside of its layer"
        if shape[0] % self.rows or shape[1] % self.columns:
            return f"its {shape[0]} x {shape[1]} is no multiple of {self.rows} x {self.columns}"
        return ""

    def group(self, name: str, size: int) -> Group:
        count = size // (self.rows * self.columns)
        return Group(name, count, "block", (), step=max(1, count // STEPS))

    def laid_on(self, model: nn.Module, optimizer: Optimizer | None, structure: Structure) -> EntryPlant:
        return BlockPlant(model, optimizer, structure, self.rows, self.columns)


class BlockPlant(EntryPlant):
    """Masks that are constant over tiles of `rows` × `columns`."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, structure: Structure, rows: int, columns: int
    ) -> None:
        super().__init__(model, optimizer, structure)
        self.rows, self.columns = rows, columns

    def _entries(self, place: Place, mask: Tensor) -> Tensor:
        whole = mask.new_empty(place.parameter.shape)
        self._tiles(whole).copy_(self._live(place, mask)[:, :, None, None])
        return whole

    def _units(self, place: Place, entries: Tensor) -> Tensor:
        return self._tiles(entries).sum((2, 3)).flatten()

    def _on(self, place: Place, entries: Tensor) -> Tensor:
        return self._tiles(entries)[:, :, 0, 0].flatten()

    def _row(self, place: Place, seen: Tensor, kind: Kind) -> Tensor:
        if kind == "entry":  # their signs say nothing of the tile
            return self._units(place, seen.float().square()).sqrt()
        return self._units(place, seen)

    def _tiles(self, entries: Tensor) -> Tensor:
        return tiles(entries, self.rows, self.columns)

    def _live(self, place: Place, mask: Tensor) -> Tensor:
        return mask.view(place.parameter.shape[0] // self.rows, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Those of layers in blocks as they were: dense, with zeros."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        blocks = {f"{n}.weight" if n else "weight": m for n, m in modules.items() if type(m) is BlockLinear}
        return {
            name: blocks[name].dense_weight() if name in blocks else tensor
            for name, tensor in named_tensors(self.model).items()
        }

    @torch.no_grad()
    def harden(self) -> None:
        """Layers with tiles off become `BlockLinear`, in place."""
        masks = self.masks
        super().harden()
        modules = dict(self.model.named_modules())
        for place, mask in zip(self._places, masks, strict=True):
            if not mask.all():
                live = self._live(place, mask)
                self._carry_state(place, live)
                layer = modules[place.group.name.rpartition(".")[0]]
                assert isinstance(layer, nn.Linear)
                to_blocks(layer, live)

    def _carry_state(self, place: Place, live: Tensor) -> None:
        """The optimizer's, where it is one number a weight; any other begins anew."""
        if self.optimizer is None or place.parameter not in self.optimizer.state:
            return
        entries, shape = self.optimizer.state[place.parameter], place.parameter.shape
        known = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        if all(value.shape == shape or value.numel() == 1 for value in known.values()):
            for key, value in known.items():
                if value.shape == shape:
                    entries[key] = panels(value, live.to(value.device))
        else:
            for key in list(entries):
                del entries[key]
