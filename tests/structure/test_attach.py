"""Analysing changes nothing, errors say what to do, large and memory-less models are found."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlprune.structure import analyse, find_groups, require_groups, without
from controlprune.structure.extents import groups_in

from .agreement import disagreement
from .models.attention import GroupedQuery


class Stateful(nn.Module):
    """Everything that must come back: modes, buffers, random state, plain attributes, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.first.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.width, self.seen, self.log = 8, 0, []
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.log.append(self.seen)
        self.cache = x
        y = F.dropout(self.norm(self.first(x)), 0.5, self.training)
        return self.out(y + torch.zeros(self.width)[:, None, None])


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "ids": [id(p) for p in model.parameters()],
        "pointers": [p.data_ptr() for p in model.parameters()],
        "keys": list(model.state_dict()),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": {k: copy.copy(v) for k, v in vars(model).items() if not k.startswith("_")},
        "types": {k: type(v) for k, v in vars(model).items()},
    }


def test_nothing_is_changed():
    model, x = Stateful().train(), torch.randn(2, 3, 6, 6)
    before, values = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    fastpath, threads = torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()
    analyse(model, (x,))
    assert snapshot(model) == before
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert (fastpath, threads) == (torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads())
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_inputs_are_not_written_on():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
            cache.append(x)
            return self.out(self.first(x.mul_(2)).relu())

    x, cache = torch.ones(3, 4), []
    analyse(Writes(), (x, cache))
    assert torch.equal(x, torch.ones(3, 4))
    assert cache == []


def test_nothing_is_kept():
    """No tensor of the trace outlives it."""

    def hidden() -> list[Tensor]:
        """Of the shape that only the hidden layer's output has here."""
        gc.collect()
        return [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (3, 8)]

    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    before = hidden()
    analyse(model, (x,))
    assert not [t for t in hidden() if not any(t is other for other in before)]


@pytest.mark.parametrize("inputs", [(torch.randn(3, 5),), {"y": torch.randn(3, 4)}, torch.randn(3, 5), ()])
def test_inputs_that_do_not_fit(inputs: object):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="example_inputs do not fit the model: its forward raised"):
        analyse(model, inputs)  # type: ignore[arg-type]
    assert snapshot(model) == before


def test_a_model_without_groups():
    model = nn.Linear(4, 2)
    structure = analyse(model, torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"nothing in this model can be pruned:\n.*an output of the model"):
        require_groups(structure)


def test_ignored_layers():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)), torch.randn(3, 4)
    assert [g.size for g in find_groups(model, x)] == [8, 6]
    assert [g.size for g in find_groups(model, x, ignored_layers=[model[0]])] == [6]
    assert [g.size for g in find_groups(model, x, ignored_layers=["2"])] == [8]
    with pytest.raises(ValueError, match="ignored_layers: the model has no module called 'three'"):
        find_groups(model, x, ignored_layers=["three"])
    with pytest.raises(ValueError, match="ignored_layers: Linear is not a module of the model"):
        find_groups(model, x, ignored_layers=[nn.Linear(2, 2)])


def test_the_output_is_never_a_group():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), torch.randn(3, 4)
    groups = find_groups(model, x)
    assert [g.name for g in groups] == ["0"]


@dataclass
class Answer:
    logits: Tensor
    extra: dict[str, list[Tensor]]


class Keywords(nn.Module):
    """Keyword inputs, control flow on data, a dataclass of dicts of lists as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out, self.side = (
            nn.Linear(4, 8),
            nn.Linear(4, 8),
            nn.Linear(8, 2),
            nn.Linear(8, 3),
        )

    def forward(self, *, x: Tensor, flip: bool = False) -> Answer:
        hidden = self.a(x) if float(x.sum()) > 1e9 or flip else self.b(x)
        return Answer(self.out(hidden.relu()), {"side": [self.side(hidden)]})


def test_keywords_and_dataclasses():
    model = Keywords()
    structure = analyse(model, {"x": torch.randn(3, 4), "flip": True})
    assert [(g.name, g.size) for g in structure.groups] == [("a", 8)]
    assert {r.name for r in structure.refused} == {"b", "out", "side"}
    other = analyse(model, {"x": torch.randn(3, 4)})
    assert [(g.name, g.size) for g in other.groups] == [("b", 8)]


def test_refused_groups_become_fixed():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)), torch.randn(3, 4)
    structure = analyse(model, x)
    rest = without(structure, {0: "as a test"})
    assert rest.names == ("1",)
    assert rest.refused[-1].reason == "as a test"
    assert rest.tensors["1.weight"] == (
        structure.tensors["2.weight"][1].__class__(0, 6),
        rest.tensors["1.weight"][1],
    )
    assert not groups_in(rest.tensors["0.weight"][0])
    assert {a.module for a in rest.attributes} == {"1", "2"}
    assert disagreement(model, (x,), rest) < 1e-6


def test_meta_tensors_are_not_checked():
    with torch.device("meta"):
        model = GroupedQuery(True)
    structure = analyse(model, (torch.randn(2, 5, 10),))
    assert sorted(structure.sizes) == [2, 2]
    assert not structure.verified


def test_seven_billion_parameters_without_memory():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    structure = analyse(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
    assert sorted(set(structure.sizes)) == [4, 8, 4096, 11008]
    assert len(structure.groups) == 97


def test_layer_scale_does_not_hide_an_error():
    """A branch scaled by 1e-6 would agree whatever it computes: the check looks past the scale."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.scale = (
                nn.Linear(4, 8),
                nn.Linear(8, 4),
                nn.Parameter(torch.full((4,), 1e-9)),
            )

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x)
            return x + self.scale * self.down(hidden * (9 - hidden.shape[-1]))  # the width enters the values

    refused = {r.name: r.reason for r in analyse(Scaled(), (torch.randn(3, 4),)).refused}
    assert "masked and shrunk outputs differ" in refused["up"]


def test_weights_that_a_mode_merges_come_back():
    """LoRA as its authors wrote it: eval mode adds the update to the weight, in place."""

    class Merges(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(8, 2))
            self.merged = False

        def train(self, mode: bool = True) -> Merges:
            super().train(mode)
            if mode == self.merged:
                self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
                self.merged = not mode
            return self

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.merged else y + x @ self.a.T @ self.b.T

    model, x = nn.Sequential(Merges(), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    analyse(model, (x,))
    assert not model[0].merged
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
