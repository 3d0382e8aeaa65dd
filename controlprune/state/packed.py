"""The controller for `torch.distributed.checkpoint`: one entry of bytes.

That module fills tensors which are there already, by name and shape; a controller's state has other names and
shapes after every shrink. Packed (`torch.save`, read back with `weights_only=True`) it is one entry, whatever
it holds::

    dcp.save({"controller": cp.Packed(controller), "model": …, "optimizer": …}, checkpoint_id=path)

    dcp.load({"controller": cp.Packed(controller)}, checkpoint_id=path)      first: the model takes the saved
    dcp.load({"model": …, "optimizer": …}, checkpoint_id=path)               widths, then its tensors fit

Among replicas call `controller.sync()` on every rank before saving.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..plant.base import BasePlant

__all__ = ["Packed"]

ENTRY = "packed"


class Stateful(Protocol):
    @property
    def plant(self) -> BasePlant: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Packed:
    """`state_dict` and `load_state_dict` of a controller, in bytes."""

    def __init__(self, controller: Stateful) -> None:
        self.controller = controller

    @property
    def _entry(self) -> str:
        """One for all replicas, one for each rank that holds a part of sharded parameters."""
        return f"{ENTRY} {self.controller.plant.place}".strip()

    def state_dict(self) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(self.controller.state_dict(), file)
        return {self._entry: file.getvalue()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        content = state.get(self._entry) if isinstance(state, Mapping) else None
        if not isinstance(content, bytes):
            raise ValueError("state_dict: this is not what Packed(controller) saved")
        try:
            unpacked = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception as error:  # torch names no type for what is wrong with a file
            raise ValueError(f"state_dict: it is corrupt, torch cannot read it ({error})") from error
        self.controller.load_state_dict(unpacked)
