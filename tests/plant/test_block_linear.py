"""Live tiles only: the same numbers as the dense layer with zeros, forward, backward and in a file."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from controlprune.plant.block_linear import BlockLinear, Panels, panels, tiles, to_blocks, to_dense


def pair(rows: int, columns: int, live: Tensor, bias: bool = True) -> tuple[nn.Linear, BlockLinear]:
    """A layer with zeros, and its copy in blocks."""
    torch.manual_seed(0)
    linear = nn.Linear(live.shape[1] * columns, live.shape[0] * rows, bias=bias).double()
    with torch.no_grad():
        tiles(linear.weight, rows, columns).mul_(live[:, :, None, None])
    return linear, to_blocks(copy.deepcopy(linear), live)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_same_numbers_forward_and_backward(data: st.DataObject) -> None:
    down, across, rows, columns = (data.draw(st.integers(1, 5)) for _ in range(4))
    seed, some = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.2, 0.5, 1.0]))
    live = torch.rand(down, across, generator=torch.Generator().manual_seed(seed)) < some
    live[0, 0] = True
    linear, block = pair(rows, columns, live, bias=data.draw(st.booleans()))
    shape = data.draw(st.sampled_from([(3,), (2, 3), ()]))
    xs = [torch.randn(*shape, across * columns, dtype=torch.float64).requires_grad_()]
    xs.append(xs[0].detach().clone().requires_grad_())
    mine, theirs = block(xs[0]), linear(xs[1])
    torch.testing.assert_close(mine, theirs)
    seen = torch.randn_like(mine)
    mine.backward(seen)
    theirs.backward(seen)
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    assert linear.weight.grad is not None
    torch.testing.assert_close(block.weight.grad, panels(linear.weight.grad, live))
    if linear.bias is not None and block.bias is not None:
        torch.testing.assert_close(block.bias.grad, linear.bias.grad)
    with torch.no_grad():
        torch.testing.assert_close(block(xs[0]), theirs)


def test_its_gradients_are_those_of_differences() -> None:
    live = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    _, block = pair(2, 3, live)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: Panels.apply(a, w, block.layout), (x, block.weight))


def test_there_and_back_is_exact() -> None:
    live = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    linear, block = pair(4, 2, live)
    assert block.weight.shape == (int(live.sum()) * 2, 4)
    back = to_dense(copy.deepcopy(block))
    assert type(back) is nn.Linear
    assert vars(back).keys() == vars(linear).keys()
    assert torch.equal(back.weight, linear.weight)


def test_it_is_the_same_object_with_its_hooks() -> None:
    linear = nn.Linear(4, 4)
    weight, heard = linear.weight, []
    linear.register_forward_hook(lambda *_: heard.append(1))
    block = to_blocks(linear, torch.tensor([[True, False], [False, True]]))
    assert block is linear
    assert block.weight is weight
    block(torch.zeros(1, 4))
    assert heard == [1]


def test_files_are_the_dense_layers() -> None:
    live = torch.tensor([[True, False], [True, True]])
    linear, block = pair(2, 2, live)
    state = block.state_dict()
    assert all(torch.equal(state[name], value) for name, value in linear.state_dict().items())
    other = pair(2, 2, live)[1]
    with torch.no_grad():
        other.weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.weight, block.weight)
    with pytest.raises(RuntimeError, match="not zero in tiles that are not live"):
        other.load_state_dict({name: torch.ones_like(value) for name, value in state.items()})
    assert torch.equal(pickle.loads(pickle.dumps(block)).weight, block.weight)


def test_under_autocast_it_gives_what_the_layer_gives() -> None:
    linear, block = pair(8, 8, torch.tensor([[True, False], [True, True]]))
    linear, x = linear.float(), torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = block.float()(x), linear(x)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)
