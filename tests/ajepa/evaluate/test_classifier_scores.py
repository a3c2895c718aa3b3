"""A classifier's scores for whole clips equal scikit-learn's metrics, on its own store and on another."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluations import evaluation_protocol
from identities import run_identity, task_identity
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from tiny import tiny_finetune

from ajepa.evaluate.classifier_scores import (
    HeldOutScores,
    average_view_logits_BC,
    classifier_evaluation,
    count_train_clips,
    held_out_task_data,
    predict_logits_NC,
    shared_classes,
)
from ajepa.evaluate.compare import compare_results
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import RANDOM, TRAINED, ClipViews, compared_encoders
from ajepa.evaluate.result import (
    CLASSIFIER_FEATURES,
    EVALUATION_FILE,
    HEAD_PROBE,
    Evaluation,
)
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.recipes.catalogue import finetune_recipe
from ajepa.training.devices import FP32
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.store.feature_store import FeatureStore


class MeanFrameClassifier:
    """A classifier whose logits are the mean of the valid frames; it records their number in every view."""

    def __init__(self) -> None:
        self.n_frames = []

    def __call__(self, mel_BTF, n_frames_B, rng=None):
        assert rng is None
        self.n_frames += n_frames_B.tolist()
        valid_BT1 = torch.arange(mel_BTF.shape[1])[:, None] < n_frames_B[:, None, None]
        return ((mel_BTF * valid_BT1).sum(1) / n_frames_B[:, None])[:, :2]


def test_a_clips_logits_are_the_mean_over_its_views_by_their_valid_frames():
    """A last view of four frames must not weigh as much as a full view; a view past the clip's end is not used."""
    mel_BVTF, n_frames_BV = torch.randn(2, 3, 8, 4), torch.tensor([[8, 8, 4], [5, 0, 0]])
    model = MeanFrameClassifier()
    logits_BC = average_view_logits_BC(model, mel_BVTF, n_frames_BV, torch.device("cpu"), precision=FP32)
    whole = mel_BVTF[0].flatten(0, 1)[:20].mean(0)[:2]
    torch.testing.assert_close(logits_BC, torch.stack([whole, mel_BVTF[1, 0, :5].mean(0)[:2]]))
    assert model.n_frames == [8, 8, 4, 5]


def four_clips(*, single: bool, logits_NC: np.ndarray) -> HeldOutScores:
    """Scores of four clips and three classes, with two label sets of which `wider` was trained."""
    wider = np.eye(3)[[0, 1, 0, 2]] if single else np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    labels = {"raw": np.eye(3)[[0, 1, 0, 1]], "wider": wider}
    task_data = SimpleNamespace(
        single=single,
        label_set="wider",
        store=SimpleNamespace(label_sets=("raw", "wider"), location="some.zarr"),
        classes=ClassList(mids=("a", "b", "c"), names=("A", "B", "C")),
        eval_N=np.arange(4),
        labels_NC=lambda rows_N, label_set: labels[label_set][rows_N],
    )
    return HeldOutScores(task_data=task_data, logits_NC=logits_NC)


PROTOCOL = evaluation_protocol(resamples=50, seed=0)


def test_several_labels_are_measured_on_every_label_set_the_trained_one_first():
    """Class by class, with intervals; a class that cannot be measured is counted as skipped."""
    logits_NC = np.random.default_rng(0).standard_normal((4, 3))
    evaluation = classifier_evaluation(PROTOCOL, [four_clips(single=False, logits_NC=logits_NC)])
    assert evaluation.classes == (("a", "A"), ("b", "B"), ("c", "C"))
    wider, raw = evaluation.scores
    assert (wider.label_set, raw.label_set, raw.skipped, raw.per_class_ap[2]) == ("wider", "raw", 1, None)
    assert (raw.features, raw.probe, raw.kind, raw.per_class_recall) == (
        CLASSIFIER_FEATURES,
        HEAD_PROBE,
        "multi",
        (),
    )
    expected = [average_precision_score(labels_N, logits_NC[:, c]) for c, labels_N in enumerate(LABELS_2N)]
    assert raw.per_class_ap[:2] == pytest.approx(expected, abs=1e-6)
    assert raw.primary_estimate.value == pytest.approx(np.mean(expected))
    areas = [roc_auc_score(labels_N, logits_NC[:, c]) for c, labels_N in enumerate(LABELS_2N)]
    assert raw.metrics["auc"].value == pytest.approx(np.mean(areas))
    assert raw.metrics["map"].low <= raw.primary_estimate.value <= raw.metrics["map"].high
    assert four_clips(single=False, logits_NC=logits_NC).primary_metrics() == {
        "eval_map_wider": pytest.approx(wider.primary_estimate.value),
        "eval_map_raw": pytest.approx(raw.primary_estimate.value),
    }


