"""A module belongs to a stand-in while units are away, and to its own class again; copies keep computing."""

from __future__ import annotations

import copy
import io

import oracle
import pytest
import torch
from torch import Tensor, nn

from controlprune.plant.plant import Plant
from controlprune.structure import analyse
from controlprune.structure.standins import CountsLive, StandIn

INSIDE = {"normed": ["first", "second", "last"], "routed": ["router"], "picked": ["router"]}


def masked(net: str) -> tuple[Plant, Tensor]:
    model, structure, x, _ = oracle.make(net, 0)
    plant = Plant(model, None, structure)
    plant.apply([torch.arange(n) % 3 != 1 for n in structure.sizes], compact=False)
    return plant, x


def stand_ins(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, StandIn)]


def test_norms_over_what_is_masked_count_what_is_live() -> None:
    plant, _ = masked("group_normed")
    assert stand_ins(plant.model) == ["members", "whole"]
    plant.apply([torch.tensor([True, False]), *(torch.ones(n) > 0 for n in (3, 5, 4))], compact=False)
    assert not stand_ins(plant.model), "whole groups have statistics of their own"


@pytest.mark.parametrize("net", ["normed", "routed", "picked"])
@pytest.mark.parametrize("way", ["compact", "release", "harden"])
def test_own_classes_and_attributes_come_back(net: str, way: str) -> None:
    model, structure, _, _ = oracle.make(net, 0)
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    plant = Plant(model, None, structure)
    plant.apply([torch.arange(n) > 0 for n in structure.sizes], compact=False)
    assert stand_ins(model) == INSIDE[net]
    names = {name: type(model.get_submodule(name)).__name__ for name in INSIDE[net]}
    assert names == {name: before[name][0].__name__ for name in INSIDE[net]}
    keys = list(model.state_dict())
    if way == "compact":
        plant.apply(plant.masks, compact=True)
    else:
        getattr(plant, way)()
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("net", ["normed", "routed", "picked"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_what_the_masked_model_does_and_stays_when_that_changes(net: str, way: str) -> None:
    plant, x = masked(net)
    y = plant.model(x)
    if way == "deepcopy":
        twin = copy.deepcopy(plant.model)
    else:
        file = io.BytesIO()
        torch.save(plant.model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert stand_ins(twin) == stand_ins(plant.model) != []
    plant.release()
    assert torch.equal(twin(x), y)
    assert not torch.allclose(plant.model(x), y)


def test_a_plant_on_a_copy_of_a_masked_model_gives_the_copy_its_own_classes_back() -> None:
    plant, _ = masked("normed")
    other = Plant(copy.deepcopy(plant.model), None, plant.structure)
    other.apply(plant.masks, compact=True)
    assert not stand_ins(other.model)


@pytest.mark.parametrize("net", ["normed", "routed", "picked"])
def test_masks_compile_once_and_are_never_missed(net: str) -> None:
    plant, x = masked(net)
    plant.release()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(plant.model, backend=backend)
    compiled(x)
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        masks = [torch.rand(n, generator=random) < 0.6 for n in plant.structure.sizes]
        plant.apply([m | (torch.arange(len(m)) < 2) for m in masks], compact=False)
        torch.testing.assert_close(compiled(x), plant.model(x))
    assert len(graphs) == 2  # dense, and counting


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fused_encoder_layer_does_not_go_past_a_norm_that_counts(norm_first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.out = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.encoder(x))

    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(3, 5, 12)
    structure = analyse(model, (x,))
    plant = Plant(model, None, structure)
    masks = [torch.arange(n) < n - 2 for n in structure.sizes]
    plant.apply(masks, compact=False)
    counts = any(isinstance(module, CountsLive) for module in model.modules())
    assert counts == (12 in structure.sizes)
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x))
    plant.release()
    assert not stand_ins(model)
