"""The bench on the command line.

    python -m analysis run text scratch --data DIR     what is not in the results yet, its cost said first
    python -m analysis tables                          tables of what is there
    python -m analysis tables --into docs/results.md   the same, between the page's marks

One training is one line of `analysis/results/TASK.jsonl`, so a run can be stopped at any time and goes on
where it was. Several processes may share the work: each takes what nobody has begun. A side that does not run
on a task is said, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from ..measure import Results
from .run import measured
from .sides import FOUND, LEVERS, SIDES, make
from .tables import cost_of, placed, summary, tables
from .task import Task
from .tasks import TASKS

__all__ = ["main"]

RESULTS = Path(__file__).parent.parent / "results"
Piece = tuple[str, str, float, int]  # task, side, budget, seed


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    if options.command == "run":
        torch.set_num_threads(1)
        _run(options)
    else:
        _show(options)
    return 0


def _show(options: argparse.Namespace) -> None:
    shown = None if options.levers else SIDES
    asked = options.tasks or list(TASKS)
    made = {task: tables(options.results, task, shown) for task in asked}
    made["summary"] = summary(options.results, asked, SIDES)
    if options.into is None:
        print("\n\n".join(text for text in made.values() if text) or "no results yet")
    else:
        options.into.write_text(placed(options.into.read_text(encoding="utf-8"), made), encoding="utf-8")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlprune bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing")
    run.add_argument("tasks", nargs="+", choices=list(TASKS))
    run.add_argument("--data", type=Path, required=True, help="the folder with sst2/, cifar10/, …")
    run.add_argument("--sides", nargs="+", default=list(SIDES), choices=[*SIDES, *LEVERS], metavar="SIDE")
    run.add_argument("--budgets", nargs="+", type=float, help="default: the task's")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED")
    run.add_argument("--steps", type=int, help="a longer or shorter run; default: the task's")
    run.add_argument("--as", dest="suffix", default="", help="a name for this checkout, added to the side's")
    run.add_argument("--again", action="store_true", help="also what is there; tables show the latest")
    run.add_argument("--busy", action="store_true", help="much else runs: tables are not to show the time")
    run.add_argument("--dry", action="store_true", help="only say what it costs")
    show = commands.add_parser("tables", help="tables of the results")
    show.add_argument("tasks", nargs="*", choices=[*TASKS, []])
    show.add_argument("--levers", action="store_true", help="with what was only tried, and older checkouts")
    show.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="between <!-- bench TASK --> and <!-- end -->"
    )
    for each in (run, show):
        each.add_argument("--results", type=Path, default=RESULTS)
    return parser


def _run(options: argparse.Namespace) -> None:
    length = () if options.steps is None else (options.steps,)
    tasks = {task.name: task for task in (TASKS[name](options.data, *length) for name in options.tasks)}
    pieces = [
        (task.name, side, budget, seed)
        for task in tasks.values()
        for seed, budget, side in product(options.seeds, options.budgets or task.budgets, options.sides)
        if side != "dense" or budget == (options.budgets or task.budgets)[0]
    ]
    left = [piece for piece in pieces if not _done(options, tasks[piece[0]], piece)]
    _say_cost(options, tasks, pieces, left)
    for number, piece in enumerate([] if options.dry else left, start=1):
        if _done(options, tasks[piece[0]], piece) or not _claim(options, piece):
            continue
        try:
            _train(options, tasks[piece[0]], piece, f"{number}/{len(left)}")
        finally:
            _claimed(options, piece).unlink(missing_ok=True)


def _say_cost(
    options: argparse.Namespace, tasks: dict[str, Task], pieces: list[Piece], left: list[Piece]
) -> None:
    """Of each table, before it is made."""
    seconds = [cost_of(options.results, *piece[:3], tasks[piece[0]].steps) for piece in left]
    _say(f"{len(left)} of {len(pieces)} trainings left, about {sum(seconds) / 3600:.2f} core-hours")
    for table in dict.fromkeys((piece[0], piece[2]) for piece in left):
        own = [s for s, piece in zip(seconds, left, strict=True) if (piece[0], piece[2]) == table]
        _say(f"  {table[0]} at {table[1]}: {len(own)} trainings, about {sum(own) / 60:.0f} core-minutes")


def _named(options: argparse.Namespace, piece: Piece) -> str:
    return piece[1] + (f" ({options.suffix})" if options.suffix else "")


def _file(options: argparse.Namespace, piece: Piece) -> Results:
    return Results(options.results / f"{piece[0]}.jsonl")


def _done(options: argparse.Namespace, task: Task, piece: Piece) -> bool:
    _, _, budget, seed = piece
    if options.again:
        return False
    key = {"side": _named(options, piece), "seed": seed, "steps": task.steps}
    return _file(options, piece).has(**key, **({} if piece[1] == "dense" else {"budget": budget}))


def _claim(options: argparse.Namespace, piece: Piece) -> bool:
    """False where another process is at it; a claim of half an hour ago counts for nothing."""
    claim = _claimed(options, piece)
    claim.parent.mkdir(parents=True, exist_ok=True)
    if claim.exists() and time.time() - claim.stat().st_mtime > 1800:
        claim.unlink(missing_ok=True)
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _claimed(options: argparse.Namespace, piece: Piece) -> Path:
    name = "-".join(str(part).replace(" ", "_").replace("%", "") for part in (*piece, options.suffix))
    return options.results / "claims" / name


def _train(options: argparse.Namespace, task: Task, piece: Piece, which: str) -> None:
    _, side, budget, seed = piece
    title = f"{which} {task.name} {budget}, seed {seed}: {_named(options, piece)}"
    terminal, began = sys.stderr.isatty(), time.monotonic()

    def progress(step: int, share: float) -> None:
        if terminal and (step % 10 == 0 or step == task.steps):
            line = (
                f"{title}  {step}/{task.steps}  FLOPs {100 * share:.0f} %  {time.monotonic() - began:.0f} s"
            )
            sys.stderr.write(f"\r{line[:110]:<110}")

    found = _widths_of_ours(options, task, piece) if side in FOUND else None
    if side in FOUND and found is None:
        _say(f"{title}: left out, it needs the widths of ours, which has not run")
        return
    try:
        row = measured(task, make(side), _named(options, piece), budget, seed, progress, found)
    except Exception as error:  # whatever another library says of a network it cannot take
        _say(f"{title}: does not run: {type(error).__name__}: {error}")
        return
    _file(options, piece).append([row | ({"busy": True} if options.busy else {})])
    said = f"{row[task.figure]:.2f}, {row['seconds']:.0f} s CPU, FLOPs {row['flops']:.3f}"
    _say(("\r" if terminal else "") + f"{title}: {said}")


def _widths_of_ours(options: argparse.Namespace, task: Task, piece: Piece) -> Sequence[int] | None:
    rows = _file(options, piece).having(side="ours", budget=piece[2], seed=piece[3], steps=task.steps)
    return rows[-1]["units"] if rows else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
