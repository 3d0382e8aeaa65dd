"""Widths travel with the user's own state dicts; copies are plain models; foreign dicts are refused whole."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rig import QUICK, Rig, assert_same_bits, batch, bits, hooks, rig
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import controlprune as cp
from controlprune.state.resume import signed


def cut(net: str = "mlp", layout: str = "compact", optimizer: str = "adam") -> Rig:
    """A run in which units are off, in either layout."""
    run = rig(net, optimizer, total_steps=60)
    run.train(0, 25)
    assert any(not m.all() for m in run.controller.masks.values())
    if layout == "compact":
        run.controller.shrink()
    return run


def evaluated(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    mode = model.training
    model.eval()
    with torch.no_grad():
        out = model(batch(0, shape)[0])
    model.train(mode)
    return out


def widths(run: Rig) -> dict[str, int]:
    return {name: int(m.sum()) for name, m in run.controller.masks.items()}


@pytest.mark.parametrize("layout", ["masked", "compact"])
@pytest.mark.parametrize("net", ["mlp", "residual"])
def test_the_model_alone_brings_its_widths(net: str, layout: str) -> None:
    run, fresh = cut(net, layout), rig(net, seed=1)
    keys = list(fresh.model.state_dict())
    fresh.model.load_state_dict(run.model.state_dict())
    assert widths(fresh) == widths(run)
    assert fresh.controller.plant.compact == (layout == "compact")
    assert torch.equal(evaluated(fresh.model, run.shape), evaluated(run.model, run.shape))
    assert list(run.model.state_dict()) == keys
    fresh.train(0, 20)
    fresh.controller.finalize()


def test_a_dict_that_lost_its_widths_is_refused_whole() -> None:
    run, fresh = cut(), rig(seed=1)
    bare = dict(run.model.state_dict())  # what safetensors would give back
    before = bits(fresh.model, fresh.optimizer)
    with pytest.raises(ValueError, match=r"0\.weight has neither the dense shape .*controlprune\.load"):
        fresh.model.load_state_dict(bare)
    assert_same_bits(before, bits(fresh.model, fresh.optimizer))
    fresh.controller.load_state_dict(run.controller.state_dict())  # the way out that it names
    fresh.model.load_state_dict(bare)
    assert torch.equal(evaluated(fresh.model, run.shape), evaluated(run.model, run.shape))


@pytest.mark.parametrize("layout", ["masked", "compact"])
def test_a_dense_dict_brings_every_unit_back(layout: str) -> None:
    """Saved before attaching: what it says of dormant units must be read, too."""
    run = cut("residual", layout)
    dense = bits(rig("residual", seed=5).model)
    plain = OrderedDict((k.removeprefix("state "), v) for k, v in dense.items() if k.startswith("state "))
    run.model.load_state_dict(plain)
    assert all(m.all() for m in run.controller.masks.values())
    run.controller.detach()
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, plain[key])


def test_a_masked_dict_without_its_masks_keeps_the_present_ones() -> None:
    """`best = {k: v.clone() …}` within one run: dormant columns are zero in it, as they are now."""
    run = cut(layout="masked")
    best = {k: v.clone() for k, v in run.model.state_dict().items()}
    masks = run.controller.masks
    run.train(25, 26)
    run.model.load_state_dict(best)
    assert all(torch.equal(masks[n], m) for n, m in run.controller.masks.items())
    assert all(torch.equal(best[k], v) for k, v in run.model.state_dict().items())


def test_optimizer_state_without_masks_waits_for_the_model() -> None:
    run, fresh = cut(), rig(seed=1)
    state = run.optimizer.state_dict()
    state.pop("controlprune")
    fresh.optimizer.load_state_dict(state)
    before = bits(fresh.model)
    x, y = batch(0, fresh.shape)
    nn.functional.cross_entropy(fresh.model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"optimizer: the state .*does not fit .*load the model's"):
        fresh.optimizer.step()
    with pytest.raises(RuntimeError, match=r"optimizer: the state .*does not fit"):
        fresh.controller.finalize()
    fresh.optimizer.zero_grad()
    assert_same_bits(before, bits(fresh.model))
    fresh.model.load_state_dict(run.model.state_dict())
    for p, q in zip(fresh.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(fresh.optimizer.state[p]["exp_avg"], run.optimizer.state[q]["exp_avg"])


def test_an_optimizer_dict_of_another_shape_changes_nothing() -> None:
    run = cut()
    before, masks = bits(run.model, run.optimizer), run.controller.masks
    foreign = rig(seed=1)
    state = foreign.optimizer.state_dict()
    state["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match="doesn't match the size"):
        run.optimizer.load_state_dict(state)
    assert_same_bits(before, bits(run.model, run.optimizer))
    assert all(torch.equal(masks[n], m) for n, m in run.controller.masks.items())


def tampered(state: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    change(state["controlprune"])
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("masks"), "cannot be read"),
        (lambda s: s["masks"].pop("0"), "another model"),
        (lambda s: s["masks"].update({"0": torch.ones(3).bool()}), "another model"),
    ],
)
def test_masks_that_are_corrupt(change: Callable[[dict[str, Any]], None], message: str) -> None:
    run, fresh = cut(), rig(seed=1)
    before = bits(fresh.model, fresh.optimizer)
    with pytest.raises(ValueError, match=f"state_dict: .*{message}"):
        fresh.optimizer.load_state_dict(tampered(run.optimizer.state_dict(), change))
    state = run.model.state_dict()
    masks = copy.deepcopy(state._metadata[""])  # type: ignore[attr-defined]
    change(masks["controlprune"])
    state._metadata[""] = masks  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=f"state_dict: .*{message}"):
        fresh.model.load_state_dict(state)
    assert_same_bits(before, bits(fresh.model, fresh.optimizer))


def test_a_tensor_that_is_not_of_its_masks_shape() -> None:
    run, fresh = cut(), rig(seed=1)
    state = run.model.state_dict()
    state["0.weight"] = torch.zeros(3, 8)
    before = bits(fresh.model, fresh.optimizer)
    with pytest.raises(ValueError, match=r"state_dict: 0\.weight has not the shape"):
        fresh.model.load_state_dict(state)
    assert_same_bits(before, bits(fresh.model, fresh.optimizer))


# --- the controller's own dict --------------------------------------------------------------------


def set_to(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


CORRUPT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not ours": (lambda s: s.clear(), "not a controller's state_dict"),
    "newer": (set_to("format", value=99), "format 99 was written by a newer"),
    "format of a word": (set_to("format", value="x"), "newer"),
    "other groups": (set_to("groups", value={"a": 3}), "belongs to another model"),
    "other policy": (set_to("policy", value="Other"), "under the policy Other, this controller's is Control"),
    "no plant": (lambda s: s.pop("plant"), "incomplete, plant missing"),
    "no history": (lambda s: s.pop("history"), "incomplete, history missing"),
    "no moments": (lambda s: s["loop"]["units"].pop("moments"), "corrupt"),
    "no gates": (lambda s: s["loop"].pop("gates"), "corrupt"),
    "moments cut short": (set_to("loop", "units", "moments", "first", value=torch.zeros(3)), "corrupt"),
    "window cut short": (set_to("loop", "units", "window", value=torch.zeros(2, 3)), "corrupt"),
    "rows of others": (set_to("history", "sizes", value=[1, 2]), "corrupt"),
    "masks are gone": (lambda s: s["plant"].pop("mask/0"), "corrupt"),
    "a mask too short": (set_to("plant", "mask/0", value=torch.ones(3).bool()), "corrupt"),
    "nothing parked": (lambda s: [s["plant"].pop(k) for k in list(s["plant"]) if "parked" in k], "corrupt"),
    "counts": (set_to("counts", value=[1]), "corrupt"),
    "a word for the loss": (set_to("loss", value="low"), "corrupt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_state() -> dict[str, Any]:
    torch.set_num_threads(1)
    return cut().controller.state_dict()


@pytest.mark.parametrize("name", CORRUPT)
def test_a_state_that_is_not_this_controllers_is_refused_whole(name: str, good_state: dict[str, Any]) -> None:
    """Also where the checksum says that it was written so."""
    change, message = CORRUPT[name]
    fresh = rig(seed=1, total_steps=60)
    fresh.train(0, 2)
    state = copy.deepcopy(good_state)
    change(state)
    if "checksum" in state:
        state = signed(state)
    before, own = bits(fresh.model, fresh.optimizer), still(fresh.controller)
    with pytest.raises(ValueError, match=f"state_dict: .*{message}"):
        fresh.controller.load_state_dict(state)
    assert_same_bits(before, bits(fresh.model, fresh.optimizer))
    assert own == still(fresh.controller)
    fresh.controller.load_state_dict(good_state)
    fresh.train(25, 27)


def test_a_state_that_was_changed_on_its_way(good_state: dict[str, Any]) -> None:
    fresh = rig(seed=1, total_steps=60)
    before, own = bits(fresh.model, fresh.optimizer), still(fresh.controller)
    for change in (set_to("loss", value=0.5), lambda s: s["loop"]["units"]["moments"]["first"].mul_(2.0)):
        state = copy.deepcopy(good_state)
        change(state)
        with pytest.raises(ValueError, match=r"state_dict: .*corrupt.*checksum does not match"):
            fresh.controller.load_state_dict(state)
    assert_same_bits(before, bits(fresh.model, fresh.optimizer))
    assert own == still(fresh.controller)


def still(controller: cp.Controller) -> bytes:
    """All of its state but the clock, to compare."""
    state = controller.state_dict()
    return pickle.dumps(flat({k: v for k, v in state.items() if k not in ("seconds", "checksum")}))


def flat(value: Any) -> Any:
    """Tensors as lists, so that two states compare."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): flat(v) for k, v in value.items()}
    return [flat(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_no_mapping_is_no_state() -> None:
    for wrong in (None, 3, "state", [1]):
        with pytest.raises(ValueError, match="not a controller's state_dict"):
            rig().controller.load_state_dict(wrong)  # type: ignore[arg-type]


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["masked", "compact"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_plain_model(duplicate: Callable[[nn.Module], nn.Module], layout: str) -> None:
    run = cut("residual", layout)
    other = duplicate(run.model)
    assert torch.equal(evaluated(other, run.shape), evaluated(run.model, run.shape))
    before, row = bits(run.model, run.optimizer), len(run.controller.history)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    x, y = batch(1, run.shape)
    for _ in range(3):  # it trains on its own
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
    other.load_state_dict(other.state_dict())
    assert "controlprune" not in other.state_dict()._metadata[""]  # type: ignore[attr-defined]
    assert_same_bits(before, bits(run.model, run.optimizer))
    assert len(run.controller.history) == row
    run.train(25, 40)


def test_a_copied_optimizer_is_its_own() -> None:
    run = cut(layout="masked")
    before = bits(run.model, run.optimizer)
    other = copy.deepcopy(run.optimizer)
    other.step()
    other.load_state_dict(other.state_dict())
    assert_same_bits(before, bits(run.model, run.optimizer))
    assert run.controller._run.intake._ran is False


@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_an_average_that_follows(end: str) -> None:
    """Through cuts, returns and shrinks, and to the end: the average of what is live."""
    run = rig("residual", policy=QUICK, total_steps=60)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    run.controller.follow(average.module)
    for step in range(60):
        run.train(step, step + 1)
        average.update_parameters(run.model)
        if step == 30:
            run.controller.shrink()
        assert [p.shape for p in average.module.parameters()] == [p.shape for p in run.model.parameters()]
    getattr(run.controller, end)()
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in run.model.parameters()]
    assert evaluated(average.module, run.shape).isfinite().all()
    close = sum(
        float((p - q).detach().norm())
        for p, q in zip(average.module.parameters(), run.model.parameters(), strict=True)
    )
    far = sum(float(q.detach().norm()) for q in run.model.parameters())
    assert 0 < close < 0.5 * far
    assert hooks(run.model, run.optimizer) == 0
