"""The recipes of the documentation, read out of its pages and run as a user types them, on 40 small clips."""

import csv
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import soundfile
from forked import start_forked
from pages import PAGES, first_block
from stores import assert_same_bytes
from typed_programs import run_line, run_python

from ajepa.training.run import Run
from pipeline.build.plan import current_versions
from pipeline.store.feature_store import FeatureStore

BIN = Path(sys.executable).parent

ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}

STEPS = 12

SMALLER = {  # what stands between a recipe as printed and one that ends in seconds
    "--workers 8": "--workers 1",
    "--recipe a-jepa": f"--recipe smoke --steps {STEPS} --set checkpoint_every=2",
    "--task audioset": "--task audioset --set steps=2 --batch 4",
}


def swapped(text: str, swaps: dict[str, str]) -> str:
    """`text` with every one of these in it replaced; each must be there, so that none outlives its page."""
    for old, new in swaps.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def typed(command: str, folder: Path) -> str:
    """Run lines as a shell would, from `folder`; what they printed, their errors being part of the assertion."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def started(command: str, folder: Path) -> subprocess.Popen:
    """A command in the background; `exec`, so that signals reach the program and not its shell."""
    return subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def started_fork(function: Callable[..., Any], text: str, folder: Path, output: Path) -> ForkServerProcess:
    """A line or a block in the background, in a process that need not import PyTorch; `output` gets what it prints."""
    return start_forked(function, text, folder, output=output, environment=ENVIRONMENT)


def output_of_fork(function: Callable[..., Any], text: str, folder: Path, output: Path) -> str:
    """What a line or a block prints, run to its end in a process that need not import PyTorch."""
    process = started_fork(function, text, folder, output)
    process.join()
    said = output.read_text()
    assert process.exitcode == 0, said[-2000:]
    assert "Traceback" not in said
    return said


def until(seen: Callable[[], object], process: subprocess.Popen | ForkServerProcess) -> None:
    """Wait until there is something to see; the process must not end before."""
    while not seen():
        ended = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        assert ended is None, process
        time.sleep(0.02)


def python(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with the names that the pages use, filled by the first command."""
    folder = tmp_path_factory.mktemp("desk")
    typed("ajepa-data demo-corpus corpus --clips 40", folder)
    (folder / "corpus" / "audio").rename(folder / "clips")
    for name in ("balanced_train", "eval"):
        (folder / "corpus" / f"{name}_segments.csv").rename(folder / f"{name}_segments.csv")
    with (folder / "corpus" / "truth.csv").open(newline="", encoding="utf-8") as file:
        good = [row for row in csv.DictReader(file) if row["expected"] == "good"]
    some = [folder / row["file"].replace("audio/", "clips/") for row in good[-12:]]
    for name, sounds in (("mine", some[:4]), ("sounds", some)):
        (folder / name).mkdir()
        for sound in sounds:
            shutil.copy(sound, folder / name)
    lines = [
        f"{path.name},{'dog;bark' if k % 2 else 'cat'},{'eval' if k > 7 else 'train'}"
        for k, path in enumerate(some)
    ]
    (folder / "labels.csv").write_text("path,label,split\n" + "\n".join(lines) + "\n")

    # Modules of the user's own, with names that Python and we have too: no command may import them.
    for name in ("signal", "types", "pipeline", "torch"):
        (folder / f"{name}.py").write_text("raise SystemExit('the user has a module of this name')")

    (folder / "recordings").mkdir()
    noise_S = 0.1 * np.random.default_rng(0).standard_normal(25 * 16_000)
    soundfile.write(folder / "recordings" / "long.flac", noise_S, 16_000)
    return folder


