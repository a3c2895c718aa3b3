"""The commands of ajepa-data: their output, and their messages about mistakes."""

import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from command_line import run
from corpus import write_corpus

from pipeline import errors
from pipeline.cli import options
from pipeline.store.feature_store import FeatureStore
from pipeline.store.shards import shard_path

PROGRAM = [sys.executable, "-c", "if __name__ == '__main__':\n    from pipeline.cli.app import main; main()"]


def build_arguments(corpus, out, *more):
    """The arguments of a command that builds a store of the corpus."""
    lists = [f"--segments={corpus / name}" for name in ("a_train_segments.csv", "eval_segments.csv")]
    return ["build-audioset", "--audio", corpus / "audio", *lists, "--out", out, "--workers", 0, *more]


def test_a_store_is_built_propagated_verified_and_shown(tmp_path, monkeypatch, capsys):
    """All of stage one, by its commands."""
    corpus = write_corpus(tmp_path / "corpus", clips=20)
    out = tmp_path / "x.zarr"
    assert run(*build_arguments(corpus, out), monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    assert "missing" in output
    assert f"Next: ajepa-data propagate-labels {out}\n" in output
    assert f"each failed clip with its reason: ajepa-data inspect {out} --failed\n" in output
    assert run("propagate-labels", out, monkeypatch=monkeypatch) == 0
    assert (
        "counts are of all 20 listed rows, with a sound or without; 18 are good\n" in capsys.readouterr().out
    )
    assert run("verify", out, monkeypatch=monkeypatch) == 0
    assert run("report", out, "--out", tmp_path / "mels.png", monkeypatch=monkeypatch) == 0
    assert (tmp_path / "mels.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--spec", "ajepa"], "a-jepa"),
        (["--dtype", "float32"], "float16 or uint8"),
        (["--audio", "nowhere"], "nowhere: no such folder"),
        (["--segments", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(corpus, tmp_path, monkeypatch, capsys, more, said):
    """It says what, where and what was expected; the status is 1, and nothing is half-made."""
    assert run(*build_arguments(corpus, tmp_path / "x.zarr", *more), monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["propagate-labels", "verify"])
def test_a_folder_that_is_no_store_is_refused_in_one_line(tmp_path, monkeypatch, capsys, command):
    """The line names the command that makes one."""
    assert run(command, tmp_path, monkeypatch=monkeypatch) == 1
    assert "ajepa-data build-audioset" in capsys.readouterr().err


def test_faults_end_in_status_1(store_path, tmp_path, monkeypatch, capsys):
    """A script must be able to stop on them."""
    copy = shutil.copytree(store_path, tmp_path / "copy.zarr")
    (copy / "stats.json").unlink()
    assert run("verify", copy, monkeypatch=monkeypatch) == 1
    assert "stats.json" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupted_build_says_that_it_carries_on(corpus, tmp_path, number):
    """Ctrl-C, a batch system's SIGTERM and its warning: one line, status 75, and no worker left behind."""
    arguments = [str(a) for a in build_arguments(corpus, tmp_path / "x.zarr", "--workers", 1)]
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while not (tmp_path / "x.zarr" / "build.lock").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == errors.RUN_AGAIN_STATUS
    assert "the same command carries on" in error
    assert "Traceback" not in error


def test_a_command_may_open_as_many_files_as_the_system_lets_it():
    """Four stores with 256 open shards each reach the default limit of 1,024 files in the middle of training."""
    program = (
        "import resource as r, typer; from pipeline.cli.options import run_command_line; app = typer.Typer();"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (min(hard, 1_024), hard));"
        "app.command()(lambda: print(r.getrlimit(r.RLIMIT_NOFILE)[0])); run_command_line(app)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(process.stdout) == min(hard_limit, options.MAX_OPEN_FILES)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are tied to their parent by Linux' prctl")
def test_workers_do_not_outlive_a_killed_build(corpus, tmp_path):
    """An orphan would write into the store beside the next build, outside its lock.

    Nor do they hear Ctrl-C, which goes to all processes of a terminal: one that is still importing would print that.
    """
    arguments = [str(a) for a in build_arguments(corpus, tmp_path / "x.zarr", "--workers", 2)]
    process = subprocess.Popen([*PROGRAM, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ledger = tmp_path / "x.zarr" / "ledger"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list(ledger.glob("*.parquet")):
        time.sleep(0.02)
    workers = children.read_text().split()
    blocked = [blocked_signals(pid) for pid in workers if "spawn_main" in command_of(pid)]
    process.kill()
    process.wait()
    assert len(blocked) == 2
    assert all(signals >> (signal.SIGINT - 1) & 1 for signals in blocked)
    assert len(workers) >= 2
    deadline = time.monotonic() + 60  # one that is still importing sees it afterwards
    while alive := [pid for pid in workers if "spawn_main" in command_of(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def blocked_signals(pid: str) -> int:
    """The mask of the signals that a process blocks."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^SigBlk:\s*(\w+)", status, re.MULTILINE)[1], 16)


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_one_pass_makes_a_store_for_every_spec(corpus, tmp_path, monkeypatch, capsys):
    """One spec is a preset, the other a user's file; each --spec has its own --out."""
    (tmp_path / "mine.toml").write_text('base = "a-jepa"\nmel_bands = 40\n')
    more = ["--spec", "audio-jepa", "--spec", tmp_path / "mine.toml", "--out", tmp_path / "b.zarr"]
    assert run(*build_arguments(corpus, tmp_path / "a.zarr", *more), monkeypatch=monkeypatch) == 0
    assert FeatureStore.open(tmp_path / "a.zarr").spec.name == "audio-jepa"
    assert FeatureStore.open(tmp_path / "b.zarr").spec.mel_bands == 40
    assert (
        run(
            *build_arguments(corpus, tmp_path / "c.zarr", *more),
            "--out",
            tmp_path / "d.zarr",
            monkeypatch=monkeypatch,
        )
        == 1
    )
    assert "2 --spec and 3 --out: every store needs one of each" in capsys.readouterr().err


def test_parts_and_finalize_by_their_commands(corpus, tmp_path, monkeypatch, capsys):
    """In a job array of two, `finalize` names missing shards, and the last part finishes the store."""
    out = tmp_path / "x.zarr"
    assert run(*build_arguments(corpus, out, "--part", "1/2"), monkeypatch=monkeypatch) == 0
    assert "part 1/2 is done" in capsys.readouterr().out
    assert run("finalize", out, monkeypatch=monkeypatch) == 1
    assert "2 of 3 shards are not built, the first is 0" in capsys.readouterr().err
    assert run(*build_arguments(corpus, out, "--part", "0/2"), monkeypatch=monkeypatch) == 0
    assert run("finalize", out, monkeypatch=monkeypatch) == 0
    assert run("verify", out, "--sample", "1", monkeypatch=monkeypatch) == 0


def test_damaged_lines_are_left_out_when_asked(corpus, tmp_path, monkeypatch, capsys):
    """--lenient names the damaged lines; without it nothing is built."""
    lists = tmp_path / "a_train_segments.csv"
    lists.write_text((corpus / "a_train_segments.csv").read_text() + '#NAME?, 30.000, 40.000, "/m/04rlf"\n')
    arguments = ["build-audioset", "--audio", corpus / "audio", "--segments", lists, "--workers", 0]
    assert run(*arguments, "--out", tmp_path / "x.zarr", monkeypatch=monkeypatch) == 1
    assert "line 40" in capsys.readouterr().err
    assert run(*arguments, "--out", tmp_path / "x.zarr", "--lenient", monkeypatch=monkeypatch) == 0
    assert "#NAME?" in capsys.readouterr().err


def test_a_repair_is_one_command(store_path, tmp_path, monkeypatch, capsys):
    """Status 1 and the command for it; then status 0 and a store that is whole."""
    copy = shutil.copytree(store_path, tmp_path / "copy.zarr")
    shard_path(copy, 1).write_bytes(b"short")
    assert run("verify", copy, monkeypatch=monkeypatch) == 1
    assert f"1 fault; mend with: ajepa-data verify {copy} --repair" in capsys.readouterr().err
    assert run("verify", copy, "--repair", "--workers", 0, monkeypatch=monkeypatch) == 0
    assert run("verify", copy, monkeypatch=monkeypatch) == 0


def test_a_path_that_exists_and_is_no_store_is_left_alone(corpus, tmp_path, monkeypatch, capsys):
    """The user may give some folder or file as --out by mistake."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        assert run(*build_arguments(corpus, tmp_path / name), monkeypatch=monkeypatch) == 1
        assert "is there already and is no store; choose another --out" in capsys.readouterr().err
    assert not list((tmp_path / "folder").iterdir())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_page_needs_the_name_of_a_file(store_path, monkeypatch, capsys):
    """The folder `/` is not the name of a file."""
    assert run("report", store_path, "--html", "/", monkeypatch=monkeypatch) == 1
    assert "/: is a folder; expected the name of a file" in capsys.readouterr().err


def test_lists_are_propagated_to_a_table(corpus, tmp_path, monkeypatch, capsys):
    """Several lists, splits by commas or repeated; a mistake is one line and leaves nothing."""
    lists = [corpus / name for name in ("a_train_segments.csv", "eval_segments.csv")]
    out = tmp_path / "labels.parquet"
    assert (
        run("propagate-labels", *lists, "--out", out, "--splits", "a_train,eval", monkeypatch=monkeypatch)
        == 0
    )
    both = pl.read_parquet(out)
    printed = capsys.readouterr().out
    assert "biggest gainers" in printed
    assert "listed rows, with a sound or without\n" in printed
    more = ["--splits", "a_train", "--splits", "eval"]
    assert run("propagate-labels", *lists, "--out", out, *more, monkeypatch=monkeypatch) == 0
    assert pl.read_parquet(out).equals(both)
    assert run("propagate-labels", *lists, "--out", out, "--splits", "a_train", monkeypatch=monkeypatch) == 0
    one = pl.read_parquet(out)
    untouched = one.filter(pl.col("split") == "eval")
    assert untouched["unambiguous"].equals(untouched["raw"], null_equal=True)
    assert "raw labels kept in: eval" in capsys.readouterr().out
    assert not one["unambiguous"].equals(both["unambiguous"])
    assert run("propagate-labels", *lists, monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert "add --out FILE.parquet" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.parquet", "labels.propagation.json"]
