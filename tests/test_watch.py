"""A run that is watched is the run that is not; a collapse ends it, and nothing else does."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny
from tqdm import tqdm

from ajepa.collapse import LEAST_CONTENT, LEAST_RANK, LEAST_SPREAD, PATIENCE, in_a_row, signs
from ajepa.compute import read
from ajepa.curriculum import Fixed
from ajepa.features import Views, features
from ajepa.jepa import Jepa
from ajepa.loop import PROGRESS, SCORE, postfix
from ajepa.masking import RandomPatches
from ajepa.metrics import mean_average_precision
from ajepa.optimiser import Schedule
from ajepa.pretrain import pretrain
from ajepa.probes import knn_NC, linear_NC, standardised
from ajepa.probing import PROBE_L2, open_probe
from ajepa.recipes import Pretrain
from ajepa.report import curves
from ajepa.run import Run
from pipeline.errors import BrokenClip, Interrupted, RunError
from pipeline.store import FeatureStore

WATCHED = {"health_every": 4, "probe_every": 8, "probe_clips": 20}


def watched(**changes) -> Pretrain:
    return tiny(**WATCHED, **changes)


def quietly(store_path, run_path, recipe, **wishes) -> Run:
    return pretrain(store_path, recipe, run_path, device="cpu", **{"say": lambda line: None} | wishes)


@pytest.fixture(scope="module")
def whole(store_path, tmp_path_factory) -> Run:
    """Thirty steps, watched, without a break."""
    return quietly(store_path, tmp_path_factory.mktemp("runs") / "whole", watched())


def assert_same_weights(one: Run, other: Run) -> None:
    parts, others = one.load().parts, other.load().parts
    for part, tensors in parts.items():
        assert all(torch.equal(value, others[part][name]) for name, value in tensors.items())


def seen(run: Run, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in run.metrics() if name in line}


def test_watching_changes_neither_weights_nor_losses_by_a_bit(store_path, tmp_path, whole):
    """Else nobody could say what a watched run would have been."""
    alone = quietly(store_path, tmp_path / "run", tiny(health_every=0))
    assert_same_weights(alone, whole)
    for name in ("loss", "gradient_norm", "explained"):
        assert seen(alone, name) == seen(whole, name)
    assert not [key for line in alone.metrics() for key in line if key.startswith(("health", "probe"))]


def test_looks_are_taken_at_their_steps_and_after_the_last(whole):
    """The end of a run is what is kept, so it is measured whatever its length."""
    assert list(seen(whole, "health_rank")) == [4, 8, 12, 16, 20, 24, 28, 30]
    assert list(seen(whole, "probe_linear_raw")) == [8, 16, 24, 30]
    assert set(seen(whole, SCORE)) == {8, 16, 24, 30}


def test_the_best_checkpoint_is_that_of_the_best_probe(whole):
    """The number that the loop compares is the mean of all that were probed."""
    scores = seen(whole, SCORE)
    line = next(line for line in whole.metrics() if SCORE in line)
    probes = [value for key, value in line.items() if key.startswith(("probe_linear", "probe_knn"))]
    assert len(probes) == 4  # two probes on two label sets
    assert line[SCORE] == pytest.approx(np.mean(probes))
    assert whole.best.score == max(scores.values())
    assert scores[whole.best.step] == whole.best.score


def test_the_last_probe_is_that_of_the_last_checkpoint(store, whole):
    """Two ways that must agree: under way, and from the weights that were kept."""
    recipe = watched()
    encoder = Jepa(recipe.model).target
    encoder.load_state_dict(whole.load("target").parts["target"])
    probe = open_probe(store, recipe, whole.identity, "raise", print)
    views = Views(store=store, frames=64, mean=whole.identity["mean"], std=whole.identity["std"])
    assert (len(probe.train_N), len(probe.eval_N)) == (20, 10)
    assert set(probe.eval_N) <= set(store.good_rows(["eval"]))
    assert not set(probe.train_N) & set(probe.eval_N)
    known, asked = standardised(
        features(views, probe.train_N, encoder), features(views, probe.eval_N, encoder)
    )
    for name in ("raw", "unambiguous"):
        train_NC, eval_NC = store.labels_BC(probe.train_N, name), store.labels_BC(probe.eval_N, name)
        linear = linear_NC(known, train_NC, asked, l2=PROBE_L2)
        nearest = knn_NC(known, train_NC, asked)
        for kind, scores in (("linear", linear), ("knn", nearest)):
            expected = mean_average_precision(eval_NC, scores).value
            assert whole.metrics()[-1][f"probe_{kind}_{name}"] == pytest.approx(expected, abs=1e-6)


def test_an_interrupted_run_sees_the_same_and_has_cost_the_same(store_path, tmp_path, whole, monkeypatch):
    """Health, probes and counts are those of a run that was never stopped; only hours may differ."""
    log = Run.log

    def log_and_ask(run, line):
        log(run, line)
        if line["step"] == 14:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", log_and_ask)
    with pytest.raises(Interrupted):
        quietly(store_path, tmp_path / "run", watched())
    monkeypatch.undo()
    assert [spent.step for spent in read(tmp_path / "run")] == [5, 8, 10, 14]
    run = quietly(store_path, tmp_path / "run", watched())
    for name in ("health_rank", "health_content", SCORE, "probe_knn_raw"):
        assert seen(run, name) == seen(whole, name)
    one, other = (
        {spent.step: replace(spent, hours=0, peak_memory_gb=0) for spent in read(each.path)}
        for each in (run, whole)
    )
    assert other[30] == one[30]
    assert all(one[step] == other[step] for step in other if step in one)


def test_what_a_run_has_cost_is_in_its_folder(whole):
    """Clips and tokens are the recipe's arithmetic; the newest checkpoint's counts come first."""
    told = json.loads((whole.path / "compute.json").read_text())
    assert (told["step"], told["clips"], told["teacher_tokens"]) == (30, 240, 240 * 32)
    assert 0 < told["context_tokens"] < 240 * 32
    assert told["flop_per_s"] == pytest.approx(told["flop"] / told["hours"] / 3600)
    assert 0.05 < told["peak_memory_gb"] < 50
    assert told["device"] == f"CPU, {torch.get_num_threads()} threads"
    steps = [spent["step"] for spent in told["earlier"]]
    assert steps == sorted(steps)
    assert {5, 10, 15, 20, 25} <= set(steps)


def test_counts_after_a_kill_are_those_of_the_checkpoint_that_is_left(store_path, tmp_path, whole):
    """compute.json is written before the checkpoint: what it says beyond that never happened."""
    path = tmp_path / "run"
    quietly(store_path, path, watched(), say=lambda line: None)
    for folder in Run.open(path).checkpoints()[-1:]:
        folder.rename(tmp_path / "lost")
    assert Run.open(path).step < 30
    run = quietly(store_path, path, watched())
    assert read(run.path)[-1].flop == read(whole.path)[-1].flop
    assert [spent.step for spent in read(run.path)].count(30) == 1


class Unlabelled:
    """What `open_probe` asks of a store: train clips, perhaps eval clips, and no label."""

    place, label_sets = "here.zarr", ("raw",)

    def __init__(self, store, splits) -> None:
        self.manifest = store.manifest.filter(store.manifest["split"].is_in(splits))

    def good_rows(self, splits):
        return np.arange(40)

    def labels_BC(self, rows_B, label_set):
        return np.zeros((len(rows_B), 3), np.float32)


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        (["a_train"], "no clip of a split named eval or test"),
        (["a_train", "eval"], "no clip to measure on has a label"),
    ],
)
def test_a_store_that_cannot_be_probed_is_told_once(store, splits, told):
    """Pre-training needs no labels; that a curve will be missing is said before the first step."""
    lines = []
    assert open_probe(Unlabelled(store, splits), watched(), {}, "raise", lines.append) is None
    assert lines == [f"here.zarr: no probe while training: {told}"]
    assert open_probe(Unlabelled(store, splits), tiny(probe_every=0), {}, "raise", lines.append) is None
    assert len(lines) == 1


def test_clips_that_cannot_be_read_are_left_out_of_probes_where_that_is_allowed(store, whole, monkeypatch):
    """As the loaders do; and only then."""
    read_rows = FeatureStore.read
    bad = store.good_rows(["eval"])[1]

    def damaged(store, rows_B, **how):
        if bad in rows_B:
            raise BrokenClip(int(bad), f"row {bad} cannot be read")
        return read_rows(store, rows_B, **how)

    monkeypatch.setattr(FeatureStore, "read", damaged)
    recipe, model = replace(watched(), probe_clips=100), Jepa(tiny().model)
    strict, lenient = (open_probe(store, recipe, whole.identity, how, print) for how in ("raise", "skip"))
    assert bad in strict.eval_N
    with pytest.raises(BrokenClip):
        strict.scores(model)
    told = lenient.scores(model)
    assert lenient.broken == {bad}
    assert 0 < told["probe_knn_raw"] < 1


def collapsing() -> Pretrain:
    """No lag between teacher and student, and steps three times as long: all features alike after 60 of 300."""
    return tiny(
        model=replace(tiny().model, loss="squared_l2"),
        masks=replace(tiny().masks, steps=300),
        schedule=Schedule(peak_lr=3e-3, warmup_share=0.1, ema_start=0.0, ema_end=0.0),
        steps=300,
        checkpoint_every=1_000,
        health_every=20,
    )


def test_a_collapse_is_told_then_kept_then_ends_the_run(store_path, tmp_path, monkeypatch):
    """The rest of it would be heat; the same command does not go on, unless it is told to."""
    lines: list[str] = []
    with pytest.raises(RunError) as refused:
        quietly(store_path, tmp_path / "run", collapsing(), say=lines.append)
    run, message = Run.open(tmp_path / "run"), str(refused.value)
    warnings = [line for line in lines if "collapsing: " in line]
    looks = [line for line in run.metrics() if "health_spread" in line]
    assert warnings
    assert all("the run stops if 3 looks in a row find it" in line for line in warnings)
    assert in_a_row(looks) == PATIENCE
    assert run.step == looks[-1]["step"] < 200
    assert message.startswith(f"{run.path}: step {run.step}: collapsed: {signs(looks[-1])[0]}")
    assert f"seen in the checkpoint of step {run.step}; try a lower schedule.peak_lr" in message
    assert "\n" not in message
    assert read(run.path)[-1].step == run.step
    with pytest.raises(RunError, match="run: collapsed: "):
        quietly(store_path, tmp_path / "run", collapsing())
    assert run.step == looks[-1]["step"]
    monkeypatch.setattr(Run, "log", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        quietly(store_path, tmp_path / "run", collapsing(), on_collapse="warn")
    assert run.step == looks[-1]["step"] + 1


HEALTHY = {
    "tiny": {},
    "slow teacher": {"schedule": Schedule(peak_lr=1e-3, warmup_share=0.1, ema_start=0.99)},
    "cosine": {"model": replace(tiny().model, loss="cosine")},
    "cosines": {"model": replace(tiny().model, loss="squared_l2", targets="cosines")},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_give_no_alarm(store_path, tmp_path, name):
    """From the first steps of a random encoder on: a false alarm would cost a night."""
    changes = {
        "steps": 24,
        "masks": Fixed(masking=RandomPatches()),
        "checkpoint_every": 1_000,
        **HEALTHY[name],
    }
    lines: list[str] = []
    run = quietly(store_path, tmp_path / "run", tiny(**changes, health_every=2), say=lines.append)
    assert not [line for line in lines if "collapsing" in line]
    assert len(seen(run, "health_spread")) == 12


@pytest.mark.parametrize(
    ("name", "least"),
    [("health_spread", LEAST_SPREAD), ("health_rank", LEAST_RANK), ("health_content", LEAST_CONTENT)],
)
def test_each_sign_by_itself_is_enough(name, least):
    """Alike, flat, or blind to the sound: an encoder is lost in each of three ways."""
    well = {"health_spread": 0.6, "health_rank": 20.0, "health_content": 0.5}
    assert signs(well) == []
    assert signs({**well, name: least}) == []
    assert len(signs({**well, name: 0.9 * least})) == 1
    assert in_a_row([{**well, name: 0.0}, well, {**well, name: 0.0}]) == 1


def test_what_to_do_at_a_collapse_is_one_of_two(store_path, tmp_path):
    """A third word is no silent default."""
    with pytest.raises(RunError, match="on_collapse must be stop or warn, got 'cry'"):
        quietly(store_path, tmp_path / "run", tiny(), on_collapse="cry")


def test_the_curves_show_rank_and_probes(whole):
    """A picture without them would be of a run that nobody watched."""
    figure = curves(whole.metrics(), watched())
    titles = [axes.get_title() for axes in figure.axes]
    assert any("rank" in title for title in titles)
    assert any("mAP" in title for title in titles)


def test_the_progress_line_fits_80_columns():
    """Also in the longest run of the largest model, with time left and a bar."""
    line = {"loss": 0.1234, "health_rank": 1023.7, "clips_per_s": 12345.6, "data_wait": 1.0}
    assert postfix(line) == "loss 0.123, rank 1024, 12346 clips/s, wait 100%"
    drawn = tqdm.format_meter(
        100_000, 200_000, 100_000, ncols=80, bar_format=PROGRESS, postfix=postfix(line), ascii=True
    )
    assert drawn == "100000/200000|##  |ETA 27:46:40, loss 0.123, rank 1024, 12346 clips/s, wait 100%"
    assert len(drawn) <= 80
    del line["health_rank"]
    assert postfix(line) == "loss 0.123, 12346 clips/s, wait 100%"
