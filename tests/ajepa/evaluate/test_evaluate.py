"""A pre-trained run is measured by probes: on the right clips, with all scores saved and the same numbers each time."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny

from ajepa.evaluate import evaluate, probes
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import RANDOM, STATISTICS, TRAINED
from ajepa.evaluate.probe_splits import ProbeSplits, probe_rows
from ajepa.evaluate.result import Evaluation
from ajepa.pretrain.pretrain import pretrain
from ajepa.training.run import Run
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError


@pytest.fixture(scope="module", autouse=True)
def short_attentive_probes():
    """No test of this file needs a good attentive probe: 20 steps instead of 150 or more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "MAX_ATTENTIVE_STEPS", 20)
        yield


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, tiny(), path, steps=6, device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def evaluation(store_path, run) -> Evaluation:
    return evaluate_run(store_path, run.path, device="cpu")


def test_every_features_probe_and_label_set_is_scored_and_kept(evaluation, run, store):
    """The table, the value and the file agree; a label set's probes are trained and measured on that set."""
    names = {(s.features, s.probe, s.label_set) for s in evaluation.scores}
    kinds = [(f, p) for f in (TRAINED, RANDOM, STATISTICS) for p in ("linear", "knn", "attentive")]
    kinds.remove((STATISTICS, "attentive"))  # statistics have no tokens
    assert names == {(f, p, s) for f, p in kinds for s in store.label_sets}
    assert store.label_sets == ("raw", "unambiguous")
    assert Evaluation.read_json(run.path / "evaluation.json") == evaluation
    for score in evaluation.scores:
        estimate = score.metrics["map"]
        cell = f"{estimate.value:5.3f} [{estimate.low:5.3f} {estimate.high:5.3f}]"
        assert cell in evaluation.format_table()
        assert estimate.low <= estimate.value <= estimate.high
        assert score.classes + score.skipped == len(store.classes.mids)
        class_mean = np.mean([value for value in score.per_class_ap if value is not None])
        assert class_mean == pytest.approx(estimate.value, abs=1e-5)
    assert max(len(line) for line in evaluation.format_table().splitlines()) <= 80


def test_clips_without_a_label_neither_train_nor_measure(evaluation, store):
    """A missing label does not show that a class is absent: probes leave such clips out, as fine-tuning does."""
    rows_N = store.good_rows(["eval"])
    labelled = int(store.labels_BC(rows_N).any(axis=1).sum())
    protocol = evaluation.protocol
    assert (protocol.eval_clips, protocol.unlabelled_clips) == (labelled, len(rows_N) - labelled)
    train_N = store.good_rows(["a_train"])
    assert protocol.probes.train_clips == int(store.labels_BC(train_N).any(axis=1).sum()) < len(train_N)


def test_a_store_without_labels_is_refused(store):
    """There is nothing to learn from it, or to measure."""
    unlabelled = SimpleNamespace(
        location="some.zarr", labels_BC=lambda rows_N, label_set: np.zeros((len(rows_N), 3))
    )
    with pytest.raises(RunError, match=r"some.zarr: no clip to train on has a label"):
        ProbeSplits.from_store(store, 0, 100).drop_unlabelled(unlabelled)


def test_propagated_labels_have_more_classes_to_rank_than_raw_ones(evaluation):
    """Each label set brings its own eval positives, and so its own chance level."""
    raw, propagated = (evaluation.find_score(STATISTICS, "knn", name) for name in ("raw", "unambiguous"))
    assert propagated.classes > raw.classes
    assert 0 < raw.chance < 1


def test_evaluating_twice_gives_the_same_numbers(store_path, run, evaluation, tmp_path):
    """A number that changes from run to run cannot be compared."""
    again = evaluate_run(store_path, run.path, device="cpu", out=tmp_path / "again.json")
    assert again == evaluation


