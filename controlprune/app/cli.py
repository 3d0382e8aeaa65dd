"""The command line: `controlprune demo | train | profile | report | bench`."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..budget import InfeasibleBudget
from ..cost.grid import Steps, group_multiples
from ..cost.instruments import Instruments
from ..cost.survey import Bench, survey
from ..loop.history import History
from ..state.version import __version__
from ..structure import analyse
from ..structure.saying import printable
from .demo import run
from .inputs import evaluated, made, spec
from .plots import plot
from .report import budgets_table, structure_report, summary
from .tasks import TASKS, TaskError, load

__all__ = ["main"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class UserError(Exception):
    """Something the user gave does not work; the message says what and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status (0, or 2 after an error of the user's, told in one line)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII only
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given[:1] if given[:1] == ["bench"] else given)
    options.arguments = given[1:]  # of the bench, which has a parser of its own
    try:
        options.command(options)
        sys.stdout.flush()
    except (UserError, TaskError, InfeasibleBudget, MemoryError) as error:
        return _told(str(error) or "out of memory")
    except BrokenPipeError:  # whoever reads the output, `head` say, has seen enough
        _silence()
    except OSError as error:  # a full disk, a folder that may not be written
        _silence()
        return _told(str(error))
    except KeyboardInterrupt:
        print("\ncontrolprune: stopped", file=sys.stderr)
        return 130
    return 0


def _told(error: str) -> int:
    print(f"controlprune: error: {printable(error)}", file=sys.stderr)
    return 2


