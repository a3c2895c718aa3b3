"""Scores of a classifier: whole clips, right means, metrics by scikit-learn, a protocol that tells all.

A fine-tuned run measured afterwards: on its own clips the same, on another store's what both know.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score
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
from ajepa.evaluate.protocol import refuse_overwriting, result_path
from ajepa.evaluate.result import (
    CLASSIFIER_FEATURES,
    EVALUATION_FILE,
    HEAD_PROBE,
    Evaluation,
    TrueLabels,
    class_recall_C,
)
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.recipes.catalogue import finetune_recipe
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.store.feature_store import FeatureStore


class Listening:
    """A classifier that tells the mean of the valid frames, and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, mel_BTF, n_frames_B, rng=None):
        assert rng is None
        self.seen += n_frames_B.tolist()
        valid_BT1 = torch.arange(mel_BTF.shape[1])[:, None] < n_frames_B[:, None, None]
        return ((mel_BTF * valid_BT1).sum(1) / n_frames_B[:, None])[:, :2]


def test_a_clips_logits_are_the_mean_over_its_views_by_their_valid_frames():
    """A last view of four frames must not weigh as much as a full one; a view past the end is never seen."""
    mel_BVTF, n_frames_BV = torch.randn(2, 3, 8, 4), torch.tensor([[8, 8, 4], [5, 0, 0]])
    model = Listening()
    logits_BC = average_view_logits_BC(model, mel_BVTF, n_frames_BV, torch.device("cpu"), bf16=False)
    whole = mel_BVTF[0].flatten(0, 1)[:20].mean(0)[:2]
    torch.testing.assert_close(logits_BC, torch.stack([whole, mel_BVTF[1, 0, :5].mean(0)[:2]]))
    assert model.seen == [8, 8, 4, 5]


def test_recall_is_scikit_learns_and_a_class_without_a_clip_has_none():
    rng = np.random.default_rng(0)
    true_N, logits_NC = rng.integers(0, 3, 50), rng.standard_normal((50, 4)).astype(np.float32)
    told_C = class_recall_C(np.eye(4)[true_N], logits_NC)
    assert told_C[:3] == pytest.approx(
        recall_score(true_N, logits_NC.argmax(1), labels=[0, 1, 2], average=None)
    )
    assert np.isnan(told_C[3])


def held(*, single: bool, logits_NC: np.ndarray) -> HeldOutScores:
    """Four clips and three classes under two label sets, of which `wider` was trained."""
    wider = np.eye(3)[[0, 1, 0, 2]] if single else np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    labels = {"raw": np.eye(3)[[0, 1, 0, 1]], "wider": wider}
    made = SimpleNamespace(
        single=single,
        label_set="wider",
        store=SimpleNamespace(label_sets=("raw", "wider"), location="some.zarr"),
        classes=ClassList(mids=("a", "b", "c"), names=("A", "B", "C")),
        eval_N=np.arange(4),
        labels_NC=lambda rows_N, label_set: labels[label_set][rows_N],
    )
    return HeldOutScores(task_data=made, logits_NC=logits_NC)


PROTOCOL = {"resamples": 50, "seed": 0}


def test_several_labels_are_measured_on_every_label_set_the_trained_one_first():
    """Class by class, with intervals; what cannot be measured is told as such."""
    logits_NC = np.random.default_rng(0).standard_normal((4, 3))
    found = classifier_evaluation(PROTOCOL, [held(single=False, logits_NC=logits_NC)])
    assert found.classes == (("a", "A"), ("b", "B"), ("c", "C"))
    wider, raw = found.scores
    assert (wider.label_set, raw.label_set, raw.skipped, raw.per_class_ap[2]) == ("wider", "raw", 1, None)
    assert (raw.features, raw.probe, raw.kind, raw.per_class_recall) == (
        CLASSIFIER_FEATURES,
        HEAD_PROBE,
        "multi",
        (),
    )
    expected = [average_precision_score(labels_N, logits_NC[:, c]) for c, labels_N in enumerate(LABELS_2N)]
    assert raw.per_class_ap[:2] == pytest.approx(expected, abs=1e-6)
    assert raw.map_value == pytest.approx(np.mean(expected))
    areas = [roc_auc_score(labels_N, logits_NC[:, c]) for c, labels_N in enumerate(LABELS_2N)]
    assert raw.metrics["auc"].value == pytest.approx(np.mean(areas))
    assert raw.metrics["map"].low <= raw.map_value <= raw.metrics["map"].high
    assert held(single=False, logits_NC=logits_NC).primary_metrics() == {
        "eval_map_wider": pytest.approx(wider.map_value),
        "eval_map_raw": pytest.approx(raw.map_value),
    }