@pytest.fixture(scope="module")
def trained(desk, tmp_path_factory) -> dict[str, str]:
    """All of docs/audioset.md's first block has run in `desk`; what each line printed, by its first two words.

    A shell runs the lines to the first one that trains; the others need not import PyTorch again.
    """
    folder = tmp_path_factory.mktemp("said")
    said = {}
    for number, line in enumerate(swapped(first_block("docs/audioset.md"), SMALLER).splitlines()):
        name = " ".join(line.split()[:2])
        if "ajepa-train pretrain" in said:
            said[name] = output_of_fork(run_line, line, desk, folder / f"{number}.txt")
        else:
            said[name] = typed(line, desk)
    return said


def test_your_copy_of_audioset(desk, trained):
    """From sounds to scores, a page and embeddings: each line tells the next one, and leaves what it promises."""
    lines = first_block("docs/audioset.md").splitlines()
    told = [hint for said in trained.values() for hint in re.findall(r"Next: (.*)", said)]
    assert told == [lines[1], lines[5], "ajepa-train predict SOUNDS --model runs/b --out classes.csv"]
    assert {"raw", "unambiguous"} <= set(
        (desk / "runs/a/evaluation.json").read_text().replace('"', " ").split()
    )
    assert re.search(r"done, 2 steps\n(.*\n)*mAP\n", trained["ajepa-train finetune"])
    for page in ("report.html", "run.html"):
        assert "</html>" in (desk / page).read_text()[-20:]
    table = pl.read_parquet(desk / "embeddings.parquet")
    assert len(table) == len(list((desk / "mine").iterdir()))