def _silence() -> None:
    """What is left to be written to stdout is dropped, so that Python does not fail on it once more."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlprune", description="Online pruning by feedback control.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"controlprune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="demo | train | profile | report | bench")

    for add in (_add_training, _add_profile, _add_report):
        add(commands)
    bench = commands.add_parser("bench", help="the tables of docs/results.md (from a checkout of the source)")
    bench.set_defaults(command=_bench)
    return parser


def _add_training(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="watch a small network being pruned while it trains on digits")
    demo.set_defaults(command=_train, task="digits-wide", data=None, steps=None)
    _training_options(demo, out="runs/demo")

    train = commands.add_parser("train", help="the same on another task")
    train.set_defaults(command=_train)
    train.add_argument("task", choices=list(TASKS), help="what to train on")
    train.add_argument(
        "--data", type=Path, help="folder with mnist/ or cifar10/ (default: fetch from the hub)"
    )
    train.add_argument("--steps", type=_positive, help="training steps (default: what suits the task)")
    _training_options(train, out="runs/train")


def _add_profile(commands: Commands) -> None:
    profile = commands.add_parser(
        "profile",
        help="what of a model can be pruned, and what not and why (imports and runs its code)",
        description="What of a model can be pruned, and what not and why. MODULE is imported, FACTORY called "
        "and the model run, so all of their code runs, as does --inputs: give what you trust.",
    )
    profile.set_defaults(command=_profile)
    profile.add_argument("factory", metavar="MODULE:FACTORY", help="for example torchvision.models:resnet18")
    profile.add_argument(
        "--input", type=spec, action="append", default=[], metavar="[NAME=]1,3,224,224[:DTYPE[:LOW-HIGH]]",
        help="an example input, batch first; may be repeated: input_ids=2,128:int64:0-30521",
    )  # fmt: skip
    profile.add_argument(
        "--inputs", metavar="EXPRESSION", help="all inputs, as a Python expression in which torch is known"
    )
    profile.add_argument(
        "--budget", type=_fraction, action="append", default=[],
        help='what a uniform net of that many FLOPs would have left: 0.4 or "40%%"; may be repeated',
    )  # fmt: skip
    profile.add_argument(
        "--measure",
        action="store_true",
        help="memory of a training step with Adam, and latency on this machine, too",
    )


def _add_report(commands: Commands) -> None:
    report = commands.add_parser("report", help="a run's record as text and picture")
    report.set_defaults(command=_report)
    report.add_argument(
        "files", type=Path, nargs="*", metavar="FILE.jsonl", help="a history, as written by demo and train"
    )
    report.add_argument(
        "-o", "--out", type=Path,
        help="the picture (default: beside the file, as .png), or an interactive page if it ends in .html",
    )  # fmt: skip
    report.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="FILE.jsonl", help="more runs, on one page"
    )
    report.add_argument(
        "--watts", type=float, help="power of this machine, for energy and carbon on the page"
    )
    report.add_argument(
        "--carbon", type=float, default=400.0, help="grams of CO2 per kWh (default: %(default)s)"
    )


def _training_options(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--budget", type=_fraction, default=0.4, help="FLOPs, as a fraction of dense (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="(default: %(default)s)")


def _train(options: argparse.Namespace) -> None:
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    task = load(options.task, options.data)
    print(run(task, options.budget, options.seed, out, options.steps))
    print(f"\npicture   {out / 'dynamics.png'}\nrecord    {out / 'history.jsonl'}")
    print(f"model     {out / 'model.safetensors'}  (controlprune.load(path, the dense model) gives it back)")


def _profile(options: argparse.Namespace) -> None:
    model = _build(options.factory)
    inputs = _inputs(options)
    try:
        structure = analyse(model, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = [tuple(x.shape) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        raise UserError(f"{options.factory} does not run on inputs of shapes {shapes}: {error}") from error
    measured = None
    if options.measure and structure.groups:
        multiples = group_multiples(structure, dict(model.named_parameters()), timed=True)
        steps = Steps.of(structure, None, multiples, timed=True)
        bench = Bench(model, torch.optim.Adam(model.parameters()), inputs, inputs, Instruments(), steps)
        try:
            measured = survey(("memory", "latency"), structure, bench)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--measure: {error}") from error
    print(structure_report(structure, measured))
    if structure.groups and options.budget:
        print("\n" + budgets_table(structure, options.budget, measured))


def _inputs(options: argparse.Namespace) -> Any:
    if bool(options.input) == bool(options.inputs):
        raise UserError('profile: give --input 1,3,224,224 (for each input), or --inputs "EXPRESSION"')
    try:
        return evaluated(options.inputs) if options.inputs else made(options.input)
    except Exception as error:  # the user's own expression may raise anything
        raise UserError(f"--inputs: {type(error).__name__}: {error}") from error


def _build(name: str) -> nn.Module:
    """The model that `module:factory` names and makes, called without arguments."""
    module_name, colon, factory_name = name.partition(":")
    if not (module_name and colon and factory_name):
        raise UserError(f"{name!r} is not MODULE:FACTORY, such as torchvision.models:resnet18")
    sys.path.insert(0, "")  # a module of the user's, in the current folder
    try:
        factory: Callable[[], object] = getattr(importlib.import_module(module_name), factory_name)
    except AttributeError as error:
        raise UserError(f"{module_name} has no {factory_name} ({error})") from error
    except (Exception, SystemExit) as error:  # whatever the module's own code raises
        raise UserError(f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        what = "cannot be called without arguments" if isinstance(error, TypeError) else "raised"
        raise UserError(f"{name} {what}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def _report(options: argparse.Namespace) -> None:
    files: list[Path] = [*options.files, *options.compare]
    if not files:
        raise UserError("report: give a history, FILE.jsonl, or two after --compare")
    histories = {_short(file, files): _history(file) for file in files}
    for name, history in histories.items():
        print((f"{name}\n\n" if len(files) > 1 else "") + summary(history) + "\n")
    out: Path | None = options.out
    if len(files) > 1 and out is None:
        out = Path("report.html")
    if out is not None and out.suffix == ".html":
        _page(histories, out, options)
    elif len(files) > 1:
        raise UserError(f"--out {out}: several runs are drawn as a page; give a name that ends in .html")
    elif len(histories[_short(files[0], files)]):
        out = out if out is not None else files[0].with_suffix(".png")
        try:
            plot(histories[_short(files[0], files)], out)
        except ValueError as error:  # a format that no picture has
            raise UserError(f"--out {out}: {error}") from error
        print(f"picture   {out}")


def _history(file: Path) -> History:
    try:
        return History.read(file)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _short(file: Path, files: Sequence[Path]) -> str:
    """The file's name, its folder's where two are called alike, or all of it."""
    for name in (lambda f: f.stem, lambda f: f"{f.parent.name}/{f.stem}"):
        if len({name(other) for other in files}) == len(files):
            return name(file)
    return str(file)


def _page(histories: dict[str, History], out: Path, options: argparse.Namespace) -> None:
    from .page import Assumed, write_page

    try:
        write_page(histories, out, Assumed(options.watts, options.carbon))
    except ImportError as error:
        raise UserError(
            'the page needs plotly: pip install plotly (from a checkout: pip install -e ".[report]")'
        ) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"page      {out}")


def _bench(options: argparse.Namespace) -> None:
    """`python -m analysis`, which is beside the package in a checkout."""
    folder = Path(__file__).parents[2]
    if not (folder / "analysis" / "bench").is_dir():
        raise UserError(
            f"bench: there is no analysis/ in {folder}: it is not in the installed package. Run it from a "
            "checkout of the source (pip install -e ., then controlprune bench, or python -m analysis)"
        )
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module("analysis.bench.main").main(options.arguments)
    finally:
        sys.path.remove(str(folder))


def _fraction(text: str) -> float:
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no fraction of dense: give a number above 0, at most 1, or "40%"'
        )
    return value


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: give a whole number from 0 to {2**32 - 1}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
