"""Measured clips whose sounds trained the run are counted, by digests of their audio, in whatever store they lie."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from evaluations import classifier_training, evaluation_protocol
from identities import run_identity
from tiny import tiny, tiny_finetune

from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.overlap import TrainingOverlap, add_overlaps, measure_overlap
from ajepa.evaluate.protocol import EvaluationProtocol
from ajepa.evaluate.result import Evaluation
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.pretrain.pretrain import pretrain
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from ajepa.training.trained_stores import TrainedStore
from pipeline.store.feature_store import FeatureStore


@pytest.fixture(scope="module")
def same_sounds(uint8_store_path) -> FeatureStore:
    """Another store of the clips of `store`."""
    return FeatureStore.open(uint8_store_path)


def run_on(*trained: TrainedStore) -> Run:
    return Run(path=None, recipe={}, identity=run_identity(), versions={}, trained_stores=trained)


def test_clips_with_sounds_of_another_store_are_counted(store, same_sounds):
    """Those of clips that trained, and of labels those that have one."""
    train_N = store.good_rows(["a_train"])
    eval_N = store.good_rows(["eval"])
    unlabelled = run_on(TrainedStore.from_store(store, ["a_train"]))
    assert measure_overlap(unlabelled, same_sounds, eval_N) == TrainingOverlap(
        with_labels=0, without_labels=0
    )
    both_N = np.concatenate([train_N, eval_N])
    assert measure_overlap(unlabelled, same_sounds, both_N) == TrainingOverlap(
        with_labels=0, without_labels=len(train_N)
    )

    # With labels and without them: the labels count.
    labelled = TrainedStore.from_store(store, ["a_train"], "raw")
    clips = int(store.labels_BC(train_N).any(axis=1).sum())
    assert 0 < clips < len(train_N)
    overlap = measure_overlap(run_on(*unlabelled.trained_stores, labelled), same_sounds, both_N)
    assert overlap == TrainingOverlap(with_labels=clips, without_labels=len(train_N) - clips)
    assert overlap.with_labels == measure_overlap(run_on(labelled), same_sounds, train_N).with_labels


def test_clips_without_a_digest_equal_none(store, same_sounds):
    """Failed clips have none in every store."""
    failed_N = np.flatnonzero(store.manifest["digest"].is_null().to_numpy())
    assert len(failed_N)
    run = run_on(TrainedStore.from_store(store, ["a_train", "eval"]))
    assert measure_overlap(run, same_sounds, failed_N).without_labels == 0


def test_a_store_that_is_gone_or_replaced_is_not_checked(store, same_sounds, tmp_path):
    """A count of one of two stores names the other; of none there is no count, but its name."""
    here = TrainedStore.from_store(store, ["a_train"])
    gone = replace(here, location=str(tmp_path / "gone.zarr"))
    replaced = replace(here, store_id="another")
    remote = replace(here, location="s3://bucket/far.zarr")
    rows_N = store.good_rows(["a_train"])
    for lost in (gone, replaced, remote):
        overlap = measure_overlap(run_on(lost), same_sounds, rows_N)
        name = lost.location.rpartition("/")[2]
        assert (overlap.compared, overlap.unchecked_stores) == (False, (name,))
        (line,) = overlap.describe(5)
        assert (
            line
            == f"not compared with {name}, which trained the run: it is no longer where it was, or at a URL"
        )
    assert measure_overlap(run_on(), same_sounds, rows_N) is None
    overlap = measure_overlap(run_on(here, gone), same_sounds, rows_N)
    assert overlap == TrainingOverlap(
        with_labels=0, without_labels=len(rows_N), unchecked_stores=("gone.zarr",)
    )


def test_the_store_itself_needs_no_place_and_may_be_left_out(store):
    """A run that was trained on every fold of the store that it is measured on, which may have been moved."""
    run = run_on(replace(TrainedStore.from_store(store, ["a_train", "eval"]), location="/nowhere"))
    rows_N = store.good_rows(["eval"])
    assert measure_overlap(run, store, rows_N).without_labels == len(rows_N)
    assert measure_overlap(run, store, rows_N, is_own_store_told=True) is None


def test_folds_add_up():
    """Of a fold that was not compared, the sum is not known either."""
    one = TrainingOverlap(with_labels=1, without_labels=2, unchecked_stores=("a.zarr",))
    other = TrainingOverlap(with_labels=0, without_labels=3, unchecked_stores=("a.zarr",))
    assert add_overlaps([one, other]) == TrainingOverlap(
        with_labels=1, without_labels=5, unchecked_stores=("a.zarr",)
    )
    assert add_overlaps([one, None]) is None


def test_that_no_measured_clip_trained_is_said_where_it_was_looked_at(store):
    """Silence would be the same as for a run that nobody could check."""
    none = TrainingOverlap(with_labels=0, without_labels=0)
    protocol = evaluation_protocol(classifier=classifier_training(), training_overlap=none)
    said = "none of the 5 measured clips has the sound of a clip that trained the run"
    assert said in Evaluation(protocol=protocol, classes=(), scores=()).format_table()
    assert "compared" not in none.to_json()
    unknown = replace(none, unchecked_stores=("a.zarr", "b.zarr"), compared=False)
    assert TrainingOverlap.from_json(json.loads(json.dumps(unknown.to_json()))) == unknown
    (line,) = unknown.describe(5)
    assert "not compared with a.zarr, b.zarr, which trained the run: each is no longer where it was" in line
    assert not add_overlaps([none, unknown]).compared


def test_the_table_says_what_an_overlap_means_and_the_file_keeps_it():
    """One line for each kind; a result of before has none, and is read."""
    overlap = TrainingOverlap(with_labels=2, without_labels=1)
    protocol = evaluation_protocol(classifier=classifier_training(), training_overlap=overlap)
    lines = list(Evaluation(protocol=protocol, classes=(), scores=()).describe_protocol())
    assert lines[1:3] == [
        "2 of 5 measured clips have the same sound as clips that the run was trained on, with their labels: "
        "its scores on these clips mean nothing",
        "1 of 5 measured clips have the same sound as clips that the run was trained on, without labels: "
        "scores may be a little high",
    ]
    record = json.loads(json.dumps(protocol.to_json()))
    assert EvaluationProtocol.from_json(record) == protocol
    del record["training_overlap"]
    assert EvaluationProtocol.from_json(record) == replace(protocol, training_overlap=None)
    assert record.keys() == replace(protocol, training_overlap=None).to_json().keys()
    assert protocol.differences(replace(protocol, training_overlap=None)) == []


def test_runs_remember_where_their_stores_lay(store_path, same_sounds, tmp_path):
    """A pre-trained run, one that is fine-tuned from it on another store, and what both say when they are measured."""
    quiet = {"device": "cpu", "say": lambda line: None}
    moved = shutil.copytree(store_path, tmp_path / "first.zarr")
    encoder = replace(tiny().model.encoder, depth=2)
    recipe = tiny(model=replace(tiny().model, encoder=encoder))
    run = pretrain(moved, recipe, tmp_path / "pretrained", steps=1, **quiet)
    first = TrainedStore.from_store(FeatureStore.open(moved), ["a_train"])
    assert Run.open(run.path).trained_stores == (first,)
    assert first.location == str(moved)

    # Its own eval clips are none of those that trained; before its first step nothing has.
    own = evaluate_run(moved, run.path, device="cpu", probes=["knn"], out=tmp_path / "own.json")
    assert own.protocol.training_overlap == TrainingOverlap(with_labels=0, without_labels=0)
    unborn = evaluate_run(
        moved, run.path, checkpoint="init", device="cpu", probes=["knn"], out=tmp_path / "init.json"
    )
    assert unborn.protocol.training_overlap is None

    # The fine-tuned run names both stores, and counts with its last scores.
    fine = finetune(
        same_sounds,
        TASKS["own"],
        tiny_finetune(steps=1, evaluations=1),
        tmp_path / "fine",
        start=TrainedRun.open(run),
        **quiet,
    )
    assert fine.trained_stores == (first, TrainedStore.from_store(same_sounds, ["a_train"], "raw"))
    measured = Evaluation.read_json(fine.path / "evaluation.json")
    assert measured.protocol.training_overlap == TrainingOverlap(with_labels=0, without_labels=0)
    shutil.rmtree(moved)
    again = evaluate_run(same_sounds, fine.path, device="cpu", out=tmp_path / "again.json")
    assert again.protocol.training_overlap.unchecked_stores == ("first.zarr",)
