"""The finalized model elsewhere, outputs equal: both ONNX exporters, torch.export, TorchScript."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from rig import batch, rig
from torch import nn

import controlprune as cp


@pytest.fixture(scope="module", params=["mlp", "residual"])
def small(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    run = rig(request.param, total_steps=40)
    run.train(0, 40)
    return run.controller.finalize().eval(), batch(0, run.shape)[0]


def session(model: nn.Module, x: torch.Tensor, path: Path, dynamo: bool) -> ort.InferenceSession:
    torch.onnx.export(model, (x,), str(path), dynamo=dynamo, input_names=["x"], verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_computes_the_same_in_onnx_runtime(
    small: tuple[nn.Module, torch.Tensor], dynamo: bool, tmp_path: Path
) -> None:
    model, x = small
    if dynamo:
        pytest.importorskip("onnxscript")
    found: Any = session(model, x, tmp_path / "small.onnx", dynamo).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found[0], model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_export_and_torchscript_compute_the_same(small: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = small
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cut_to_a_fifth_is_faster_in_onnx_runtime(tmp_path: Path) -> None:
    """Interleaved, medians of process CPU time: far from the bound on any machine."""

    def net(width: int) -> nn.Module:
        inner = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*inner, nn.Linear(width, 8))

    model, x = net(512), torch.randn(64, 64)
    dense = session(model.eval(), x, tmp_path / "dense.onnx", dynamo=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = cp.attach(
        model, optimizer, budget=cp.Budget(flops=0.2), example_inputs=(x,), total_steps=10,
        policy=cp.Control(start="budget"),
    )  # fmt: skip
    small = session(controller.finalize().eval(), x, tmp_path / "small.onnx", dynamo=False)
    times: dict[str, list[float]] = {"dense": [], "small": []}
    for _ in range(40):
        for name, one in (("dense", dense), ("small", small)):
            began = time.process_time()
            one.run(None, {"x": x.numpy()})
            times[name].append(time.process_time() - began)
    assert np.median(times["small"]) < 0.6 * np.median(times["dense"])
