"""ajepa-train as a newcomer meets it: what it prints, and what it says of mistakes."""

import os
import re
import shlex
import signal
import sys
import time

import numpy as np
import pytest
import torch
from forked import start_forked
from identities import run_identity
from matplotlib.image import imread
from tiny import tiny
from typed_programs import run_line

from ajepa.cli import app
from ajepa.model.jepa import Jepa
from ajepa.model.masking import Masks
from ajepa.model.patches import PatchGrid
from ajepa.recipes import catalogue, pretrain
from ajepa.recipes.catalogue import FINETUNE_RECIPES
from ajepa.report.masks import mask_colours_RC4
from ajepa.report.pictures import running_mean
from ajepa.training.run import Run
from pipeline.errors import STOP_SIGNALS

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.fixture(autouse=True)
def own_signals():
    """main() takes these; pytest wants them back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*arguments, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ajepa-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code or 0


def wish(store_path, run_path, *more):
    return ["pretrain", "--store", store_path, "--run", run_path, "--device", "cpu", *more]


def test_a_run_is_trained_evaluated_and_drawn(store_path, tmp_path, monkeypatch, capsys):
    """The whole of stage two, by its own commands; each says what to do next or what it made."""
    where = tmp_path / "run"
    wanted = wish(store_path, where, "--recipe", "smoke", "--steps", 3, "--set", "probe_every=0")
    assert run(*wanted, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert (
        said.strip()
        == f"{where}: done, 3 steps. Next: ajepa-train evaluate --store {store_path} --run {where}"
    )
    monkeypatch.setattr("ajepa.evaluate.probes.MAX_ATTENTIVE_STEPS", 20)
    assert run("evaluate", "--store", store_path, "--run", where, monkeypatch=monkeypatch) == 0
    assert "log-mel statistics" in capsys.readouterr().out
    best = ["evaluate", "--store", store_path, "--run", where, "--checkpoint", "best"]
    assert run(*best, monkeypatch=monkeypatch) == 1
    assert "no checkpoint was probed, so none is the best; take last" in capsys.readouterr().err
    out = tmp_path / "report"
    assert run("report", "--store", store_path, "--run", where, "--out", out, monkeypatch=monkeypatch) == 0
    drawn = capsys.readouterr().out.split()
    assert drawn == [str(out / name) for name in ("curves.png", "masks.png", "probes.png")]
    assert all(imread(picture).std() > 0.05 for picture in drawn)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--recipe", "smal"], "recipe 'smal' is unknown; did you mean 'small'?"),
        (
            ["--recipe", "esc50"],
            "recipe 'esc50' fine-tunes: ajepa-train finetune --recipe esc50; to pre-train",
        ),
        (["--recipe", "audio-jepa"], "recipe audio-jepa needs audio-jepa"),
        (["--recipe", "smoke", "--batch", "4000"], "do not fill one step of 4000 clips"),
        (["--recipe", "smoke", "--set", "model.dept=1"], "model (JepaSpec) has no field 'dept'"),
        (["--recipe", "a-jepa", "--batch", "30"], "0.02 GB free; not one clip would fit: try --recompute"),
        (["--recipe", "smoke", "--precision", "fp16"], "--precision fp16: computes on CUDA devices only"),
        (["--recipe", "smoke", "--steps", "5", "--epochs", "2"], "steps 5 and epochs 2 are two lengths"),
        (
            ["--recipe", "smoke", "--from", "nowhere"],
            "nowhere: no such run or file; expected a run, an export",
        ),
        (["--store-weight", "0.7"], "1 store weights for 1 stores; give one for each of two or more"),
        (["--window", "8"], "window 8 is of no use to a full shuffle; add --shuffle block"),
        pytest.param(["--recipe", "smoke", "--device", "cuda"], "no CUDA device here", marks=NO_CUDA),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(store_path, tmp_path, monkeypatch, capsys, more, told):
    """What, where, what was expected; status 1; nothing half-made."""
    if "a-jepa" in more:
        monkeypatch.setattr("ajepa.training.memory.free_memory_bytes", lambda device: 20_000_000)
    assert run(*wish(store_path, tmp_path / "run", *more), monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_set_stands_in_the_run_and_is_compared_on_resume(store_path, tmp_path, monkeypatch, capsys):
    """A run says what it was, and is not carried on as another."""
    asked = wish(
        store_path, tmp_path / "run", "--recipe", "smoke", "--steps", 2, "--recompute", "--micro-batch", 3
    )
    first = ["--set", "optimiser.weight_decay=0.1", "--set", "mask_sets=2"]
    assert run(*asked, *first, monkeypatch=monkeypatch) == 0
    kept = Run.open(tmp_path / "run").recipe
    assert (kept["optimiser"]["weight_decay"], kept["mask_sets"], kept["steps"]) == (0.1, 2, 2)
    capsys.readouterr()
    assert run(*asked, *first[:2], monkeypatch=monkeypatch) == 1
    assert "recipe.mask_sets: was 2, now 1" in capsys.readouterr().err


def test_epochs_a_source_and_bad_steps_reach_the_run(store_path, tmp_path, monkeypatch, capsys):
    """A second stage by the command line: its length in epochs, its weights from the first stage."""
    first = wish(store_path, tmp_path / "first", "--recipe", "smoke", "--steps", 1)
    assert run(*first, monkeypatch=monkeypatch) == 0
    more = ["--recipe", "smoke", "--epochs", 1, "--from", tmp_path / "first", "--from-checkpoint", "1"]
    second = wish(store_path, tmp_path / "second", *more, "--on-bad-step", "skip")
    assert run(*second, monkeypatch=monkeypatch) == 0
    told = capsys.readouterr().err
    assert f"begins with encoder, target, predictor of {tmp_path / 'first'} at step 1" in told
    assert "1 epochs of" in told
    trained = Run.open(tmp_path / "second")
    assert trained.recipe["epochs"] == 1
    assert trained.identity.warm_start.step == 1
    assert run(*second, monkeypatch=monkeypatch) == 0


def test_compilation_and_recomputation_reach_the_model(store_path, tmp_path, monkeypatch):
    """Two switches of the command line, off unless asked for."""
    asked = wish(store_path, tmp_path / "run", "--recipe", "smoke", "--steps", 1)
    called = []
    for name in ("compile_stacks", "enable_recompute"):
        monkeypatch.setattr(Jepa, name, lambda model, name=name: called.append(name))
    assert run(*asked, "--compile", "--recompute", monkeypatch=monkeypatch) == 0
    assert sorted(called) == ["compile_stacks", "enable_recompute"]
    assert run(*asked[:4], tmp_path / "other", *asked[5:], monkeypatch=monkeypatch) == 0
    assert len(called) == 2


def test_an_encoder_is_fine_tuned_from_its_run(store_path, tmp_path, monkeypatch, capsys):
    """Pre-trained, fine-tuned, carried on with: a task, a recipe and settings by name; and what was reached."""
    few = ["--recipe", "smoke", "--steps", 1]
    assert run(*wish(store_path, tmp_path / "a", *few), monkeypatch=monkeypatch) == 0
    asked = ["finetune", "--store", store_path, "--run", tmp_path / "b", "--device", "cpu", "--task"]
    more = [
        "--recipe",
        "own-small",
        "--labels",
        "unambiguous",
        "--steps",
        2,
        "--set",
        "augment.roll=false",
    ]
    capsys.readouterr()
    again = [*asked, "own", "--from", tmp_path / "a", *more, "--batch", 8, "--seed", 5]
    assert run(*again, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'b'}: done, 2 steps\n10 eval clips of tiny.zarr; run at step 2\n")
    assert "by unambiguous labels\n" in said
    *table, next_line = said.splitlines()[1:]
    assert next_line == f"Next: ajepa-train predict SOUNDS --model {tmp_path / 'b'} --out classes.csv"
    assert max(map(len, table)) <= 80
    kept = Run.open(tmp_path / "b").recipe
    assert kept["model"]["encoder"]["width"] == pretrain.smoke_recipe().model.encoder.width
    assert (kept["seed"], kept["clips_per_step"], kept["augment"]["roll"]) == (5, 8, False)
    assert run(*again, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err.endswith("b: already at its last step, 2\n")
    for wrong, told in (
        (["esc-50"], "task 'esc-50' is unknown; did you mean 'esc50'?"),
        (["own", "--recipe", "smal"], "fine-tuning recipe 'smal' is unknown"),
        (
            ["own", "--recipe", "a-jepa"],
            "recipe 'a-jepa' pre-trains: ajepa-train pretrain --recipe a-jepa; to",
        ),
        (["own", "--model", "cnn7"], "model 'cnn7' is unknown; did you mean 'cnn6'?"),
        (["own", "--steps", 2, "--epochs", 1], "steps 2 and epochs 1 are two lengths of one run; give one"),
        (["own", "--set", "base_l=1"], "did you mean 'base_lr'?"),
        (["own", "--from", tmp_path / "c"], "c: not a run (no recipe.json)"),
        (["own", "--from", tmp_path / "a", "--from-checkpoint", "7"], "no checkpoint '7'; expected last"),
        (["esc50"], "task esc50 has 50 classes, the store 527"),
    ):
        assert run(*asked, *wrong, monkeypatch=monkeypatch) == 1
        assert told in (error := capsys.readouterr().err)
        assert error.startswith("error: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize("masks", ["curriculum", "spans"])
def test_masks_are_drawn_before_any_run(tmp_path, monkeypatch, capsys, masks):
    """Over a formula's sound where there is no store; a curriculum at five points of it."""
    png = tmp_path / "seen" / "masks.png"
    settings = ["--recipe", "smoke", "--set", f"masks={masks}", "--png", png]
    assert run("masks", *settings, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.strip() == str(png)
    assert imread(png).std() > 0.2
    assert (imread(png).shape[0] > 1_000) is (masks == "curriculum")


def test_masks_are_drawn_over_a_clip_of_the_store(store_path, tmp_path, monkeypatch, capsys):
    """A real one; a store of other features is refused, and so is a name that is no picture's."""
    png = tmp_path / "masks.png"
    asked = ["masks", "--png", png, "--store", store_path, "--recipe"]
    smoke = ["smoke", "--set", "masks=spans"]  # one row of masks instead of a curriculum's five
    assert run(*asked, *smoke, monkeypatch=monkeypatch) == 0
    with_formula = tmp_path / "formula.png"
    assert run("masks", "--png", with_formula, "--recipe", *smoke, monkeypatch=monkeypatch) == 0
    assert not np.array_equal(imread(png), imread(with_formula))
    assert run(*asked, "audio-jepa", monkeypatch=monkeypatch) == 1
    assert "recipe audio-jepa needs audio-jepa" in capsys.readouterr().err
    assert run("masks", "--png", tmp_path / "masks.jpg", monkeypatch=monkeypatch) == 1
    assert "expected a file name that ends in .png" in capsys.readouterr().err


def test_two_stores_are_mixed_by_weight_and_one_is_shuffled_in_blocks(
    store_path, other_store_path, tmp_path, monkeypatch, capsys
):
    """By options alone; what was drawn from where, and how well it mixes, is told."""
    few = ["--recipe", "smoke", "--steps", 2]
    two = ["--store", other_store_path, "--store-weight", 0.9, "--store-weight", 0.1]
    assert run(*wish(store_path, tmp_path / "two", *two, *few), monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert "tiny.zarr: 34 clips, 90.0% of those trained on" in said.err
    assert f"Next: ajepa-train evaluate --store {store_path}" in said.out
    block = ["--shuffle", "block", "--window", 2]
    assert run(*wish(store_path, tmp_path / "block", *block, *few), monkeypatch=monkeypatch) == 0
    assert "block shuffle: 2 blocks of up to 16 clips at a time" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "evaluate", "report"])