LABELS_2N = ([1, 0, 1, 0], [0, 1, 0, 1])


def test_one_label_is_measured_by_accuracy_and_macro_f1():
    """On every label set of which each clip has one."""
    logits_NC = np.eye(3)[[0, 1, 0, 0]]
    wider, raw = classifier_evaluation(PROTOCOL, [four_clips(single=True, logits_NC=logits_NC)]).scores
    assert (wider.kind, wider.primary_estimate.value, wider.chance) == ("single", 0.75, 0.5)
    assert wider.per_class_recall == (1.0, 1.0, 0.0)
    expected = f1_score([0, 1, 0, 2], logits_NC.argmax(1), average="macro", zero_division=0)
    assert wider.metrics["f1"].value == pytest.approx(expected)
    assert raw.kind == "single"


def test_a_network_of_several_labels_is_not_measured_by_accuracy_unless_asked():
    """Here every clip has one raw label, but a network that was trained on several labels is measured by mAP."""
    scores = four_clips(single=False, logits_NC=np.eye(3)[[0, 1, 0, 0]])
    assert [labels.kind for labels in scores.true_labels()] == ["multi", "multi"]
    assert [labels.kind for labels in scores.true_labels("single", ("raw",))] == ["single"]


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tuned(store_path, tmp_path_factory) -> Run:
    """Two steps of a classifier of several labels, trained on propagated ones."""
    path = tmp_path_factory.mktemp("runs") / "tuned"
    recipe = tiny_finetune(steps=2, checkpoint_every=1)
    options = {"label_set": "unambiguous", "device": "cpu", "loader": "plain", "say": lambda line: None}
    return finetune(store_path, TASKS["own"], recipe, path, **options)


@pytest.fixture(scope="module")
def on_other_store(other_store_path, tuned) -> Evaluation:
    """The same run measured on another store."""
    return evaluate_run(other_store_path, tuned.path, device="cpu")


def test_measured_again_on_its_own_store_a_run_says_what_it_said_at_its_end(store_path, tuned):
    """The same clips, classes and resamples give the same numbers and the same protocol."""
    before = (tuned.path / EVALUATION_FILE).read_bytes()
    evaluate_run(store_path, tuned.path, device="cpu")
    assert (tuned.path / EVALUATION_FILE).read_bytes() == before


def test_the_protocol_tells_what_was_trained_and_measured(tuned, store):
    """It has the task, trained labels, splits, stores, seed, step, clips, classes and average of the weights."""
    evaluation = Evaluation.read_json(tuned.path / EVALUATION_FILE)
    protocol = evaluation.protocol
    classifier = protocol.classifier
    assert protocol.store_id == protocol.training_store_id == store.store_id
    assert (protocol.step, protocol.seed, protocol.weights_name, protocol.folds) == (2, 0, "average", 0)
    assert (protocol.eval_splits, classifier.train_splits) == (("eval",), ("a_train",))
    assert (classifier.task, classifier.label_set, classifier.ema) == ("own", "unambiguous", 0.9)
    assert classifier.start is None
    labels_NC = store.labels_BC(store.good_rows(["eval"]), "unambiguous")
    places = [store.classes.index_of[mid] for mid, _ in evaluation.classes]
    assert protocol.eval_clips == int(labels_NC[:, places].any(axis=1).sum())
    assert protocol.unlabelled_clips == len(labels_NC) - protocol.eval_clips
    assert classifier.train_clips == int(
        store.labels_BC(store.good_rows(["a_train"]), "unambiguous").any(axis=1).sum()
    )
    first = evaluation.scores[0]
    assert first.label_set == "unambiguous"
    assert first.classes + first.skipped == len(evaluation.classes) == classifier.class_count