LABELS_2N = ([1, 0, 1, 0], [0, 1, 0, 1])


def test_one_label_is_measured_by_accuracy_and_macro_f1():
    """On every label set of which each clip has one."""
    logits_NC = np.eye(3)[[0, 1, 0, 0]]
    wider, raw = classifier_evaluation(PROTOCOL, [held(single=True, logits_NC=logits_NC)]).scores
    assert (wider.kind, wider.primary_estimate.value, wider.chance) == ("single", 0.75, 0.5)
    assert wider.per_class_recall == (1.0, 1.0, 0.0)
    expected = f1_score([0, 1, 0, 2], logits_NC.argmax(1), average="macro", zero_division=0)
    assert wider.metrics["f1"].value == pytest.approx(expected)
    assert raw.kind == "single"


def test_a_network_of_several_labels_is_not_measured_by_accuracy_unless_asked():
    """Its raw labels here are one to a clip: mAP is what it was trained for."""
    one = held(single=False, logits_NC=np.eye(3)[[0, 1, 0, 0]])
    assert [truth.kind for truth in one.true_labels()] == ["multi", "multi"]
    assert [truth.kind for truth in one.true_labels("single", ("raw",))] == ["single"]


def test_a_value_on_the_way_is_the_value_at_the_end():
    """Without the thousand resamples that an interval takes."""
    labels_NC, rng = np.eye(4)[np.arange(40) % 4], np.random.default_rng(0)
    truth = TrueLabels.from_labels("raw", labels_NC, "auto", "some.zarr")
    scores_NC = labels_NC + rng.standard_normal((40, 4))
    whole = truth.summarise_folds(
        CLASSIFIER_FEATURES, HEAD_PROBE, [truth.scored_fold(np.arange(40), scores_NC, 20, 0)]
    )
    assert truth.primary_value(scores_NC) == pytest.approx(whole.primary_estimate.value)


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tuned(store_path, tmp_path_factory) -> Run:
    """Two steps of a classifier of several labels, trained on propagated ones."""
    path, recipe = tmp_path_factory.mktemp("runs") / "tuned", tiny_finetune(steps=2, checkpoint_every=1)
    how = {"label_set": "unambiguous", "device": "cpu", "loader": "plain", "say": lambda line: None}
    return finetune(store_path, TASKS["own"], recipe, path, **how)


@pytest.fixture(scope="module")
def found(other_store_path, tuned) -> Evaluation:
    return evaluate_run(other_store_path, tuned.path, device="cpu")


def test_measured_again_on_its_own_store_a_run_says_what_it_said_at_its_end(store_path, tuned):
    """The same clips, classes, resamples: not a digit moves, and the protocol is the same."""
    before = (tuned.path / EVALUATION_FILE).read_bytes()
    evaluate_run(store_path, tuned.path, device="cpu")
    assert (tuned.path / EVALUATION_FILE).read_bytes() == before


