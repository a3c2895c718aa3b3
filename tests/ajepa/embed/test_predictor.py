"""Predictions: the scores that the run was measured by, of any sound, whole and over time."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny import tiny_finetune

import ajepa
from ajepa.cli import app
from ajepa.embed.embedding_job import make_embedding_job
from ajepa.embed.head import apply_activation
from ajepa.embed.prediction_table import PredictionTable, write_prediction_table
from ajepa.embed.predictor import StretchCutter, load_predictor
from ajepa.evaluate.classifier_scores import classifier_logits_NC
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.recipes.supervised import cnn6_small_recipe
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import AudioError, InputError, RunError
from pipeline.store.feature_store import FeatureStore

RATE_HZ = 16_000

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tones):
    return ajepa.load(tones.tuned, device="cpu")


def wave_of(seconds: float, hz: float) -> np.ndarray:
    return (0.2 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ)).astype(np.float32)


def measured_scores(tones, run=None) -> dict[str, np.ndarray]:
    """The scores of every clip of the store, as the evaluation computes them."""
    store = FeatureStore.open(tones.store)
    trained = TrainedRun.open(run or tones.tuned)
    logits_NC = classifier_logits_NC(trained, store, store.good_rows(), CPU)
    scores_NC = apply_activation(torch.from_numpy(logits_NC), "softmax").numpy()
    return dict(zip(store.manifest["clip_id"], scores_NC, strict=True))


def test_scores_are_those_that_the_run_was_measured_by(tones, model):
    """From the files, through the same front end, views and mean over them; classes by their names."""
    assert model.class_names == ("high", "low")
    expected = measured_scores(tones)
    paths = sorted(tones.sounds.rglob("*.wav"))
    found = model.predict(paths)
    for path, prediction in zip(paths, found, strict=True):
        clip_id = str(path.relative_to(tones.sounds))
        np.testing.assert_allclose(prediction.scores_C, expected[clip_id], atol=2e-3)
    np.testing.assert_allclose(found.scores_BC.sum(1), 1, atol=1e-5)
    right = [
        path.parent.name == prediction.top(1)[0][0] for path, prediction in zip(paths, found, strict=True)
    ]
    assert np.mean(right) > 0.9
    best = found[0].top(2)
    assert [name for name, _ in best] == sorted(model.class_names, key=dict(best).get, reverse=True)


def test_a_long_sound_is_scored_over_time(model):
    """Two seconds low, then two seconds high: the stretches say which is where, with their seconds."""
    wave_S = np.concatenate([wave_of(2.0, 300.0), wave_of(2.0, 3_000.0)])
    (prediction,) = model.predict(wave_S, rate_hz=RATE_HZ, hop_seconds=1.0)
    np.testing.assert_allclose(prediction.spans_W2, [[0, 1], [1, 2], [2, 3], [3, 4]], atol=0.03)
    assert prediction.spans_W2[-1, 1] == prediction.seconds == 4.0
    heard = [model.class_names[place] for place in prediction.scores_WC.argmax(1)]
    assert heard == ["low", "low", "high", "high"]

    # Shorter hops overlap, and the whole sound is scored alike.
    (finer,) = model.predict(wave_S, rate_hz=RATE_HZ, hop_seconds=0.25)
    assert 12 <= len(finer.spans_W2) <= 16
    np.testing.assert_allclose(finer.scores_C, prediction.scores_C, atol=1e-5)
    with pytest.raises(InputError, match=r"hop_seconds 0\.001: expected at least a frame, 0\.01 s"):
        model.predict(wave_S, rate_hz=RATE_HZ, hop_seconds=0.001)


def test_a_stretch_is_scored_like_a_sound_of_its_own(model):
    """Cut by hand, the same scores: time has no other rule than sounds have."""
    wave_S = np.concatenate([wave_of(1.5, 300.0), wave_of(1.5, 3_000.0)])
    (whole,) = model.predict(wave_S, rate_hz=RATE_HZ, hop_seconds=1.5)
    first_frames = 150  # frames of 10 ms
    samples = (first_frames - 1) * 160 + 400
    (alone,) = model.predict(wave_S[:samples], rate_hz=RATE_HZ)
    np.testing.assert_allclose(whole.scores_WC[0], alone.scores_C, atol=2e-3)


@pytest.mark.parametrize(("frames", "hop"), [(4, 4), (4, 2), (4, 1), (10, 3)])
def test_stretches_do_not_depend_on_the_pieces_that_a_sound_comes_in(frames, hop):
    """A decoder's blocks have any length; every frame is in a stretch, and the last one reaches the end."""
    mel_TF = torch.arange(23.0)[:, None]
    results = []
    for piece in (1, 5, 23):
        cutter = StretchCutter(frames, hop)
        cut = [stretch for part in mel_TF.split(piece) for stretch in cutter.push(part)] + cutter.finish()
        results.append([(start, stretch.flatten().tolist()) for start, stretch in cut])
    assert results[0] == results[1] == results[2]
    assert {frame for _, stretch in results[0] for frame in stretch} == set(range(23))
    assert results[0][-1][1][-1] == 22
    assert [start for start, _ in results[0]] == [hop * number for number in range(len(results[0]))]