def test_a_store_that_is_none_is_named_in_one_line(tmp_path, monkeypatch, capsys, command):
    """A mistyped path is the commonest mistake of all."""
    Run.create_or_open(tmp_path / "run", recipe=catalogue.recipe_to_json(tiny()), identity=run_identity())
    where = ["--store", tmp_path / "nowhere.zarr", "--run", tmp_path / "run"]
    more = ["--out", tmp_path / "out"] if command == "report" else []
    assert run(command, *where, *more, monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'nowhere.zarr'}: not a feature store" in error
    assert error.count("\n") == 1


def test_a_terminated_run_exits_with_status_75_and_carries_on(store_path, tmp_path, monkeypatch, capsys):
    """EX_TEMPFAIL tells a scheduler to queue the very same command again."""
    asked = wish(store_path, tmp_path / "run", "--recipe", "smoke", "--steps", 4000)
    output = tmp_path / "said.txt"
    line = shlex.join(["ajepa-train", *map(str, asked)])
    started = start_forked(
        run_line, line, tmp_path, output=output, environment=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not Run.open(tmp_path / "run").read_metrics():
        assert started.exitcode is None, output.read_text()
        time.sleep(0.1)
    started.terminate()  # SIGTERM
    started.join(timeout=60)
    said = output.read_text()
    assert started.exitcode == 75
    assert "checkpoint written at step" in said
    assert len(re.findall("again|carr(?:y|ies) on", said)) == 1
    assert "Traceback" not in said
    stopped = Run.open(tmp_path / "run")
    assert stopped.newest_step == stopped.read_metrics()[-1]["step"] > 0


def test_a_seed_below_0_is_refused(store_path, tmp_path, monkeypatch, capsys):
    """NumPy has no stream of that name, and would say so in a traceback."""
    assert run(*wish(store_path, tmp_path / "run", "--seed", -1), monkeypatch=monkeypatch) == 2
    assert "Invalid value for '--seed': Input should be greater than or equal to 0" in capsys.readouterr().err


def test_every_recipe_is_listed_with_cost_and_expectation(monkeypatch, capsys):
    """Choosing one must not need the source."""
    assert run("recipes", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    for name in (*pretrain.PRETRAIN_RECIPES, *FINETUNE_RECIPES):
        assert f"\n{name}: " in f"\n{text}"
    assert text.count("Memory:") == len(pretrain.PRETRAIN_RECIPES)
    assert (
        text.count("Cost:")
        == text.count("Expected")
        == len(pretrain.PRETRAIN_RECIPES) + len(FINETUNE_RECIPES)
    )
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_picture_of_masks_shows_each_token_where_it_lies_in_the_spectrogram():
    """Tokens count frequency rows first; transposed, the picture would show other masks than were used."""
    grid = PatchGrid(rows=2, cols=3)
    masks = Masks(context_BK=np.array([[1]]), targets_BGQ=np.array([[[4]]]))
    colour_RC4 = mask_colours_RC4(masks, grid)
    assert colour_RC4.shape == (2, 3, 4)
    assert colour_RC4[1, 0, 3] == 0  # token 1: second row of the first column, visible
    assert 0 < colour_RC4[0, 2, 3] < colour_RC4[0, 0, 3]  # token 4: a target, lighter than what is hidden


def test_a_running_mean_looks_back_only():
    """A curve that knew the future would show learning before it happened."""
    assert running_mean(np.array([4.0, 2.0, 0.0, 6.0]), 1).tolist() == [4.0, 3.0, 1.0, 3.0]
