"""`help()` explains every setting that a user may give, and every field that a policy may read."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

import controlprune as cp

RECORDS = [
    thing
    for thing in (getattr(cp, name) for name in cp.__all__)
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing)
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_is_in_the_docstring(record: type) -> None:
    text = inspect.getdoc(record) or ""
    named = set(re.findall(r"`(\w+)(?:=[\w.]+)?`", text))
    fields = {f.name for f in dataclasses.fields(record) if f.init and not f.name.startswith("_")}
    assert fields <= named, f"not explained: {sorted(fields - named)}"
