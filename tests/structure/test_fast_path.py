"""torch's fused kernels for attention in eval mode see masked and shrunk weights as the plain code does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from controlprune.plant.plant import Plant
from controlprune.structure import analyse

from .agreement import random_masks


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.up = nn.MultiheadAttention(12, 4, batch_first=True), nn.Linear(12, 9)
        self.out = nn.Linear(9, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.attend(x, x, x, need_weights=False)[0]).relu())


def encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


FUSED = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused kernel ran."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> None:
        kernel = getattr(torch, name)

        def run(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return kernel(*args, **kwargs)

        monkeypatch.setattr(torch, name, run)

    for name in FUSED:
        counting(name)
    return calls


@pytest.mark.parametrize(
    ("factory", "kernel", "runs", "sizes"),
    [
        (encoder, FUSED[0], 2, (4, 20, 4, 20)),
        (lambda: encoder(norm_first=True), FUSED[0], 2, (4, 20, 4, 20)),
        (Attends, FUSED[1], 1, (4, 12, 9)),
    ],
    ids=["encoder", "encoder_prenorm", "attention"],
)
def test_fused_is_plain_while_masked_and_off_while_heads_are_away(
    factory: Callable[[], nn.Module], kernel: str, runs: int, sizes: tuple[int, ...], fused: Counter[str]
) -> None:
    torch.manual_seed(0)
    model, x = factory().eval(), torch.randn(3, 5, 12)
    structure = analyse(model, (x,))
    assert structure.sizes == sizes
    assert not fused  # the trace and the check look at the plain operators
    plant = Plant(model, None, structure)
    with torch.no_grad():
        dense = model(x)
        for seed in range(3):
            outputs = []
            for compact in (False, True):
                masks = random_masks(structure, seed)
                heads = torch.arange(4) < (3 if seed else 4)
                masks = [heads if len(mask) == 4 else mask for mask in masks]
                plant.apply(masks, compact=compact)
                fused.clear()
                outputs.append(model(x))
                assert fused[kernel] == (0 if compact and seed else runs)
            with torch.enable_grad():
                outputs.append(model(x))  # parameters want gradients: the plain code runs
            assert fused[kernel] == (0 if seed else runs)
            assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
            assert torch.allclose(outputs[1], outputs[2], atol=1e-5)
            assert not torch.allclose(outputs[0], dense, atol=1e-3)
        plant.release()
        assert torch.equal(model(x), dense)
