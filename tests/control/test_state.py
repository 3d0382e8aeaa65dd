"""States as plain containers and back."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from controlprune.control.horizon import Horizon
from controlprune.control.state import pack, unpack
from controlprune.price.identify import Identifier
from controlprune.price.pi import PI


def test_there_and_back_through_a_checkpoint() -> None:
    for state in (PI().init(), Horizon().init(), Identifier().update(Identifier().init(), 0.5, 0.1)):
        file = io.BytesIO()
        torch.save(pack(state), file)
        file.seek(0)
        again = unpack(state, torch.load(file, weights_only=True))
        assert pack(again).keys() == pack(state).keys()
        for a, b in zip(_leaves(pack(state)), _leaves(pack(again)), strict=True):
            assert a == b or (a != a and b != b)


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return list(value.flatten().tolist()) if isinstance(value, torch.Tensor) else [value]


def test_another_state_is_refused() -> None:
    with pytest.raises(ValueError, match="PIState: the saved state has other entries"):
        unpack(PI().init(), {"price": 1.0})
    with pytest.raises(ValueError, match="an array of shape"):
        unpack(np.zeros(2), torch.zeros(3))
