"""The run on a TensorBoard: every number of `controller.metrics()`, and the heat map of activity as an image.

writer = SummaryWriter()
controller.on_update(ToTensorBoard(writer))
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from ..loop.controller import Controller
from ..loop.history import History

__all__ = ["ToTensorBoard", "heat_map"]


class ToTensorBoard:
    """A listener: scalars at every update, the image at every `image_every`-th and at the end."""

    def __init__(self, writer: SummaryWriter, tag: str = "prune", image_every: int = 20) -> None:
        self.writer, self.tag, self.image_every = writer, tag, image_every
        self._updates = 0

    def __call__(self, controller: Controller) -> Any:
        history = controller.history
        step = history[-1].step
        for name, value in controller.metrics().items():
            self.writer.add_scalar(f"{self.tag}/{name}", value, step)
        if self._updates % self.image_every == 0 or "finalize" in history[-1].event.split(","):
            self.writer.add_image(f"{self.tag}/active", heat_map(history), step, dataformats="HW")
        self._updates += 1


def heat_map(history: History, pixels: int = 8) -> NDArray[np.uint8]:
    """Grey: the share of each group's units that is on; groups downwards, updates to the right."""
    active = np.array([row.active for row in history], dtype=float).T / np.array(history.sizes)[:, None]
    return np.repeat(np.rint(255 * active).astype(np.uint8), pixels, axis=0)