def test_one_bad_file_costs_its_row(model, tones, tmp_path, capsys):
    """With the reason, in a line as of `embed`; all bad, or asked for, the error is raised."""
    (tmp_path / "text.wav").write_text("no sound")
    good = next(tones.sounds.rglob("*.wav"))
    found = model.predict([tmp_path / "text.wav", good])
    assert found[0].error.reason == "unreadable"
    assert found.errors == {0: found[0].error}
    line = capsys.readouterr().err
    assert line.startswith(f"1 of 2 failed: {tmp_path / 'text.wav'}: unreadable (")
    assert line.endswith("; the row is nan, see .errors\n")
    model.embed([tmp_path / "text.wav", good])
    assert capsys.readouterr().err == line
    assert "1 of 2 failed" in repr(found)
    assert np.isnan(found.scores_BC[0]).all()
    assert np.isfinite(found.scores_BC[1]).all()
    assert found.top(1)[0] == []
    for options in ({"errors": "raise"}, {}):
        with pytest.raises(AudioError, match=r"text\.wav"):
            model.predict([tmp_path / "text.wav"], **options)
    with pytest.raises(RunError, match="errors must be row or raise"):
        model.predict(good, errors="skip")
    with pytest.raises(RunError, match="is an array: say its rate"):
        model.predict(np.zeros(16_000, np.float32))


def test_a_run_without_classes_says_what_to_do(tones, tmp_path):
    """In one line: the command that gives it some."""
    with pytest.raises(RunError, match=r"was pre-trained and has no classes .* ajepa-train finetune --store"):
        load_predictor(tones.pretrained)
    with pytest.raises(RunError, match=r"has no classes to predict; fine-tune it: ajepa-train finetune"):
        ajepa.load(tones.pretrained, device="cpu").predict("a.wav")
    shutil.copytree(tones.tuned, tmp_path / "folds" / "fold1")
    with pytest.raises(RunError, match="holds a run for each fold; give one of them"):
        load_predictor(tmp_path / "folds")


def test_other_networks_predict_too(tones, tmp_path):
    """A CNN has no encoder to embed with, and classes all the same."""
    recipe = cnn6_small_recipe()
    run = finetune(
        tones.store,
        TASKS["own"],
        tiny_finetune(name="cnn6", mel=recipe.mel, model=recipe.model, steps=2, ema=0.0),
        tmp_path / "cnn",
        device="cpu",
        say=lambda line: None,
    )
    predictor = load_predictor(run.path, device="cpu")
    job = make_embedding_job([str(tones.store)], predictor)
    write_prediction_table(predictor, job, tmp_path / "t.parquet", top=0, say=lambda line: None)
    rows = pl.read_parquet(tmp_path / "t.parquet")
    expected = measured_scores(tones, run.path)
    for clip_id, high, low in rows.select("clip_id", "high", "low").iter_rows():
        np.testing.assert_allclose((high, low), expected[clip_id], atol=1e-4)


