"""The probe sees what a dense masked model would, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from rig import assert_same_bits, batch, bits, rig
from torch import nn

from controlprune.saliency.last_batch import Batch, Recorder
from controlprune.saliency.probe import probe


def recorded(model: nn.Module, shape: tuple[int, ...]) -> Batch:
    recorder = Recorder(model)
    recorder.arm()
    x, y = batch(0, shape)
    nn.functional.cross_entropy(model(x), y).backward()
    found = recorder.take()
    assert found is not None
    return found


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_it_is_the_gradient_of_the_uncut_masked_model(net: str, compact: bool) -> None:
    """Against explicit gates of zero on a dense copy with all its weights, by autograd."""
    run = rig(net)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gated = copy.deepcopy(run.model)
    masks = {g.name: torch.arange(g.size) % 3 > 0 for g in run.controller.groups}
    run.controller.set_masks(masks)
    if compact:
        run.controller.shrink()
    data = recorded(run.model, run.shape)
    found = probe(run.controller.plant, data)

    gates = [masks[g.name].float().requires_grad_() for g in run.controller.groups]
    for group, gate in zip(run.controller.groups, gates, strict=True):
        for part in group.readers:
            module = gated.get_submodule(part.tensor.rpartition(".")[0])

            def multiply(module, inputs, gate=gate):  # type: ignore[no-untyped-def]
                (x,) = inputs
                spread = gate.repeat_interleave(x.shape[1] // len(gate))
                return (x * spread.reshape(1, -1, *[1] * (x.ndim - 2)),)

            module.register_forward_pre_hook(multiply)
    x, y = batch(0, run.shape)
    nn.functional.cross_entropy(gated(x), y).backward()
    expected = torch.cat([gate.grad for gate in gates if gate.grad is not None])
    assert (expected != 0).float().mean() > 0.9  # but for a dead unit or so
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_it_leaves_no_trace(compact: bool) -> None:
    run = rig("residual", total_steps=60)
    run.train(0, 30)
    if compact:
        run.controller.shrink()
    data = recorded(run.model, run.shape)
    sizes = [vars(m).get("in_channels") for m in run.model.modules()]
    before, state = bits(run.model, run.optimizer), torch.get_rng_state()
    probe(run.controller.plant, data)
    assert_same_bits(before, bits(run.model, run.optimizer))
    assert [vars(m).get("in_channels") for m in run.model.modules()] == sizes
    assert torch.equal(torch.get_rng_state(), state)
    assert run.controller.plant.compact == compact
    run.model(batch(1, run.shape)[0])


def test_sizes_are_put_back_after_an_error() -> None:
    run = rig("residual", total_steps=60)
    run.train(0, 30)
    run.controller.shrink()
    data = recorded(run.model, run.shape)
    before = bits(run.model)
    data.args = (torch.zeros(2, 3, 4, 4),)
    with pytest.raises(RuntimeError):
        probe(run.controller.plant, data)
    assert_same_bits(before, bits(run.model))
    run.model(batch(1, run.shape)[0])