def test_nothing_that_is_known_is_computed_again(store_path, run, evaluation, tmp_path, monkeypatch):
    """Twice the same: no clip is encoded. Other weights: baselines stay. More probes: all that they need."""
    encoded = []
    extract = evaluate.extract_features

    def counted(views, rows_N, encoder, **options):
        encoded.append(encoder is not None)
        return extract(views, rows_N, encoder, **options)

    monkeypatch.setattr(evaluate, "extract_features", counted)
    lines: list[str] = []
    options = {"device": "cpu", "progress": True, "say": lines.append}
    assert evaluate_run(store_path, run.path, **options) == evaluation
    assert encoded == []
    assert lines[0].startswith("vectors: moments of layer mean-")
    assert lines[1] == f"encoder: measured before, in {run.path}/evaluation.json; delete it to measure again"

    # Of the weights before the first step, the run's encoder is the random one.
    first = evaluate_run(
        store_path, run.path, **options, checkpoint="init", probes=["knn"], out=tmp_path / "a"
    )
    assert encoded == [True, False]
    scores = {(score.features, score.label_set): score.metrics for score in first.scores}
    assert scores[TRAINED, "raw"] == scores[RANDOM, "raw"]
    encoded.clear()
    more = evaluate_run(
        store_path, run.path, **options, checkpoint="init", probes=["knn", "linear"], out=tmp_path / "a"
    )
    assert encoded == [True, False]
    assert more.find_score(RANDOM, "knn", "raw") == first.find_score(RANDOM, "knn", "raw")


def test_every_stage_is_told_in_one_line(store_path, run, tmp_path):
    """Off a terminal too: minutes without a word look like a hang."""
    lines: list[str] = []
    evaluate_run(
        store_path,
        run.path,
        device="cpu",
        probes=["linear"],
        label_sets=["raw"],
        out=tmp_path / "a.json",
        progress=True,
        say=lines.append,
    )
    vectors, *stages, written = lines
    assert vectors.startswith("vectors: moments of layer mean-")
    assert written == f"{tmp_path / 'a.json'}: written; beside others: ajepa-train compare {run.path}"
    clips = stages[0].split()[3]
    assert stages == [
        line
        for features in (TRAINED, RANDOM, STATISTICS)
        for line in (
            f"{features}: features of {clips} clips, in fp32",
            f"{features}: linear probe, raw labels",
        )
    ]


def test_a_probe_on_fewer_than_five_clips_is_refused_in_one_line(store_path, run, tmp_path):
    """Nothing can be held back of them to choose a penalty on; nearest neighbours choose nothing."""
    options = {"device": "cpu", "train_clips": 4, "out": tmp_path / "few.json"}
    with pytest.raises(RunError, match=r"[1-4] labelled clips to train on, and a probe needs 5 to choose"):
        evaluate_run(store_path, run.path, **options, probes=["linear"])
    assert evaluate_run(store_path, run.path, **options, probes=["knn"]).scores


def test_probes_learn_from_train_clips_only_and_from_no_more_than_asked(store):
    """The eval split is measured whole; a cap draws the same rows every time."""
    train_N, eval_N = probe_rows(store, 0, 10)
    assert len(train_N) == 10
    assert np.array_equal(eval_N, store.good_rows(["eval"]))
    assert not set(train_N) & set(eval_N)
    assert np.array_equal(train_N, probe_rows(store, 0, 10)[0])
    assert not np.array_equal(train_N, probe_rows(store, 1, 10)[0])


def test_a_run_is_not_evaluated_on_another_kind_of_features(store_path, tmp_path, run):
    """A network that gets other mels still gives scores, but wrong ones."""
    record = json.loads((run.path / "recipe.json").read_text())
    record["identity"]["mel"] = preset_mel_spec("audio-jepa").to_json()
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"holds mel spec a-jepa .* was trained on audio-jepa"):
        evaluate_run(store_path, tmp_path)


def test_a_run_without_a_checkpoint_cannot_be_evaluated(store_path, tmp_path, run):
    """The error comes in one line, before any clip of the store is read."""
    (tmp_path / "recipe.json").write_text((run.path / "recipe.json").read_text())
    with pytest.raises(RunError, match="holds no checkpoint yet"):
        evaluate_run(store_path, tmp_path)
