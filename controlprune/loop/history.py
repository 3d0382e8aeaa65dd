"""The record of a run: one row per update of the controller, bounded in memory, JSON lines on disk.

A row holds what was decided and what it cost. When more than `capacity` rows would be held, neighbours
are merged two by two and the stride doubles, so a run of any length keeps an even resolution::

    rows(T) ≤ capacity,   updates per row = stride = 2^⌈log2(T / capacity)⌉   (the newest row may hold fewer)
    merge(a, b):  off, on  -> a + b        (counts: nothing summed is ever lost)
                  event    -> both kinds, each named once, "look,shrink"
                  the rest -> b            (the later state)

Resources are fractions of the dense model's use. Times are CPU seconds of this process since attach and
run on from row to row, so the later one is the sum.

On disk the first line is the header (names, sizes, budget, …), every further line a row. A last line cut
short by a killed process is dropped; a number that is not finite is written as null,
since JSON has no NaN, and read as NaN. Where a stream cannot be written (the disk is full) the training goes
on: its file ends with the last whole row, the user is told once, and all rows follow when it can be again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..cost.problem import Problem
from ..state.files import replacing
from ..structure.saying import warn

__all__ = ["History", "Record", "history_of", "merge"]

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One update. Tuples have one entry per group, in the order of `History.names`."""

    step: int
    loss: float
    active: tuple[int, ...]  # units that are on
    widths: tuple[int, ...]  # units physically in the tensors
    price: Mapping[str, float]  # resource -> loss per dense use of it; of a budget, relative
    reference: Mapping[str, float]  # resource -> fraction of dense that was asked for
    realised: Mapping[str, float]  # resource -> fraction of dense in use
    off: tuple[int, ...]  # units switched off at this update
    on: tuple[int, ...]  # units that came back at this update
    bounds: Mapping[str, float] = field(default_factory=dict)  # group -> 2 Σσ of its cuts so far (states)
    event: str = ""  # "" or kinds such as "shrink", "expand", "look", "finalize", comma-separated
    seconds: float = 0.0  # process CPU time since attach
    overhead_seconds: float = 0.0  # of which spent in the controller


def merge(first: Record, second: Record) -> Record:
    """Two neighbouring rows as one: counts add up, events unite, the rest is the later row's."""
    kinds = sorted({kind for row in (first, second) for kind in row.event.split(",") if kind})
    return replace(
        second,
        off=tuple(a + b for a, b in zip(first.off, second.off, strict=True)),
        on=tuple(a + b for a, b in zip(first.on, second.on, strict=True)),
        event=",".join(kinds),
    )


