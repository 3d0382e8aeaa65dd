"""The loss as a function of the outputs, from what was seen of it; and a replay that leaves no trace."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from controlprune.saliency.last_batch import Recorder, identify, paired_difference, undisturbed


def net(outputs=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, outputs)
    )


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
LOSSES = {
    "cross-entropy": (lambda y, t: F.cross_entropy(y, t), "cross-entropy"),
    "cross-entropy, sum": (lambda y, t: F.cross_entropy(y, t, reduction="sum"), "cross-entropy"),
    "cross-entropy, weights": (lambda y, t: F.cross_entropy(y, t, weight=WEIGHTS), "cross-entropy"),
    "squared error": (lambda y, t: F.mse_loss(y, F.one_hot(t, 5).float()), "squared error"),
    "logistic": (lambda y, t: F.binary_cross_entropy_with_logits(y, F.one_hot(t, 5).float()), "logistic"),
    "huber-like": (lambda y, t: (y - F.one_hot(t, 5)).abs().pow(1.5).mean(), "local metric"),
}  # fmt: skip


def recorded(model, loss_of, scale=1.0):
    x, t = torch.randn(32, 6), torch.randint(5, (32,))
    recorder = Recorder(model)
    recorder.arm()
    loss = loss_of(model(x), t)
    (loss * scale).backward()
    batch = recorder.take()
    assert batch is not None
    assert not model._forward_hooks
    return batch, loss.item(), t


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_identified_and_predicts_other_outputs(name):
    loss_of, expected = LOSSES[name]
    batch, loss, t = recorded(net(), loss_of)
    found, rows = identify(batch, loss)
    assert found == expected
    step = 0.5 if expected != "local metric" else 0.01
    other = batch.outputs[0] + step * torch.randn_like(batch.outputs[0])
    rise = rows([other]).sum() - rows(batch.outputs).sum()
    true = loss_of(other, t) - loss_of(batch.outputs[0], t)
    torch.testing.assert_close(rise, true, rtol=5e-3 if expected != "local metric" else 0.3, atol=1e-4)


def test_a_scaled_loss_is_identified_in_its_own_units():
    batch, loss, _ = recorded(net(), LOSSES["cross-entropy"][0], scale=1024.0)
    name, rows = identify(batch, loss)
    assert name == "cross-entropy"
    assert rows(batch.outputs).sum().item() == pytest.approx(loss, rel=1e-3)


def test_class_axis_of_a_segmentation_and_ignored_pixels():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    x, t = torch.randn(2, 3, 5, 5), torch.randint(4, (2, 5, 5))
    t[0, 0] = -100
    recorder = Recorder(model)
    recorder.arm()
    loss = F.cross_entropy(model(x), t)
    loss.backward()
    batch = recorder.take()
    name, rows = identify(batch, loss.item())
    assert name == "cross-entropy"
    other = batch.outputs[0] + torch.randn_like(batch.outputs[0])
    torch.testing.assert_close(rows([other]).sum(), F.cross_entropy(other, t), rtol=1e-3, atol=1e-4)


def test_a_model_that_returns_its_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x, t):
            y = self.inner(x)
            return {"loss": F.cross_entropy(y, t, label_smoothing=0.1), "logits": y}

    model = Own()
    recorder = Recorder(model)
    recorder.arm()
    out = model(torch.randn(8, 6), torch.randint(5, (8,)))
    out["loss"].backward()
    name, _ = identify(recorder.take(), out["loss"].item())
    assert name == "model's own"


def test_replay_leaves_no_trace_and_pairs_exactly():
    model = net()
    batch, loss, _ = recorded(model, LOSSES["cross-entropy"][0])
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    _, rows = identify(batch, loss)
    (nothing,) = paired_difference(model, batch, rows, [nullcontext()])
    assert nothing == (0.0, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_undisturbed_restores_after_an_error():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="shapes"), undisturbed(model):
        model[1](model[0](torch.randn(4, 6))) @ torch.zeros(3, 3)
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


def test_the_recorder_ignores_evaluation():
    model, recorder = net(), None
    recorder = Recorder(model)
    recorder.arm()
    with torch.no_grad():
        model(torch.randn(4, 6))
    assert recorder.batch is None
    recorder.disarm()
    assert not model._forward_hooks