def test_the_protocol_tells_what_was_trained_and_measured(tuned, store):
    """Task, labels trained on, splits, stores, seed, step, clips, classes, average of the weights."""
    evaluation = Evaluation.read_json(tuned.path / EVALUATION_FILE)
    told, classifier = evaluation.protocol, evaluation.protocol["classifier"]
    assert (told["store_id"], told["trained_on"]) == (store.store_id, store.store_id)
    assert (told["step"], told["seed"], told["weights"], told["folds"]) == (2, 0, "average", 0)
    assert (told["eval_splits"], classifier["train_splits"]) == (["eval"], ["a_train"])
    assert (classifier["task"], classifier["label_set"], classifier["ema"]) == ("own", "unambiguous", 0.9)
    assert classifier["from"] is None
    labels_NC = store.labels_BC(store.good_rows(["eval"]), "unambiguous")
    places = [store.classes.index_of[mid] for mid, _ in evaluation.classes]
    assert told["eval_clips"] == int(labels_NC[:, places].any(axis=1).sum())
    assert told["left_out"] == len(labels_NC) - told["eval_clips"]
    assert classifier["train_clips"] == int(
        store.labels_BC(store.good_rows(["a_train"]), "unambiguous").any(axis=1).sum()
    )
    first = evaluation.scores[0]
    assert first.label_set == "unambiguous"
    assert first.classes + first.skipped == len(evaluation.classes) == classifier["classes"]


def test_on_another_store_the_classifier_is_measured_on_what_that_keeps_back(found, tuned, other_store_path):
    """scikit-learn's average precision of its logits there, by raw and by propagated labels; its own file stays."""
    other = FeatureStore.open(other_store_path)
    assert {(score.features, score.probe) for score in found.scores} == {(CLASSIFIER_FEATURES, HEAD_PROBE)}
    assert [score.label_set for score in found.scores] == ["unambiguous", "raw"]
    assert found.protocol["trained_on"] == tuned.identity["store_id"] != other.store_id
    assert found.protocol["store_id"] == other.store_id
    own = Evaluation.read_json(tuned.path / EVALUATION_FILE).protocol["classifier"]
    assert found.protocol["classifier"] == own
    rows_N = other.good_rows(["eval"])
    views = ClipViews(store=other, frames=64, mean=tuned.identity["mean"], std=tuned.identity["std"])
    logits_NC = predict_logits_NC(TrainedRun.open(tuned).classifier(CPU), views, rows_N, CPU, bf16=False)
    store_place = [other.classes.index_of[mid] for mid in tuned.identity["classes"]]
    kept_N = other.labels_BC(rows_N, "unambiguous")[:, store_place].any(axis=1)
    for score in found.scores:
        labels_NC = other.labels_BC(rows_N[kept_N], score.label_set)[:, store_place]
        there = labels_NC.any(axis=0)
        expected = average_precision_score(labels_NC[:, there], logits_NC[kept_N][:, there])
        assert score.map == pytest.approx(expected, rel=1e-5)
        assert score.classes == there.sum()
    assert Evaluation.read_json(tuned.path / "evaluation-other.json") == Evaluation(
        protocol=json.loads(json.dumps(found.protocol)), classes=found.classes, scores=found.scores
    )
    assert max(map(len, found.table().splitlines())) <= 80


def test_its_encoder_is_probed_frozen_beside_a_random_one(tuned, store_path, store):
    """In a file of its own; what fine-tuning held out measures, what it trained on trains."""
    probed = evaluate_run(store_path, tuned.path, device="cpu", probes=("knn",), label_sets=("raw",))
    assert Evaluation.read_json(tuned.path / "evaluation-probes.json").scores == probed.scores
    assert [score.features for score in probed.scores] == [TRAINED, RANDOM, "log-mel statistics"]
    told = probed.protocol
    assert (told["classifier"], told["task"], told["weights"]) == (None, "own", "average")
    assert (told["probes"]["train_splits"], told["eval_splits"]) == (["a_train"], ["eval"])
    trained = compared_encoders(TrainedRun.open(tuned), CPU)[TRAINED]
    average = tuned.load("average").parts["average"]
    assert torch.equal(trained.embed.weight, average["encoder.embed.weight"])
    assert told["eval_clips"] == int(store.labels_BC(store.good_rows(["eval"])).any(axis=1).sum())
    assert "encoder fine-tuned on task own" in probed.format_table()
    own = tuned.path / EVALUATION_FILE
    before = own.read_bytes()
    evaluate_run(store_path, tuned.path, device="cpu", probes=("knn",), out=own)
    assert count_train_clips(tuned) is None  # that file tells of probes alone now
    own.write_bytes(before)
    compared = compare_results([tuned.path])
    assert compared.index("evaluation.json") < compared.index("evaluation-probes.json")
    assert "pre-training: this one's encoder was fine-tuned, with labels" in compared


