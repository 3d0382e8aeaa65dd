"""Random compositions of operators: masked equals shrunk, or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from controlprune.structure import analyse

from .agreement import disagreement
from .programs import Program, programs


def agree(model: Program) -> None:
    x = torch.randn(2, 5, 4)
    structure = analyse(model, (x,))
    model, x = model.double(), x.double()
    for seed in range(2 if structure.groups else 0):
        assert disagreement(model, (x,), structure, seed) < 1e-6


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(programs())
def test_masked_equals_shrunk(model: Program):
    agree(model)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(longest=9))
def test_masked_equals_shrunk_at_length(model: Program):
    agree(model)
