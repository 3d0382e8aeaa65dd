"""nn.MultiheadAttention without some of its heads, and of another width around them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from controlprune.plant.plant import Plant
from controlprune.state.widths import narrow, record
from controlprune.structure import analyse
from controlprune.structure.groups import widths_of
from controlprune.structure.heads import OwnHeads
from controlprune.structure.standins import StandIn, restore, stand_in

B, L, S, E, H = 2, 5, 6, 12, 4
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
PADDED = torch.arange(S)[None] >= torch.tensor([[S], [4]])
SOME = (
    torch.rand(L, S, generator=torch.Generator().manual_seed(0)).index_fill(1, torch.tensor([0]), 0.0) > 0.7
)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"attn_mask": CAUSAL},
    "causal, hinted": {"attn_mask": CAUSAL, "is_causal": True},
    "bool": {"attn_mask": CAUSAL.isinf()},
    "per head": {"attn_mask": torch.randn(B * H, L, S, generator=torch.Generator().manual_seed(0))},
    "padded": {"key_padding_mask": PADDED},
    "both": {"key_padding_mask": PADDED, "attn_mask": SOME},
}
MADE: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "sequence first": {},
    "no bias": {"bias": False, "batch_first": True},
    "widths of their own": {"kdim": 7, "vdim": 4, "batch_first": True},
}


def inputs(module: nn.MultiheadAttention, keys: int, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(B, L, E)
    if same:
        found = (query,) * 3
    else:
        found = query, torch.randn(B, keys, module.kdim), torch.randn(B, keys, module.vdim)
    if module.batch_first:
        return found
    moved = {id(x): x.transpose(0, 1) for x in found}
    return moved[id(found[0])], moved[id(found[1])], moved[id(found[2])]


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_with_all_heads_it_is_torchs(made: str, mask: str, weights: dict[str, bool]) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, **MADE[made])
    twin = copy.deepcopy(module)
    stand_in(twin, OwnHeads)
    square = "causal" in mask or mask == "bool"
    given = inputs(module, L if square else S, same=square and "widths" not in made)
    for mine, its in zip(
        twin(*given, **MASKS[mask], **weights), module(*given, **MASKS[mask], **weights), strict=True
    ):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_example_without_a_batch(batch_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, batch_first=batch_first)
    twin = copy.deepcopy(module)
    stand_in(twin, OwnHeads)
    x, padded = torch.randn(S, E), PADDED[1]
    for mine, its in zip(
        twin(x, x, x, key_padding_mask=padded), module(x, x, x, key_padding_mask=padded), strict=True
    ):
        torch.testing.assert_close(mine, its)
    with pytest.raises(RuntimeError, match="attn_mask"):
        twin(x, x, x, is_causal=True)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 20, dropout=0.0, batch_first=True)
        self.enter, self.encoder, self.out = nn.Linear(5, E), nn.TransformerEncoder(layer, 2), nn.Linear(E, 3)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        return self.out(self.encoder(self.enter(x), src_key_padding_mask=padded))


class Decoder(nn.Module):
    """Encoder and decoder: attention to another sequence, causal masks, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(5, E), nn.Linear(E, 3)
        self.both = nn.Transformer(E, H, 1, 1, 20, dropout=0.0, norm_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = self.both.generate_square_subsequent_mask(len(y))
        x, y = self.enter(x), self.enter(y)
        return self.out(self.both(x, y, tgt_mask=mask, tgt_is_causal=True))


def shrunk(model: nn.Module, given: tuple[Tensor, ...]) -> tuple[Plant, list[Tensor]]:
    plant = Plant(model, None, analyse(model, given))
    masks = [torch.arange(n) % 3 != 1 for n in plant.structure.sizes]
    plant.apply(masks, compact=True)
    return plant, masks


@pytest.mark.parametrize("kind", [Encoder, Decoder])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_heads_and_width_go_and_come_back(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    given = (torch.randn(2, L, 5, dtype=torch.float64),) * (1 if kind is Encoder else 2)
    with torch.no_grad():
        dense = model(*given)
        plant, masks = shrunk(model, given)
        sizes = plant.structure.sizes
        assert sizes.count(E) == 1
        assert sizes.count(H) >= 2
        small = model(*given)
        plant.apply(masks, compact=False)
        torch.testing.assert_close(model(*given), small)
        plant.release()
        assert torch.equal(model(*given), dense)
    assert not any(isinstance(module, StandIn) for module in model.modules())


def test_padding_takes_the_plain_path_in_every_layout() -> None:
    """torch would make nested tensors of padded inputs, which only its fused layer takes."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, S, 5)
    plant, masks = shrunk(model, (x, PADDED))
    with torch.no_grad():
        small = model(x, PADDED)
        plant.apply(masks, compact=False)
        masked = model(x, PADDED)
    torch.testing.assert_close(masked[~PADDED], small[~PADDED])


def test_finalized_it_is_copied_pickled_exported_and_traced_anew() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, L, 5)
    plant, _ = shrunk(model, (x,))
    plant.harden()
    small = model(x)
    assert torch.equal(copy.deepcopy(model)(x), small)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), small)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), small)
    again, _ = shrunk(model, (x,))
    assert again.structure.sizes.count(3) == 2  # of four heads
    again.release()
    torch.testing.assert_close(model(x), small)


def test_a_record_of_widths_makes_another_as_small() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, L, 5)
    plant, _ = shrunk(model, (x,))
    other = Encoder().eval()
    narrow(other, record(plant.structure, widths_of(plant.masks)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter uses what torch deprecates
def test_to_onnx() -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, L, 5)
    shrunk(model, (x,))[0].harden()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


def test_restore_gives_torchs_class_back() -> None:
    module = nn.MultiheadAttention(E, H)
    stand_in(module, OwnHeads)
    restore(module, OwnHeads)
    assert type(module) is nn.MultiheadAttention