def test_what_was_measured_otherwise_is_not_replaced_unless_named(tuned, store_path, tmp_path):
    """Another checkpoint's scores are not the run's; where they are to go has to be said."""
    before = (tuned.path / EVALUATION_FILE).read_bytes()
    with pytest.raises(RunError, match=r"measured otherwise \(checkpoint: last, now 1\); keep .* --out FILE"):
        evaluate_run(store_path, tuned.path, device="cpu", checkpoint=1)
    assert (tuned.path / EVALUATION_FILE).read_bytes() == before
    early = evaluate_run(store_path, tuned.path, device="cpu", checkpoint=1, out=tmp_path / "early.json")
    assert early.protocol["step"] == 1
    assert (
        evaluate_run(store_path, tuned.path, device="cpu", checkpoint=1, out=tmp_path / "early.json") == early
    )


def test_more_probes_and_later_steps_may_replace_a_result(found, tmp_path):
    """Nothing is lost by them; by fewer probes, another pooling or another store of that name there is."""
    probes = {"names": ["knn"], "pooling": "mean", "train_clips": 10}
    held = replace(found, protocol=found.protocol | {"classifier": None, "probes": probes})
    held.save(tmp_path / EVALUATION_FILE)
    refuse_overwriting(tmp_path / "none.json", held.protocol)
    for more in (
        {"step": 9},
        {"device": "cuda"},
        {"probes": probes | {"names": ["knn", "linear"]}},
    ):
        refuse_overwriting(tmp_path / EVALUATION_FILE, held.protocol | more)
    for other, said in (
        ({"probes": probes | {"pooling": "moments"}}, "probes.pooling: mean, now moments"),
        ({"probes": probes | {"names": ["linear"]}}, "probes.names: knn, now linear"),
        ({"probes": None}, "probes: some, now none"),
        ({"store_id": "abc"}, "store_id: .* now abc"),
    ):
        with pytest.raises(RunError, match=said):
            refuse_overwriting(tmp_path / EVALUATION_FILE, held.protocol | other)
    old = json.loads((tmp_path / EVALUATION_FILE).read_text()) | {"format": 2}
    (tmp_path / EVALUATION_FILE).write_text(json.dumps(old))
    refuse_overwriting(tmp_path / EVALUATION_FILE, held.protocol | {"store_id": "abc"})


@pytest.mark.parametrize(
    ("finetuned", "own", "probed", "name"),
    [
        (False, True, True, "evaluation.json"),
        (False, False, True, "evaluation-there.json"),
        (True, True, False, "evaluation.json"),
        (True, False, False, "evaluation-there.json"),
        (True, True, True, "evaluation-probes.json"),
        (True, False, True, "evaluation-there-probes.json"),
    ],
)
def test_one_rule_says_where_a_result_is_kept(tmp_path, finetuned, own, probed, name):
    """What a run is measured by on its own store, and everything else beside it."""
    run = SimpleNamespace(path=tmp_path, identity={"store_id": "a"}, is_finetuned=finetuned)
    store = SimpleNamespace(store_id="a" if own else "b", location="some/there.zarr")
    assert result_path(run, store, probed=probed) == tmp_path / name


