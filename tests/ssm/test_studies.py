"""The studies of state-space layers run, side by side from one trained layer."""

from __future__ import annotations

from argparse import Namespace

import pytest
import ssm_smnist
import ssm_spike
import torch


def test_moments_are_compared_from_one_start() -> None:
    rows = ssm_spike.piece(0, 1e-2, before=3, after=2)
    assert [row["side"] for row in rows] == list(ssm_spike.SIDES)
    assert len({row["start"] for row in rows}) == 1
    assert len({row["losses"][0] for row in rows if row["side"] != "uncut"}) == 1, "the same cut"
    assert len({row["losses"][-1] for row in rows}) == len(rows), "and four ways on from it"
    assert "carried" in ssm_spike.summary(rows)


@pytest.mark.parametrize(
    ("side", "states"), [("full", 256), ("direct 5", 5), ("cut 5", 5), ("tau 0.2", None)]
)
def test_a_side_ends_with_its_states(side: str, states: int | None) -> None:
    split = torch.randn(60, 8, 1), torch.randint(10, (60,))
    options = Namespace(steps=20, rate=1e-2, constant=False, device="cpu")
    row = ssm_smnist.piece(side, 0, options, split, (split[0][:50], split[1][:50]))
    assert row["states"] == states if states else row["states"] < 256
    assert len(row["cuts"]) == (2 if side.startswith(("cut", "tau")) else 0)
    assert side in ssm_smnist.summary([row])