def test_a_build_that_is_killed_carries_on_to_the_same_bytes(desk, trained):
    """kill -9 once the first shard is committed, then the very same command."""
    first, second, *_ = swapped(
        first_block("docs/audioset.md"), SMALLER | {"as20k.zarr": "killed.zarr"}
    ).splitlines()
    process = started(first, desk)
    until(lambda: list((desk / "killed.zarr/ledger").glob("*.parquet")), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    typed(f"{first}\n{second}", desk)
    assert_same_bytes(desk / "as20k.zarr", desk / "killed.zarr")
    assert json.loads((desk / "killed.zarr/build.json").read_text())["versions"] == current_versions()


def test_a_run_that_is_killed_carries_on_to_the_same_weights(desk, trained, tmp_path):
    """kill -9 between two checkpoints, then the very same command: what `runs/a` ended with, bit for bit."""
    pretrain = swapped(first_block("docs/audioset.md"), SMALLER | {"runs/a": "runs/killed"}).splitlines()[4]
    process = started_fork(run_line, pretrain, desk, tmp_path / "killed.txt")
    until(lambda: list((desk / "runs/killed/checkpoints").glob("step-*[0-9]/state.json")), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 0 < Run.open(desk / "runs/killed").newest_step < STEPS
    assert f"done, {STEPS} steps" in output_of_fork(run_line, pretrain, desk, tmp_path / "again.txt")
    digests = [
        json.loads((desk / f"runs/{name}/checkpoints/step-{STEPS:08d}/state.json").read_text())["sha256"]
        for name in ("a", "killed")
    ]
    assert digests[0] == digests[1]


SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n'

SCONTROL = '#!/bin/bash\necho "$@" >> requeued\n'


def test_a_slurm_array_that_is_warned_is_requeued_and_finishes(desk, trained, tmp_path):
    """Two tasks of an array; the first is warned once, ends with 75, is queued again: the bytes of one machine."""
    for name, program in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(stat.S_IRWXU)
    swaps = {
        "/data/audioset": "clips",
        "/data/": "",
        "unbalanced": "balanced",
        "--workers 8": "--workers 1",
        "/16": "/2",
    }
    (tmp_path / "job.sh").write_text(swapped(first_block("docs/clusters.md"), swaps))
    slurm = {"PATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}", "SLURM_JOB_ID": "4711"}

    def submitted(task: int) -> subprocess.Popen:
        task_of = {"SLURM_ARRAY_TASK_ID": str(task)}
        return subprocess.Popen(["bash", tmp_path / "job.sh"], cwd=desk, env=ENVIRONMENT | slurm | task_of)

    job = submitted(0)
    until(lambda: list((desk / "as2m.zarr/ledger").glob("*.parquet")), job)
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@60 does, to the script alone
    job.wait()
    assert (desk / "requeued").read_text() == "requeue 4711\n"
    jobs = [submitted(task) for task in (0, 1)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert (desk / "requeued").read_text() == "requeue 4711\n"
    typed("ajepa-data propagate-labels as2m.zarr", desk)
    assert_same_bytes(desk / "as20k.zarr", desk / "as2m.zarr")


def test_your_own_sounds(desk):
    """A table's labels and splits; a recording of 25 s cut into pieces of 10, 10 and 5 s."""
    said = typed(first_block("docs/own-sounds.md"), desk)
    assert "Next: ajepa-data inspect mine.zarr" in said
    mine, long = FeatureStore.open(desk / "mine.zarr"), FeatureStore.open(desk / "long.zarr")
    assert set(mine.classes.names) == {"bark", "cat", "dog"}
    assert dict(mine.manifest["split"].value_counts().iter_rows()) == {"train": 8, "eval": 4}
    assert mine.labels_BC(mine.good_rows(["eval"]), "raw").sum() == 2 * 1 + 2 * 2
    assert long.manifest["n_frames"].to_list() == [998, 998, 498]


def test_the_store_from_python(desk, trained):
    """The block of docs/store.md: shapes and kinds as its comments say, and any Zarr library sees the same."""
    program = first_block("docs/store.md")
    tell = (
        "print(mel.dtype, mel.shape, labels.dtype, labels.shape, type(store.manifest), (same == mel).all())"
    )
    rows = FeatureStore.open(desk / "as20k.zarr").good_rows(["eval"])
    shapes = dict(re.findall(r"^(\w+) = .*# float(?:16|32) \[64, (.*?)\]", program, re.MULTILINE))
    kinds = dict(re.findall(r"^(\w+) = .*# (float\d+)", program, re.MULTILINE))
    told = "".join(f"{kinds[name]} ({len(rows)}, {shapes[name]}) " for name in ("mel", "labels"))
    assert python(f"{program}\n{tell}", desk) == f"{told}<class 'polars.dataframe.frame.DataFrame'> True\n"


def test_embeddings_from_python(desk, trained, tmp_path):
    """The block of docs/embed.md, on sounds of two names that it uses."""
    for name, sound in zip(("a.mp3", "b.wav"), sorted((desk / "mine").iterdir()), strict=False):
        shutil.copy(sound, desk / name)  # content decides, not the extension
    tell = "f = found[0]; print(len(found.clips_BD), found.clips_BD.dtype, len(f.frames_TD) == len(f.times_ms_T))"
    program = f"{first_block('docs/embed.md')}\n{tell}"
    said = output_of_fork(run_python, program, desk, tmp_path / "said.txt")
    assert said.splitlines()[-1] == "2 torch.float32 True"


def test_a_sound_is_nearest_to_itself(desk, trained, tmp_path):
    """`nearest`, as the table of commands has it, in the file that `embed` wrote."""
    sound = sorted((desk / "mine").iterdir())[0]
    asked = re.search(r"`(ajepa-train nearest .*?)`", PAGES["docs/commands.md"])[1]
    here = swapped(
        asked, {"QUERY": f"mine/{sound.name}", "FILE": "embeddings.parquet", "--model M": "--model runs/a"}
    )
    note, first, *_ = output_of_fork(run_line, here, desk, tmp_path / "said.txt").splitlines()
    assert note.startswith(f"mine/{sound.name}: is in the table itself")
    similarity, *_, path = first.split("  ")
    assert Path(path).name == sound.name
    assert float(similarity) == pytest.approx(1, abs=1e-3)


def test_labels_without_a_store(desk):
    """Lists in, a table out."""
    typed(first_block("docs/labels.md", "Without a store"), desk)
    table = pl.read_parquet(desk / "labels.parquet")
    assert (table["unambiguous"].list.len() >= table["raw"].list.len()).all()