def held_classifier(*mids: str) -> SimpleNamespace:
    return SimpleNamespace(
        location="some.zarr", classes=ClassList(mids=mids, names=tuple(map(str.upper, mids)))
    )


def test_classes_of_both_are_measured_in_the_classifiers_order():
    """A class that the store lacks cannot be, one that the classifier lacks was never learnt."""
    identity = {"classes": ["c", "a", "b"], "task": "own"}
    classes, merge_SC = shared_classes(identity, held_classifier("a", "x", "c"))
    assert (classes.mids, classes.names) == (("c", "a"), ("C", "A"))
    assert merge_SC.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_words_that_a_task_does_not_tell_apart_are_of_its_one_class_for_them():
    """Speech Commands v1's unknown; what is no word of the task is no class of it."""
    v1 = TASKS["speech-commands-v1"]
    identity = {"classes": [*v1.distinct_classes, v1.other_class], "task": "speech-commands-v1"}
    classes, merge_SC = shared_classes(identity, held_classifier("bed", "cat", "yes", "thunder"))
    assert classes.mids == ("yes", "unknown")
    assert merge_SC.tolist() == [[0, 1], [0, 1], [1, 0], [0, 0]]


def test_a_store_of_quite_other_classes_is_refused_with_what_can_be_done():
    with pytest.raises(
        RunError, match=r"none of its 1 classes, such as x, .* 1, such as a; probe its encoder"
    ):
        shared_classes({"classes": ["a"], "task": "own"}, held_classifier("x"))


def test_of_another_store_in_folds_all_clips_are_held_out_but_of_the_same_folds_only_the_runs():
    """A run that was trained on folds 2 and 3 must not be measured on them, in whatever copy of the store."""
    rows = {"fold1": 4, "fold2": 5, "fold3": 6}
    other = SimpleNamespace(
        location="folds.zarr",
        store_id="other",
        classes=ClassList(mids=("a",), names=("A",)),
        label_sets=("raw",),
        manifest={"split": SimpleNamespace(unique=lambda: list(rows))},
        good_rows=lambda splits: np.arange(sum(rows[split] for split in splits)),
        labels_BC=lambda rows_N, label_set: np.ones((len(rows_N), 1), np.float32),
    )
    identity = {"store_id": "own", "classes": ["a"], "task": "own", "kind": "single", "label_set": "raw"}

    def measured(train: list[str], kept: list[str]) -> tuple[str, ...]:
        told = identity | {"train_splits": train, "eval_splits": kept}
        run = SimpleNamespace(path="run", identity=told)
        return held_out_task_data(run, other).eval_splits

    assert measured(["fold2", "fold3"], ["fold1"]) == ("fold1",)
    assert measured(["train"], ["test"]) == ("fold1", "fold2", "fold3")


def test_a_network_without_an_encoder_is_not_probed(tuned):
    """It is measured as it was trained."""
    trained = replace(TrainedRun.open(tuned), recipe=finetune_recipe("cnn6-small"))
    with pytest.raises(RunError, match="its Cnn6Spec has no encoder to probe; leave out --probe"):
        compared_encoders(trained, CPU)


def test_settings_of_probes_are_refused_where_none_is_asked_for(tuned, store_path, tmp_path):
    """Rather than to be left unsaid; so is a store of other features, and a folder of folds."""
    with pytest.raises(RunError, match="pooling and layer are the probes' on its encoder"):
        evaluate_run(store_path, tuned.path, pooling="moments")
    told = json.loads((tuned.path / "recipe.json").read_text())
    told["identity"]["mel"] = preset_mel_spec("audio-jepa").to_json()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"holds mel spec a-jepa .*run was trained on audio-jepa"):
        evaluate_run(store_path, tmp_path / "run")
    (tmp_path / "fold1").mkdir()
    (tmp_path / "fold1" / "recipe.json").write_text("{}")
    with pytest.raises(RunError, match=r"holds a run for each fold; .*fold1"):
        evaluate_run(store_path, tmp_path)
