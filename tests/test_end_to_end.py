"""The README's way, from sound files to a measured encoder, by the commands a user types."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def run(*command: object, status: int = 0) -> str:
    """Run a command line and return what it printed; its errors are part of the assertion."""
    done = subprocess.run(
        [str(BIN / str(command[0])), *map(str, command[1:])], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def way(tmp_path_factory) -> Path:
    """The folder in which the demo's commands have run, on few clips and for few steps."""
    demo = tmp_path_factory.mktemp("demo")
    lists = [f"--segments={demo}/corpus/{name}_segments.csv" for name in ("balanced_train", "eval")]
    store = ["--store", demo / "demo.zarr", "--run", demo / "run"]
    run("ajepa-data", "demo-corpus", demo / "corpus", "--clips", 60)
    run("ajepa-data", "build-audioset", "--audio", demo / "corpus/audio", *lists, "--out", demo / "demo.zarr")
    run("ajepa-data", "propagate-labels", demo / "demo.zarr")
    run("ajepa-data", "verify", demo / "demo.zarr")
    run("ajepa-train", "pretrain", *store, "--recipe", "smoke")
    run("ajepa-train", "evaluate", *store)
    run("ajepa-data", "report", demo / "demo.zarr", "--out", demo / "report" / "mels.png")
    run("ajepa-train", "report", *store, "--out", demo / "report")
    return demo


def test_the_way_ends_in_scores_and_pictures(way):
    """Each command hands over to the next; the last ones say what came out."""
    scores = json.loads((way / "run" / "evaluation.json").read_text())
    assert {"raw", "unambiguous"} <= set(json.dumps(scores).replace('"', " ").split())
    assert len(list((way / "report").glob("*.png"))) >= 3


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["pretrain", "--recipe", "smol"], "small"),
        (["pretrain", "--recipe", "audio-jepa"], "audio-jepa"),
        (["pretrain", "--recipe", "small"], "recipe"),
        (["pretrain", "--recipe", "smoke", "--device", "cuda"], "cuda"),
    ],
)
def test_a_mistake_of_a_newcomer_is_one_line(way, command, said):
    """Misspelt recipe, store of another mel spec, run of another recipe, no GPU: what, where, what to do next."""
    import torch

    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    error = run("ajepa-train", *command, "--store", way / "demo.zarr", "--run", way / "run", status=1)
    assert said in error
    assert error.count("\n") == 1, error