def test_on_another_store_the_classifier_is_measured_on_the_clips_that_it_keeps_back(
    on_other_store, tuned, other_store_path
):
    """The scores are scikit-learn's average precision, for raw and propagated labels; evaluation.json is unchanged."""
    other = FeatureStore.open(other_store_path)
    assert {(score.features, score.probe) for score in on_other_store.scores} == {
        (CLASSIFIER_FEATURES, HEAD_PROBE)
    }
    assert [score.label_set for score in on_other_store.scores] == ["unambiguous", "raw"]
    assert on_other_store.protocol.training_store_id == tuned.identity.store_id != other.store_id
    assert on_other_store.protocol.store_id == other.store_id
    own = Evaluation.read_json(tuned.path / EVALUATION_FILE).protocol.classifier
    assert on_other_store.protocol.classifier == own
    rows_N = other.good_rows(["eval"])
    views = ClipViews(store=other, frames=64, mean=tuned.identity.mean, std=tuned.identity.std)
    logits_NC = predict_logits_NC(TrainedRun.open(tuned).classifier(CPU), views, rows_N, CPU, precision=FP32)
    store_place = [other.classes.index_of[mid] for mid in tuned.task_identity.classes]
    labelled_N = other.labels_BC(rows_N, "unambiguous")[:, store_place].any(axis=1)
    for score in on_other_store.scores:
        labels_NC = other.labels_BC(rows_N[labelled_N], score.label_set)[:, store_place]
        present = labels_NC.any(axis=0)
        expected = average_precision_score(labels_NC[:, present], logits_NC[labelled_N][:, present])
        assert score.metrics["map"].value == pytest.approx(expected, rel=1e-5)
        assert score.classes == present.sum()
    assert Evaluation.read_json(tuned.path / "evaluation-other.json") == on_other_store
    assert max(map(len, on_other_store.format_table().splitlines())) <= 80


def test_its_encoder_is_probed_frozen_beside_a_random_one(tuned, store_path, store):
    """The result has its own file. Fine-tuning's held-out clips measure the probes, and its train clips train them."""
    probed = evaluate_run(store_path, tuned.path, device="cpu", probes=("knn",), label_sets=("raw",))
    assert Evaluation.read_json(tuned.path / "evaluation-probes.json").scores == probed.scores
    assert [score.features for score in probed.scores] == [TRAINED, RANDOM, "log-mel statistics"]
    protocol = probed.protocol
    assert (protocol.classifier, protocol.task, protocol.weights_name) == (None, "own", "average")
    assert (protocol.probes.train_splits, protocol.eval_splits) == (("a_train",), ("eval",))
    trained = compared_encoders(TrainedRun.open(tuned), CPU)[TRAINED]
    average = tuned.load_checkpoint("average").parts["average"]
    assert torch.equal(trained.embed.weight, average["encoder.embed.weight"])
    assert protocol.eval_clips == int(store.labels_BC(store.good_rows(["eval"])).any(axis=1).sum())
    assert "encoder fine-tuned on task own" in probed.format_table()
    own = tuned.path / EVALUATION_FILE
    before = own.read_bytes()
    evaluate_run(store_path, tuned.path, device="cpu", probes=("knn",), out=own)
    assert count_train_clips(tuned) is None  # that file holds probes alone now
    own.write_bytes(before)
    compared = compare_results([tuned.path])
    assert compared.index("evaluation.json") < compared.index("evaluation-probes.json")
    assert "pre-training: the encoder here was fine-tuned with labels" in compared


def test_a_result_of_another_protocol_is_not_replaced_unless_named(tuned, store_path, tmp_path):
    """Scores of another checkpoint are no scores of the last step; to replace them the user has to name the file."""
    before = (tuned.path / EVALUATION_FILE).read_bytes()
    with pytest.raises(RunError, match=r"another protocol \(checkpoint: last, now 1\); save .* --out FILE"):
        evaluate_run(store_path, tuned.path, device="cpu", checkpoint=1)
    assert (tuned.path / EVALUATION_FILE).read_bytes() == before
    early = evaluate_run(store_path, tuned.path, device="cpu", checkpoint=1, out=tmp_path / "early.json")
    assert early.protocol.step == 1
    assert (
        evaluate_run(store_path, tuned.path, device="cpu", checkpoint=1, out=tmp_path / "early.json") == early
    )


