"""The command line, as its user meets it: results where it says, one line for a mistake, no tracebacks."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import made_up_run

from controlprune import load
from controlprune.app.cli import main
from controlprune.app.compare import accuracy, count_flops
from controlprune.app.demo import Progress
from controlprune.app.tasks import load as load_task
from controlprune.loop.history import History

ROOT = Path(__file__).parents[2]

MODULE = """
from torch import nn
def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
def needs_width(width):
    return nn.Linear(width, 2)
class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(10, 8), nn.Linear(8, 32), nn.Linear(32, 2)
    def forward(self, ids, scale):
        return self.down((self.up(self.table(ids)) * scale).relu())
def words():
    return Words()
def number():
    return 7
def raises():
    raise KeyError("no weights")
def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_nets.py").write_text(MODULE)
    (tmp_path / "leaving_nets.py").write_text("import sys; sys.exit(1)")
    (tmp_path / "broken_nets.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@dataclass
class Trained:
    folder: Path
    out: str
    err: str
    threads: int


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One short run of the whole job, started on two threads."""
    folder = tmp_path_factory.mktemp("trained") / "a" / "b"
    out, err = io.StringIO(), io.StringIO()
    torch.set_num_threads(2)
    with redirect_stdout(out), redirect_stderr(err):
        code = main(
            ["train", "digits", "--steps", "20", "--budget", "0.5", "--seed", "1", "--out", str(folder)]
        )
    assert code == 0
    return Trained(folder, out.getvalue(), err.getvalue(), torch.get_num_threads())


def test_train_compares_the_three_and_leaves_all_it_says(trained: Trained) -> None:
    for side in ("dense", "controlled", "same size from scratch"):
        assert sum(line.startswith(side) for line in trained.out.splitlines()) == 1
    for name in ("dynamics.png", "history.jsonl", "model.safetensors"):
        assert f"{trained.folder / name}" in trained.out
        assert (trained.folder / name).stat().st_size > 0
    assert "100 %" in trained.err, "progress goes to stderr and ends"
    assert trained.threads == 2, "the number of threads is put back"


def test_the_record_of_a_run_ends_inside_the_budget_and_can_be_reported(
    trained: Trained, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert History.read(trained.folder / "history.jsonl")[-1].realised["flops"] <= 0.5
    assert main(["report", str(trained.folder / "history.jsonl"), "--out", "again.png"]) == 0
    assert "stem.conv" in capsys.readouterr().out
    assert (here / "again.png").exists()


def test_the_compact_model_is_given_back_from_its_file_and_is_as_small_as_the_table_says(
    trained: Trained,
) -> None:
    task = load_task("digits")
    model = load(trained.folder / "model.safetensors", task.factory())
    assert count_flops(model, task.example()) <= 0.5 * count_flops(task.factory(), task.example())
    found = 100 * accuracy(model, *task.test)
    (line,) = (line for line in trained.out.splitlines() if line.startswith("controlled"))
    assert f"{found:.2f} %" in line


def test_profile_shows_the_groups_of_a_users_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "their_nets:net", "--input", "3,4"]) == 0
    text = capsys.readouterr().out
    assert "units" in text
    assert "flops" in text


def test_profile_takes_tokens_keywords_and_expressions(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ["profile", "their_nets:words", "--input", "ids=2,6:int64:0-9"]
    assert main([*tokens, "--input", "scale=2,6,1", "--budget", "50%", "--budget", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "table" in out
    assert "50.0 %" in out
    assert "20.0 %" in out
    expression = "dict(ids=torch.zeros(1, 3, dtype=torch.int64), scale=torch.ones(1, 3, 1))"
    assert main(["profile", "their_nets:words", "--inputs", expression]) == 0
    for wrong, said in (
        (["--inputs", "1 / 0"], "ZeroDivisionError"),
        (["--input", "ids=2,6:int64", "--input", "2,6,1"], "name all inputs or none"),
        ([], "give --input"),
    ):
        assert main(["profile", "their_nets:words", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_profile_measures_where_it_is_asked_to(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "their_nets:net", "--input", "3,4", "--measure"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["memory"].rstrip().endswith("B")
    assert rows["latency"].rstrip().endswith("s")


def test_report_tells_and_draws_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_up_run().write(tmp_path / "run.jsonl")
    assert main(["report", str(path)]) == 0
    assert "layers.0.conv1" in capsys.readouterr().out
    assert (tmp_path / "run.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "none.jsonl"], "cannot read none.jsonl"),
        (["report", "their_nets.py"], "is not a controlprune history"),
        (["profile", "nets", "--input", "1"], "is not MODULE:FACTORY"),
        (["profile", "no_such_module:f", "--input", "1"], "cannot import no_such_module"),
        (["profile", "broken_nets:net", "--input", "1"], "cannot import broken_nets: ZeroDivisionError"),
        (["profile", "their_nets:absent", "--input", "1"], "nets has no absent"),
        (["profile", "their_nets:needs_width", "--input", "1,4"], "cannot be called without arguments"),
        (["profile", "their_nets:raises", "--input", "1,4"], "nets:raises raised: KeyError: 'no weights'"),
        (["profile", "their_nets:leaves", "--input", "1,4"], "nets:leaves raised: SystemExit: 0"),
        (["profile", "leaving_nets:net", "--input", "1,4"], "cannot import leaving_nets: SystemExit: 1"),
        (["profile", "their_nets:net", "--input", "99999999,99999999"], "the inputs would take 3.7"),
        (["profile", "their_nets:net", "--input", "9" * 30 + ",4"], "the inputs would take"),
        (["profile", "their_nets:number", "--input", "1,4"], "made a int, not a torch.nn.Module"),
        (["profile", "their_nets:net", "--input", "1,5"], "does not run on inputs of shapes [(1, 5)]"),
        (["train", "mnist", "--data", "nowhere"], "no nowhere/mnist/train.parquet"),
        (["train", "digits", "--steps", "5", "--budget", "0.000001"], "feasible"),
        (["train", "digits", "--steps", "5", "--out", "their_nets.py"], "is a file"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("controlprune: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--budget", "1.5"], "no fraction of dense"),
        (["demo", "--budget", "nan"], "no fraction of dense"),
        (["demo", "--budget", "3 apples"], "no fraction of dense"),
        (["train", "digits", "--steps", "0"], "no positive whole number"),
        (["demo", "--seed", str(2**32)], "no seed: give a whole number from 0 to 4294967295"),
        (["demo", "--seed", "-1"], "no seed"),
        (["profile", "a:b", "--input", "1,x"], "no shape"),
        ([], "required"),
    ],
)
def test_a_wrong_argument_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_picture_of_a_format_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = made_up_run().write(tmp_path / "run.jsonl")
    assert main(["report", str(record), "-o", str(tmp_path / "run.docx")]) == 2
    assert "--out" in (error := capsys.readouterr().err)
    assert "docx" in error


def run(folder: Path, arguments: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose streams are what a shell makes them."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-m", "controlprune.app.cli", *arguments],
        cwd=folder, text=True, check=False, stderr=subprocess.PIPE,
        env=environment | streams.pop("env", {}), **streams,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    record = made_up_run().write(tmp_path / "run.jsonl")
    with open("/dev/full", "w") as full:
        done = run(tmp_path, ["report", str(record)], stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("controlprune: error: ")
    assert "space" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    record = made_up_run().write(tmp_path / "run.jsonl")
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run(tmp_path, ["report", str(record)], stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 600 of 600" in done.stdout


def test_help_of_profile_says_that_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    assert "all of their code runs" in " ".join(capsys.readouterr().out.split())


def test_names_reach_a_terminal_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger's record, and a stranger's model, may hold what a terminal obeys."""
    record = made_up_run()
    lines = (
        record.write(tmp_path / "run.jsonl").read_text().replace("layers.0", "\\u001b]0;$x$\\u0007\\u202e")
    )
    (tmp_path / "run.jsonl").write_text(lines)
    assert main(["report", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "run.svg")]) == 0
    shown = capsys.readouterr().out
    assert r"\x1b]0;$x$\x07\u202e" in shown
    assert not set("\x1b\x07\u202e") & set(shown)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_its_line_on_a_terminal_and_is_sparing_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream, total=100).start()
        for _ in range(50):
            progress.advance(2, "working")
    assert terminal.getvalue().count("\r") == 50
    assert terminal.getvalue().count("\n") == 1
    assert file.getvalue().count("\n") == 10


def test_bench_is_the_analysis_of_the_checkout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "tables", "text", "--results", str(tmp_path)]) == 0
    assert "no results yet" in capsys.readouterr().out
    assert main(["bench", "tables", "scratch"]) == 0
    assert "| dense | " in capsys.readouterr().out


def test_bench_says_where_it_runs_from_when_installed_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("controlprune.app.cli.__file__", str(tmp_path / "controlprune" / "app" / "cli.py"))
    assert main(["bench", "tables"]) == 2
    assert "from a checkout of the source" in capsys.readouterr().err