def run_command(*words, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ajepa-train", *map(str, words)])
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code or 0


def test_the_command_writes_the_table_that_its_suffix_says(tones, tmp_path, monkeypatch, capsys):
    """For a spreadsheet, for a data frame, for a script; a row for each sound, also for a bad one."""
    shutil.copytree(tones.sounds / "low", tmp_path / "low")
    (tmp_path / "low" / "bad.wav").write_text("no sound")
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        words = ["predict", tmp_path / "low", "--model", tones.tuned, "--out", tmp_path / name, "--top", 2]
        assert run_command(*words, "--device", "cpu", monkeypatch=monkeypatch) == 0
        said = capsys.readouterr()
        assert f"{name}: predictions of 20 of 21 sounds; without: 1 unreadable" in said.out
        assert "bad.wav: unreadable" in said.err
    nested = pl.read_parquet(tmp_path / "a.parquet")
    assert nested.columns == ["clip_id", "path", "start", "end", "classes", "scores", "reason", "detail"]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    flat = pl.read_csv(tmp_path / "a.csv")
    assert flat.columns[4:8] == ["class_1", "score_1", "class_2", "score_2"]
    assert flat["class_1"].to_list() == [row["classes"][0] if row["classes"] else None for row in lines]
    assert nested["classes"].to_list() == [row["classes"] for row in lines]
    assert flat.filter(pl.col("reason") == "unreadable")["score_1"].to_list() == [None]

    # Over time, and every class by its name.
    words = ["predict", tmp_path / "low", "--model", tones.tuned, "--out", tmp_path / "b.csv", "--top", 0]
    assert run_command(*words, "--hop-seconds", 0.5, monkeypatch=monkeypatch) == 0
    table = pl.read_csv(tmp_path / "b.csv")
    assert table.columns == ["clip_id", "path", "row", "start", "end", "high", "low", "reason", "detail"]
    assert table["row"].value_counts(sort=True)["row"].to_list()[0] == "stretch"
    assert table.filter(pl.col("row") == "stretch")["end"].max() == 1.0

    # What cannot be is one line.
    capsys.readouterr()
    for wrong, said in (
        (["--out", tmp_path / "x.txt"], "expected a table, NAME.parquet"),
        (["--out", tmp_path / "a.csv"], "holds other predictions (top: was 2, now 5)"),
        (["--out", tmp_path / "c.csv", "--model", tones.pretrained], "has no classes to predict"),
    ):
        words = ["predict", tmp_path / "low", "--model", tones.tuned, *wrong]
        assert run_command(*words, monkeypatch=monkeypatch) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_table_that_was_interrupted_is_carried_on_to_the_same_bytes(tones, tmp_path, monkeypatch):
    """Parts are scored together whatever was done before."""
    monkeypatch.setattr("ajepa.embed.prediction_table.PART_SOUNDS", 16)
    predictor = load_predictor(tones.tuned, device="cpu")
    job = make_embedding_job([str(tones.sounds)], predictor)
    said = []

    def write_table(name, **options):
        return write_prediction_table(predictor, job, tmp_path / name, say=said.append, **options)

    write_table("whole.parquet")

    class Killed(BaseException):
        pass

    write_part = PredictionTable.write_part

    def write_first_part_alone(table, first, frame):
        if first:
            raise Killed
        write_part(table, first, frame)

    with monkeypatch.context() as patches:
        patches.setattr(PredictionTable, "write_part", write_first_part_alone)
        with pytest.raises(Killed):
            write_table("killed.parquet")
    assert not (tmp_path / "killed.parquet").exists()
    write_table("killed.parquet")
    assert said[-1] == f"{tmp_path / 'killed.parquet'}: carrying on after 16 of 40 sounds"
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    write_table("killed.parquet")
    assert said[-1].endswith("killed.parquet: already complete")

    # Tables of earlier versions were begun with absolute paths, and are carried on with them.
    monkeypatch.chdir(tones.sounds.parent)
    with monkeypatch.context() as patches:
        patches.setattr(PredictionTable, "write_part", write_first_part_alone)
        with pytest.raises(Killed):
            write_table("old.parquet")
    absolute_job, job = job, make_embedding_job([tones.sounds.name], predictor)
    write_table("old.parquet")
    assert (tmp_path / "old.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    write_table("new.parquet", hop_seconds=0.5)
    assert pl.read_parquet(tmp_path / "new.parquet")["path"].str.starts_with(f"{tones.sounds.name}/").all()
    job = absolute_job
    (tmp_path / "mine.csv").write_text("x\n")
    with pytest.raises(RunError, match="is there already, and not from predict"):
        write_table("mine.csv")
    with pytest.raises(RunError, match=r"hop_seconds: was None, now 1\.0"):
        write_table("killed.parquet", hop_seconds=1.0)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_times_are_written_to_a_millisecond(tones, tmp_path, name):
    """35 frames are 0.35000000000000003 s, and 0.35 in a table."""
    predictor = load_predictor(tones.tuned, device="cpu")
    job = make_embedding_job([str(tones.sounds / "low" / "0.wav")], predictor)
    write_prediction_table(predictor, job, tmp_path / name, hop_seconds=0.07, say=lambda line: None)
    read = {"t.csv": pl.read_csv, "t.parquet": pl.read_parquet, "t.jsonl": pl.read_ndjson}[name]
    rows = read(tmp_path / name)
    times = [*rows["start"], *rows["end"]]
    assert times == [round(time, 3) for time in times]
    (found,) = predictor.predict_openers([job.row_opener(0)], hop_seconds=0.07)
    assert found.spans_W2.ravel().tolist() != np.round(found.spans_W2, 3).ravel().tolist()
    stretches = rows.filter(pl.col("row") == "stretch")
    np.testing.assert_allclose(stretches["start"], found.spans_W2[:, 0], atol=5e-4)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_predictions_move_with_their_sounds(tones, tmp_path, monkeypatch, name):
    """In a copy of the whole folder they are complete; other sounds are told by the first other path."""
    predictor = load_predictor(tones.tuned, device="cpu")
    said = []

    def predict():
        job = make_embedding_job(["./sounds"], predictor)
        write_prediction_table(predictor, job, Path("out", name), hop_seconds=0.5, say=said.append)

    for number in range(2):
        (tmp_path / "here" / "sounds").mkdir(parents=True, exist_ok=True)
        shutil.copy(tones.sounds / "low" / f"{2 * number}.wav", tmp_path / "here" / "sounds")
    monkeypatch.chdir(tmp_path / "here")
    predict()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    predict()
    assert said == [f"out/{name}: already complete"]
    Path("sounds/2.wav").rename("sounds/3.wav")
    with pytest.raises(
        RunError, match=r"other sounds: the first that differs was \./sounds/2\.wav, is \./sounds/3\.wav now"
    ):
        predict()
    Path("sounds/3.wav").unlink()
    with pytest.raises(RunError, match=r"holds other predictions \(other sounds: 2 then, 1 now\)"):
        predict()