def store_of(*mids: str) -> SimpleNamespace:
    return SimpleNamespace(
        location="some.zarr", classes=ClassList(mids=mids, names=tuple(map(str.upper, mids)))
    )


def test_classes_of_both_are_measured_in_the_classifiers_order():
    """A class that only one of store and classifier has cannot be measured."""
    identity = task_identity(classes=("c", "a", "b"))
    classes, merge_SC = shared_classes(identity, store_of("a", "x", "c"))
    assert (classes.mids, classes.names) == (("c", "a"), ("C", "A"))
    assert merge_SC.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_words_that_a_task_does_not_tell_apart_are_of_its_one_class_for_them():
    """Other words of Speech Commands v1 are the class `unknown`; a word outside the task has no class."""
    v1 = TASKS["speech-commands-v1"]
    identity = task_identity(classes=(*v1.distinct_classes, v1.other_class), task="speech-commands-v1")
    classes, merge_SC = shared_classes(identity, store_of("bed", "cat", "yes", "thunder"))
    assert classes.mids == ("yes", "unknown")
    assert merge_SC.tolist() == [[0, 1], [0, 1], [1, 0], [0, 0]]


def test_a_store_of_quite_other_classes_is_refused_with_what_can_be_done():
    with pytest.raises(
        RunError, match=r"none of its 1 classes, such as x, .* 1, such as a; probe its encoder"
    ):
        shared_classes(task_identity(), store_of("x"))


def test_of_another_store_in_folds_all_clips_are_held_out_but_of_the_same_folds_only_the_runs():
    """A run that was trained on folds 2 and 3 must not be measured on them, not even in a copy of the store."""
    rows = {"fold1": 4, "fold2": 5, "fold3": 6}
    other = SimpleNamespace(
        location="folds.zarr",
        store_id="other",
        classes=ClassList(mids=("a",), names=("A",)),
        label_sets=("raw",),
        split_names=tuple(rows),
        good_rows=lambda splits: np.arange(sum(rows[split] for split in splits)),
        labels_BC=lambda rows_N, label_set: np.ones((len(rows_N), 1), np.float32),
    )

    def measured_splits(train_splits: tuple[str, ...], eval_splits: tuple[str, ...]) -> tuple[str, ...]:
        task = task_identity(train_splits=train_splits, eval_splits=eval_splits)
        run = Run(path=Path("run"), recipe={}, identity=run_identity(task_identity=task), versions={})
        return held_out_task_data(run, other).eval_splits

    assert measured_splits(("fold2", "fold3"), ("fold1",)) == ("fold1",)
    assert measured_splits(("train",), ("test",)) == ("fold1", "fold2", "fold3")


def test_a_network_without_an_encoder_is_not_probed(tuned):
    """It is measured as it was trained."""
    trained = replace(TrainedRun.open(tuned), recipe=finetune_recipe("cnn6-small"))
    with pytest.raises(RunError, match="its Cnn6Spec has no encoder to probe; leave out --probe"):
        compared_encoders(trained, CPU)


def test_settings_of_probes_are_refused_where_none_is_asked_for(tuned, store_path, tmp_path):
    """They would have no effect. A store of other features and a folder of folds are refused too."""
    with pytest.raises(RunError, match="pooling and layer are for probes on its encoder"):
        evaluate_run(store_path, tuned.path, pooling="moments")
    record = json.loads((tuned.path / "recipe.json").read_text())
    record["identity"]["mel"] = preset_mel_spec("audio-jepa").to_json()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"holds mel spec a-jepa .*run was trained on audio-jepa"):
        evaluate_run(store_path, tmp_path / "run")
    (tmp_path / "fold1").mkdir()
    (tmp_path / "fold1" / "recipe.json").write_text("{}")
    with pytest.raises(RunError, match=r"holds a run for each fold; .*fold1"):
        evaluate_run(store_path, tmp_path)
