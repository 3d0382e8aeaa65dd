"""The plant: layouts, gate gradients, what stays at rest, what is refused, what is left behind."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from controlprune.plant.plant import Plant
from controlprune.structure import Structure, analyse

NETS = ("mlp", "residual", "concatenated")


def half(structure: Structure, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(n, generator=generator) > 0.5 for n in structure.sizes]
    for mask in masks:
        mask[0], mask[-1] = True, False
    return masks


def backward(model: nn.Module, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), y) * scale
    loss.backward()
    return loss


def gate_gradients(plant: Plant) -> list[Tensor]:
    """Per group, NaN where a unit is absent."""
    vectors = plant.gate_gradient().split(plant.structure.sizes)
    here = plant.masks if plant.compact else [torch.ones_like(m) for m in plant.masks]
    return [v.masked_fill(~m.to(v.device), torch.nan) for v, m in zip(vectors, here, strict=True)]


class Gate(nn.Module):
    """Multiplies the input of a reader by a gate per unit."""

    def __init__(self, gate: Tensor, per_unit: int) -> None:
        super().__init__()
        self.gate, self.per_unit = gate, per_unit

    def forward(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = inputs
        gate = self.gate.repeat_interleave(self.per_unit)
        return (x * gate.reshape(1, -1, *[1] * (x.ndim - 2)),)


def true_gate_gradients(
    net: str, model: nn.Module, structure: Structure, masks: Sequence[Tensor], x: Tensor, y: Tensor
) -> list[Tensor]:
    """∂L/∂g by autograd through explicit gates on the readers' inputs of a dense copy."""
    gated = copy.deepcopy(model)
    gates = [mask.to(x.dtype).requires_grad_() for mask in masks]
    readers = {
        "mlp": {"second": ([0], 1), "head": ([1], 1)},
        "residual": {"inner": ([0], 1), "head": ([0], 4), "outer": ([1], 1)},
        "concatenated": {"mix": ([0, 1], 1), "head": ([2], 1)},
    }[net]
    for name, (groups, per_unit) in readers.items():
        gate = Gate(torch.cat([gates[g] for g in groups]), per_unit)
        gated.get_submodule(name).register_forward_pre_hook(gate.forward)
    gated.zero_grad()
    backward(gated, x, y)
    found = []
    for gate in gates:
        assert gate.grad is not None
        found.append(gate.grad.float())
    return found