class History:
    """Rows of one run, oldest first: `len(history)`, `for row in history`, `history[-1]`."""

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        budget: Mapping[str, float],
        total_steps: int,
        capacity: int = 4096,
        refused: Sequence[tuple[str, int, str]] = (),  # what is left alone: name, units, reason
    ) -> None:
        if len(names) != len(sizes):
            raise ValueError(f"names and sizes: one entry per group, got {len(names)} and {len(sizes)}")
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity must be an even number of rows, at least 2, got {capacity}")
        self.names = tuple(names)
        self.sizes = tuple(int(size) for size in sizes)
        self.budget = dict(budget)
        self.total_steps = int(total_steps)
        self.capacity = capacity
        self.refused = tuple(refused)
        self.stride = 1  # updates per row
        self._rows: list[Record] = []
        self._filled = 0  # updates in the newest row
        self._stream: Path | None = None
        self._behind = False  # the stream lacks rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._rows[index]

    def __repr__(self) -> str:
        steps = f"{self._rows[0].step}–{self._rows[-1].step}" if self._rows else "none yet"
        return f"History({len(self.names)} groups, {len(self)} rows, steps {steps} of {self.total_steps})"

    def append(self, record: Record) -> None:
        """Add one update (and one line to the stream, where there is one)."""
        self._check(record)
        if self._rows and self._filled < self.stride:
            self._rows[-1] = merge(self._rows[-1], record)
            self._filled += 1
        else:
            if len(self._rows) == self.capacity:
                self._halve()
            self._rows.append(record)
            self._filled = 1
        if self._stream is not None:
            self._put(self._stream, _line(_row(record)))

    def write(self, path: str | Path) -> Path:
        """Write the rows held, as JSON lines; parent folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [_line(self._header()), *(_line(_row(row)) for row in self._rows)]
        with replacing(path) as part:
            part.write_text("".join(lines), encoding="utf-8")
        return path

    def stream(self, path: str | Path) -> Path:
        """Write the rows held and, from now on, every update as it comes: survives a killed process."""
        self._stream = self.write(path)
        self._behind = False
        return self._stream

    def _put(self, path: Path, line: str) -> None:
        """Append one line, or nothing; after a failure the file is written anew, with all rows held."""
        length = path.stat().st_size if path.exists() else 0
        try:
            if self._behind:
                self.write(path)
            else:
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)
            self._behind = False
        except OSError as error:
            if not self._behind:
                if path.exists():
                    os.truncate(path, length)
                warn(
                    f"controlprune: history: {str(path)!r} could not be written ({error.strerror}); the rows "
                    "are kept and follow when it can be",
                )
            self._behind = True

    @classmethod
    def read(cls, path: str | Path, capacity: int = 4096) -> History:
        """A history from `write` or `stream`. Raises ValueError on a file that is not one."""
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        header = _parse(lines[0]) if lines else None
        if not isinstance(header, dict) or header.get("controlprune_history") != FORMAT:
            raise ValueError(
                f"{path} is not a controlprune history (format {FORMAT}): its first line is no header"
            )
        rows = [_parse(line) for line in lines[1:]]
        if rows and rows[-1] is None:
            rows.pop()  # the process was killed while writing it
        if None in rows:
            raise ValueError(f"{path}: line {rows.index(None) + 2} is not JSON; the file is corrupt")
        try:
            history = cls(header["names"], header["sizes"], header["budget"], header["total_steps"], capacity)
            history._restore(header, rows)
        except (LookupError, TypeError, AttributeError, OverflowError, ValueError) as error:
            raise ValueError(f"{path}: the file is corrupt ({type(error).__name__}: {error})") from error
        return history

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, as in the file."""
        return {**self._header(), "rows": [_row(row) for row in self._rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the rows of a run over the same groups."""
        for key in ("names", "sizes"):
            if tuple(state[key]) != getattr(self, key):
                raise ValueError(f"history of other groups: {key} {state[key]}, here {getattr(self, key)}")
        self._restore(state, state["rows"])
        if self._stream is not None:
            self.stream(self._stream)  # the rows of the run that goes on, and no others

    def _header(self) -> dict[str, Any]:
        return {
            "controlprune_history": FORMAT,
            "names": list(self.names),
            "sizes": list(self.sizes),
            "budget": self.budget,
            "total_steps": self.total_steps,
            "refused": [list(entry) for entry in self.refused],
            "stride": self.stride,
            "filled": self._filled,
        }

    def _restore(self, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        _require_header(header)
        records = [_record(row) for row in rows]
        for record in records:
            self._check(record)
        self.budget, self.total_steps = dict(header["budget"]), int(header["total_steps"])
        self.refused = tuple((str(a), int(b), str(c)) for a, b, c in header.get("refused", ()))
        self.stride = int(header["stride"])
        # A stream's header is older than its rows, whose stride stays 1: each row is then full.
        self._filled = int(header["filled"]) if header["filled"] else self.stride
        self._rows = records
        while len(self._rows) > self.capacity:
            self._halve()

    def _halve(self) -> None:
        """Merge neighbours; an odd last row is left as it is, half full at the new stride."""
        rows = self._rows
        paired = [merge(a, b) for a, b in zip(rows[0::2], rows[1::2], strict=False)]
        if len(rows) % 2:
            paired.append(rows[-1])
        else:
            self._filled += self.stride
        self._rows = paired
        self.stride *= 2

    def _check(self, record: Record) -> None:
        for name in ("active", "widths", "off", "on"):
            if (entries := len(getattr(record, name))) != len(self.names):
                raise ValueError(f"record.{name} has {entries} entries, groups are {len(self.names)}")


def history_of(problem: Problem) -> History:
    """An empty one for this problem."""
    structure = problem.structure
    refused = [(r.name, r.size, r.reason) for r in structure.refused]
    return History(structure.names, structure.sizes, problem.budget, problem.total_steps, refused=refused)


def _require_header(header: Mapping[str, Any]) -> None:
    """ValueError or TypeError unless it says what a header says."""
    if not (_counts(header["sizes"]) and all(isinstance(name, str) for name in header["names"])):
        raise ValueError(f"names {header['names']!r:.80} or sizes {header['sizes']!r:.80}")
    if not (_counts([header["stride"], header["filled"], header["total_steps"]]) and header["stride"] >= 1):
        raise ValueError(f"stride {header['stride']!r:.80} or filled {header['filled']!r:.80}")
    if not _numbers(header["budget"]):
        raise ValueError(f"budget {header['budget']!r:.80}")


def _counts(values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _numbers(values: Any) -> bool:
    return isinstance(values, Mapping) and all(
        isinstance(k, str) and type(v) in (int, float) for k, v in values.items()
    )


def _row(record: Record) -> dict[str, Any]:
    return {name: _plain(value) for name, value in vars(record).items()}


def _plain(value: Any) -> Any:
    """JSON's own types; a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(row: Mapping[str, Any]) -> Record:
    if missing := {"step", "loss", "active", "widths", "off", "on"} - row.keys():
        raise ValueError(f"a row of the history lacks {sorted(missing)}")
    known = {field.name for field in fields(Record)}
    record = Record(**{name: _restored(value) for name, value in row.items() if name in known})
    counted = (record.active, record.widths, record.off, record.on)
    plain = (record.loss, record.seconds, record.overhead_seconds)
    if not (
        all(isinstance(values, tuple) and _counts(values) for values in counted)
        and all(map(_numbers, (record.price, record.reference, record.realised, record.bounds)))
        and all(type(value) in (int, float) for value in plain)
        and _counts([record.step])
        and isinstance(record.event, str)
    ):
        raise ValueError(f"a row of the history is none: step {record.step!r:.80}")
    return record


def _restored(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _restored(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return tuple(value)
    return math.nan if value is None else value


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n"


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
