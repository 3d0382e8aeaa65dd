"""A controller in Accelerate's own checkpoints.

    model, optimizer = accelerator.prepare(model, optimizer)      attach before or after
    controller = cp.attach(model, optimizer, …)
    register(accelerator, controller)

    accelerator.save_state(folder)                                controlprune.pt is there too
    accelerator.load_state(folder)                                in a new process, attached anew

`accelerator.register_for_checkpointing(controller)` keeps the controller as well, but Accelerate loads such
objects last, when the weights have met a model of other widths already; this loads it first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..loop.controller import Controller
from ..state.files import replacing

__all__ = ["register"]

FILE = "controlprune.pt"


def register(accelerator: Accelerator, controller: Controller) -> None:
    """`save_state` and `load_state` of this accelerator take the controller along from here on."""

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if controller.live:
            controller.sync()
            if accelerator.is_main_process:
                with replacing(Path(folder) / FILE) as part:
                    torch.save(controller.state_dict(), part)

    def load(models: list[Any], folder: str) -> None:
        file = Path(folder) / FILE
        if controller.live and file.is_file():
            controller.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