@pytest.mark.parametrize("net", NETS)
def test_gate_gradients_are_those_of_explicit_gates(net: str) -> None:
    """Dormant units included, over two accumulated backward passes and the user's clipping."""
    model, structure, x, y = oracle.make(net, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plant = Plant(model, optimizer, structure)
    masks = half(structure)
    dense = copy.deepcopy(model)
    for masks_now in ([torch.ones_like(m) for m in masks], masks):
        plant.apply(masks_now, compact=False)
        optimizer.zero_grad()
        expected = true_gate_gradients(net, dense, structure, masks_now, x, y)
        backward(model, x, y)
        for got, want in zip(gate_gradients(plant), expected, strict=True):
            assert want.abs().min() > 0
            torch.testing.assert_close(got, want)
        backward(model, x, y)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for got, want in zip(gate_gradients(plant), expected, strict=True):
            torch.testing.assert_close(got, want * 2 * (0.1 / float(norm)), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("net", NETS)
def test_dormant_units_are_observed_as_they_were_parked(net: str) -> None:
    """After steps with weight decay too: the rows of a dormant unit compute with their parked weights."""
    model, structure, x, y = oracle.make(net, 17)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    plant = Plant(model, optimizer, structure)
    masks = half(structure)
    plant.apply(masks, compact=False)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()
    optimizer.zero_grad()
    backward(model, x, y)
    observed = gate_gradients(plant)
    plant.release()
    for got, want in zip(observed, true_gate_gradients(net, model, structure, masks, x, y), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("looked", [True, False])
def test_discarded_gradients_are_forgotten(set_to_none: bool, looked: bool) -> None:
    model, structure, x, y = oracle.make("mlp", 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plant = Plant(model, optimizer, structure)
    plant.apply(half(structure), compact=False)
    backward(model, x, y)
    first = gate_gradients(plant)
    backward(model, x, y, scale=torch.inf)  # as a GradScaler's overflow does
    optimizer.zero_grad(set_to_none=set_to_none)
    if looked:
        assert all(bool((g == 0).all()) for g in gate_gradients(plant))
    backward(model, x, y, scale=3.0)
    for got, want in zip(gate_gradients(plant), first, strict=True):
        torch.testing.assert_close(got, 3 * want)


def test_absent_units_have_no_gate_gradient() -> None:
    model, structure, x, y = oracle.make("residual", 3)
    plant = Plant(model, torch.optim.SGD(model.parameters(), lr=0.1), structure)
    masks = half(structure)
    plant.apply(masks, compact=False)
    backward(model, x, y)
    masked = gate_gradients(plant)
    model.zero_grad()
    plant.apply(masks, compact=True)
    backward(model, x, y)
    for got, want, mask in zip(gate_gradients(plant), masked, masks, strict=True):
        assert got.isnan().equal(~mask)
        torch.testing.assert_close(got[mask], want[mask])


def test_dormant_units_are_seen_where_the_live_ones_have_no_gradient() -> None:
    """Only what is dormant hears the input; a gradient that the user zeroes is seen as zero."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
    x = torch.tensor([[0.0, 1.0]])
    plant = Plant(model, torch.optim.SGD(model.parameters(), lr=0.1), analyse(model, (torch.ones(2, 2),)))
    column = model[2].weight.detach().clone()
    plant.apply((torch.tensor([True, True, False, False]),), compact=False)
    for kept in (True, False):
        model(x).sum().backward()
        if not kept:
            model.zero_grad(set_to_none=False)
        (found,) = gate_gradients(plant)
        expected = torch.tensor([0.0, 0.0, 1.0, 2.0]) * column.sum(0) * kept
        torch.testing.assert_close(found, expected)
        model.zero_grad(set_to_none=False)


@pytest.mark.parametrize("compact", [False, True])
def test_weight_norms_are_of_the_true_weights(compact: bool) -> None:
    model, structure, _, _ = oracle.make("concatenated", 4)
    mix = dict(model.named_parameters())["mix.weight"].detach().clone()
    plant = Plant(model, None, structure)
    masks = half(structure)
    plant.apply(masks, compact=compact)
    expected = mix[masks[2]].square().sum(0).float()  # only live rows read
    torch.testing.assert_close(torch.cat(plant.weight_norms()[:2]), expected)


@pytest.mark.parametrize("net", NETS)
def test_attach_and_release_leave_no_trace(net: str) -> None:
    model, structure, x, y = oracle.make(net, 5)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    backward(model, x, y)
    optimizer.step()
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    text, keys = repr(model), list(model.__dict__)
    plant = Plant(model, optimizer, structure)
    for compact in (True, False):
        plant.apply(half(structure), compact=compact)
        plant.release()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert repr(model) == text
    assert list(model.__dict__) == keys
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_post_hooks


def test_compact_has_no_hooks_and_is_a_plain_module() -> None:
    model, structure, _, _ = oracle.make("residual", 6)
    optimizer = torch.optim.Adam(model.parameters())
    plant = Plant(model, optimizer, structure)
    masks = half(structure)
    plant.apply(masks, compact=True)
    assert not optimizer._optimizer_step_post_hooks
    assert all(not p._backward_hooks and p.is_contiguous() for p in model.parameters())
    small = oracle.small_copy(model, structure, [torch.ones(int(m.sum()), dtype=torch.bool) for m in masks])
    assert repr(small) == repr(model)
    assert f"Conv2d(2, {int(masks[0].sum())}," in repr(model)


def test_harden_keeps_the_small_model_and_its_optimizer() -> None:
    model, structure, x, y = oracle.make("mlp", 7)
    optimizer = torch.optim.Adam(model.parameters())
    parameters = list(model.parameters())
    plant = Plant(model, optimizer, structure)
    masks = half(structure)
    plant.apply(masks, compact=False)
    backward(model, x, y)
    optimizer.step()
    plant.harden()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [p.shape[0] for p in parameters[:1]] == [int(masks[0].sum())]
    optimizer.zero_grad()
    backward(model, x, y)
    optimizer.step()
    with pytest.raises(RuntimeError, match="for good"):
        plant.apply(masks, compact=False)


def test_everything_follows_the_compact_shapes_with_all_names_alive() -> None:
    """Gradients, accumulators, schedulers: the user's `loss` and `logits` outlive every change of shape."""
    model, structure, x, y = oracle.make("residual", 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    plant = Plant(model, optimizer, structure)
    alive = []
    for seed, compact in enumerate([True, True, False, True, False, False]):
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        plant.apply(half(structure, seed), compact=compact)  # gradients are still there
        for p in model.parameters():
            assert p.grad is not None
            assert p.grad.shape == p.shape
        optimizer.step()  # a second step on the gradients that remain
        optimizer.zero_grad()
        alive.append((loss, logits))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("by_way_of", [True, False])
def test_gradients_travel_for_live_entries_only(by_way_of: bool) -> None:
    """Through the compact layout or the masked one: what clipping sees is what a small net's would."""
    model, structure, x, y = oracle.make("mlp", 9)
    plant = Plant(model, torch.optim.SGD(model.parameters(), lr=0.1), structure)
    masks = half(structure)
    backward(model, x, y)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    plant.apply(masks, compact=by_way_of)
    small = [oracle.cut(grads[name], structure.tensors[name], masks) for name, _ in model.named_parameters()]
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(norm, nn.utils.get_total_norm(small))
    for p, want in zip(model.parameters(), small, strict=True):
        assert not by_way_of or torch.equal(p.grad if p.grad is not None else torch.empty(0), want)
    plant.release()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p)
        live = oracle.cut(grads[name], structure.tensors[name], masks)
        oracle.write_back(expected, live, structure.tensors[name], masks)
        assert torch.equal(p.grad if p.grad is not None else torch.empty(0), expected)


def test_frozen_and_missing_parameters_are_cut_too() -> None:
    model, structure, x, _ = oracle.make("concatenated", 10)
    named = dict(model.named_parameters())
    optimizer = torch.optim.Adam([p for n, p in named.items() if n.startswith("mix")])
    masks = half(structure)
    small = oracle.small_copy(model, structure, masks)
    plant = Plant(model, optimizer, structure)
    plant.apply(masks, compact=True)
    assert not named["right.weight"].requires_grad
    torch.testing.assert_close(model(x), small(x))


def test_state_that_appears_while_units_are_away_returns_as_zero() -> None:
    for compact in (False, True):
        model, structure, x, y = oracle.make("mlp", 11)
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
        plant = Plant(model, optimizer, structure)
        masks = half(structure)
        plant.apply(masks, compact=compact)
        backward(model, x, y)
        optimizer.step()
        plant.release()
        moment = optimizer.state[dict(model.named_parameters())["first.weight"]]["exp_avg"]
        assert moment.shape == (7, 5)
        assert (moment[~masks[0]] == 0).all()
        assert (moment[masks[0]] != 0).any()


def _saved(compact: bool) -> tuple[dict[str, Tensor], dict, dict, dict[str, Tensor], dict]:
    model, structure, x, y = oracle.make("residual", 12)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    plant = Plant(model, optimizer, structure)
    for masks in (half(structure, 3), half(structure, 4)):
        backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
        plant.apply(masks, compact=compact)
    backward(model, x, y)
    optimizer.step()
    saved = copy.deepcopy((plant.state_dict(), model.state_dict(), optimizer.state_dict()))
    plant.release()
    return (*saved, model.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_plant_resumes(compact: bool, optimizer_first: bool) -> None:
    plant_state, model_state, optimizer_state, dense, dense_optimizer = _saved(compact)
    model, structure, _, _ = oracle.make("residual", 99)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    if optimizer_first:
        optimizer.load_state_dict(optimizer_state)
    plant = Plant(model, optimizer, structure)
    plant.load_state_dict(plant_state)
    model.load_state_dict(model_state)
    if not optimizer_first:
        optimizer.load_state_dict(optimizer_state)
    assert plant.compact is compact
    plant.release()
    torch.testing.assert_close(model.state_dict(), dense, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), dense_optimizer, rtol=0, atol=0)


def test_a_foreign_state_changes_nothing() -> None:
    plant_state, *_ = _saved(True)
    model, structure, _, _ = oracle.make("mlp", 0)
    plant = Plant(model, None, structure)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="another model"):
        plant.load_state_dict(plant_state)
    model2, structure2, _, _ = oracle.make("residual", 0)
    plant2 = Plant(model2, None, structure2)
    broken = {k: v for k, v in plant_state.items() if k != "parked/stem.weight/"}
    with pytest.raises(ValueError, match=r"'stem\.weight' is missing"):
        plant2.load_state_dict(broken)
    short = {**plant_state, "parked/stem.weight/": plant_state["parked/stem.weight/"][1:]}
    with pytest.raises(ValueError, match=r"stem\.weight.*entries"):
        plant2.load_state_dict(short)
    assert all(bool(m.all()) for m in plant2.masks)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def _bad_masks(structure: Structure) -> list[tuple[object, type[Exception], str]]:
    on = [torch.ones(n, dtype=torch.bool) for n in structure.sizes]
    return [
        (on[:1], ValueError, "1 for 2 groups"),
        ([on[0].float(), on[1]], TypeError, r"'first' is torch\.float32"),
        ([on[0], [True] * 6], TypeError, "'second' is list"),
        ([on[0][:-1], on[1]], ValueError, r"'first' has shape \(6,\), not \(7,\)"),
        ([on[0], ~on[1]], ValueError, "'second' has no active unit"),
    ]


@pytest.mark.parametrize("which", range(5))
def test_wrong_masks_are_named_and_change_nothing(which: int) -> None:
    model, structure, _, _ = oracle.make("mlp", 13)
    plant = Plant(model, None, structure)
    masks = half(structure)
    plant.apply(masks, compact=True)
    before = copy.deepcopy(model.state_dict())
    wrong, error, message = _bad_masks(structure)[which]
    with pytest.raises(error, match=message):
        plant.apply(wrong, compact=False)  # type: ignore[arg-type]
    assert plant.compact
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Odd(torch.optim.SGD):
    """Keeps something flat, as some third-party optimizers do."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["flat"] = torch.zeros(p.numel())


def test_unknown_optimizer_state_is_refused_before_anything_changes() -> None:
    model, structure, _, _ = oracle.make("mlp", 14)
    optimizer = Odd(model.parameters(), lr=0.1)
    plant = Plant(model, optimizer, structure)
    optimizer.step()
    with pytest.raises(ValueError, match=r"Odd state 'flat' of parameter 'first\.weight' has shape \(35,\)"):
        plant.apply(half(structure), compact=True)
    assert model.get_parameter("first.weight").shape == (7, 5)
    with pytest.raises(ValueError, match="Odd state 'flat'"):
        Plant(model, optimizer, structure)
    with pytest.raises(ValueError, match="LBFGS"):
        Plant(model, torch.optim.LBFGS(model.parameters()), structure)


def test_a_structure_of_another_model_is_refused() -> None:
    model, _, _, _ = oracle.make("mlp", 0)
    _, structure, _, _ = oracle.make("residual", 0)
    with pytest.raises(ValueError, match="no tensor"):
        Plant(model, None, structure)
    model.first.weight.data = torch.randn(8, 5)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"'first\.weight' has shape \(8, 5\)"):
        Plant(model, None, oracle.make("mlp", 0)[1])


def test_a_copy_is_a_plain_model_in_the_live_layout() -> None:
    model, structure, x, _ = oracle.make("residual", 15)
    optimizer: Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plant = Plant(model, optimizer, structure)
    for compact in (False, True):
        plant.apply(half(structure), compact=compact)
        other = copy.deepcopy(model)
        torch.testing.assert_close(other(x), model(x))
        assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in other.parameters())
        plant.release()
        averaged = AveragedModel(other)
        averaged.update_parameters(other)
        torch.testing.assert_close(averaged(x), other(x))


def test_channels_last_survives() -> None:
    model, structure, x, y = oracle.make("residual", 16)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    backward(model, x.contiguous(memory_format=torch.channels_last), y)
    optimizer.step()
    plant = Plant(model, optimizer, structure)
    weight = model.get_parameter("stem.weight")
    for compact in (True, False):
        plant.apply(half(structure), compact=compact)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert optimizer.state[weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    plant.release()
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_adafactor_learns_its_first_factors_while_one_unit_is_live() -> None:
    """A factor of a (1, 4) parameter has the shape of the parameter; the others tell what it sums over."""
    model, structure, x, y = oracle.make("concatenated", 18)
    optimizer = torch.optim.Adafactor(model.parameters())
    plant = Plant(model, optimizer, structure)
    plant.apply([torch.arange(n) == 2 for n in structure.sizes], compact=True)
    backward(model, x, y)
    optimizer.step()
    plant.release()
    shapes = {key: value.shape for key, value in optimizer.state[model.get_parameter("left.weight")].items()}
    assert shapes == {"step": (), "row_var": (6, 1), "col_var": (1, 4)}


def test_a_gradient_scaler_is_seen_through() -> None:
    model, structure, x, y = oracle.make("mlp", 19, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plant = Plant(model, optimizer, structure)
    plant.apply(half(structure), compact=False)
    backward(model, x, y)
    expected = gate_gradients(plant)
    optimizer.zero_grad()
    seen: list[Tensor] = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.extend(gate_gradients(plant)))
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    handle.remove()
    for got, want in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("compact", [False, True])
def test_an_average_follows_through_a_plant_of_its_own(compact: bool) -> None:
    """An EMA copy made dense is cut by `Plant(averaged.module, None, structure)` and keeps averaging."""
    model, structure, x, y = oracle.make("residual", 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    plant, average = Plant(model, optimizer, structure), Plant(averaged.module, None, structure)
    masks = half(structure)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in (plant, average):
        p.apply(masks, compact=compact)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()
        averaged.update_parameters(model)
    average.release()
    for name, p in averaged.module.named_parameters():
        alive = oracle.cut(p.detach(), structure.tensors[name], masks)
        back = start[name].clone()
        oracle.write_back(back, alive, structure.tensors[name], masks)
        assert torch.equal(back, p)  # dormant entries are those it had


def test_masks_never_recompile_and_a_shrink_does_once() -> None:
    model, structure, x, y = oracle.make("residual", 21, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    plant = Plant(model, optimizer, structure)

    def train() -> int:
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()
        torch.testing.assert_close(compiled(x), model(x))
        return counter.frame_count

    assert train() == 1
    for seed in range(3):
        plant.apply(half(structure, seed), compact=False)
        assert train() == 1
    assert all(bool((g != 0).all()) for g in gate_gradients(plant))
    plant.apply(half(structure), compact=True)
    assert train() == 2
    plant.release()
    assert train() == 2  # the dense one is still known


def test_a_resumed_plant_observes_as_the_one_that_was_saved() -> None:
    model, structure, x, y = oracle.make("mlp", 22)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    plant = Plant(model, optimizer, structure)
    plant.apply(half(structure), compact=False)
    other, _, _, _ = oracle.make("mlp", 23)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.5)
    resumed = Plant(other, other_optimizer, structure)
    resumed.load_state_dict(plant.state_dict())
    other.load_state_dict(model.state_dict())
    seen = []
    for net, opt, which in ((model, optimizer, plant), (other, other_optimizer, resumed)):
        backward(net, x, y)
        opt.step()
        opt.zero_grad()
        backward(net, x, y)
        seen.append(gate_gradients(which))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator beside the CPU")
@pytest.mark.parametrize("park_on", [None, "cpu"])
def test_parked_elsewhere(park_on: str | None) -> None:
    model, structure, x, y = oracle.make("residual", 24)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1, fused=True)
    plant = Plant(model, optimizer, structure, park_on=park_on)
    for seed, compact in enumerate([True, False, True, True, False]):
        masks = half(structure, seed)
        small = oracle.small_copy(model, structure, masks)
        plant.apply(masks, compact=compact)
        torch.testing.assert_close(model(x), small(x))
        backward(model, x, y)
        gate_gradients(plant), plant.weight_norms()
        optimizer.step()
        optimizer.zero_grad()
        plant.release()
    assert all(p.is_cuda for p in model.parameters())


class Noisy(torch.optim.Optimizer):
    """Moves every entry, whatever its gradient (Langevin dynamics, gradient centralisation and the like)."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, {})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.add_(torch.ones_like(p), alpha=0.1)


def test_whatever_the_optimizer_moves_dormant_units_stay_silent_and_parked() -> None:
    model, structure, x, _ = oracle.make("mlp", 25)
    optimizer = Noisy(list(model.parameters()))
    plant = Plant(model, optimizer, structure)
    masks = half(structure)
    dense = copy.deepcopy(model)
    plant.apply(masks, compact=False)
    optimizer.step()
    small = oracle.small_copy(dense, structure, masks)
    Noisy(list(small.parameters())).step()
    torch.testing.assert_close(model(x), small(x))
    plant.release()
    start = dict(dense.named_parameters())
    for name, p in model.named_parameters():
        oracle.write_back(
            start[name].data,
            oracle.cut(p.detach(), structure.tensors[name], masks),
            structure.tensors[name],
            masks,
        )
        assert torch.equal(p, start[name])


class Keeps(nn.Module):
    """Reads the first layer through columns that it keeps in eval mode, until its mode is set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        self.kept = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.training:
            self.kept = 2 * self.second.weight
        return nn.functional.linear(self.norm(self.first(x)).sigmoid(), self.kept, self.second.bias)


def test_what_a_module_keeps_of_its_weights_goes_with_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Keeps(), nn.Identity()).eval(), torch.randn(5, 4)
    model[0].norm.train()
    model[0].norm.momentum = 0.0
    structure = analyse(model, (x,))
    assert structure.sizes == (6,)
    plant, masks = Plant(model, None, structure), [torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)]
    modes = [module.training for module in model.modules()]
    dense = model(x)
    outputs = []
    for compact in (False, True):
        plant.apply(masks, compact=compact)
        outputs.append(model(x))
        assert [module.training for module in model.modules()] == modes
    assert torch.allclose(*outputs, atol=1e-6)
    assert not torch.allclose(outputs[0], dense)
    plant.release()
    assert torch.equal(model(x), dense)
