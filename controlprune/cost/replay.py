"""How a forward pass is run while it is timed: as it is, or as a CUDA graph, where it is deployed so.

A graph is launched in one go: what the host takes for launching each kernel, most of the time of a small net,
is gone. Inputs and weights stay where they are::

    warm-up    WARM forwards on the stream of the capture: handles, workspaces, kernels that are tuned once
    capture    one more, recorded and not run; other threads (a loader that pins memory, nccl) go on
    replay     on the stream at hand, as often as one likes

Graphs of one `Replays` share their memory, as nobody reads what they write; it is not for another once all of
them are gone. What modules kept of the warm-up (a cache of theirs) lives as long as the graph that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import nn

from ..structure.record import ExampleInputs, call_model
from .clock import Run

__all__ = ["WARM", "Forward", "NotCaptured", "forward_on"]

Forward: TypeAlias = Callable[[nn.Module, ExampleInputs], Run]
Kept: TypeAlias = list[dict[str, object]]  # of every module
WARM = 3


class NotCaptured(ValueError):
    """The forward does what no graph can hold."""


def forward_on(device: torch.device, *, cuda_graph: bool) -> Forward:
    """From a model and its inputs to what is timed of them."""
    return Replays(device) if cuda_graph else lambda model, inputs: partial(call_model, model, inputs)


class Replays:
    """Forwards as CUDA graphs, each captured when it is first run."""

    def __init__(self, device: torch.device) -> None:
        if not has_graphs(device):
            raise ValueError(
                f"instruments=Instruments(cuda_graph=True): the model is on {str(device)!r}, which has no "
                "CUDA graphs; move it to a CUDA device before attaching, or leave cuda_graph out"
            )
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, model: nn.Module, inputs: ExampleInputs) -> Run:
        captured = cache(partial(self._captured, model, inputs))
        return lambda: captured()[0].replay()

    def _captured(self, model: nn.Module, inputs: ExampleInputs) -> tuple[torch.cuda.CUDAGraph, Kept]:
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM):
                call_model(model, inputs)
            kept = [{**vars(module), **module._buffers} for module in model.modules()]
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    call_model(model, inputs)
            except RuntimeError as error:
                raise NotCaptured(
                    "instruments=Instruments(cuda_graph=True): the forward pass cannot be captured as a CUDA "
                    f"graph ({error.__context__ or error}): it may read a value or a shape off the device, "
                    "or copy from the host; make it static, or leave cuda_graph out"
                ) from error
        outside.wait_stream(self._stream)
        return graph, kept


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"
