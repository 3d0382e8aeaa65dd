"""What `import controlprune` costs on top of torch: what takes long to import is imported when used."""

from __future__ import annotations

import subprocess
import sys

import pytest

TIMED = """
import time
began = time.process_time()
import torch
between = time.process_time()
import controlprune
print(between - began, time.process_time() - between)
"""


@pytest.mark.parametrize(
    "name", ["matplotlib", "control", "scipy", "sklearn", "torch._dynamo", "transformers"]
)
def test_what_takes_long_is_imported_when_used(name: str) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import controlprune; "
        f"print({name!r} in set(sys.modules) - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_importing_takes_less_than_half_of_what_torch_takes() -> None:
    shares = []
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True)
        torch_takes, ours = map(float, found.stdout.split())
        shares.append(ours / torch_takes)
    assert min(shares) < 0.5, shares
