"""A fine-tuned run measured afterwards: on its own clips the same, on another store's what both know."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from tiny import tiny_finetune

from ajepa.compare import compare
from ajepa.devices import precision
from ajepa.evaluate import evaluate
from ajepa.evaluation import CLASSIFIER, EVALUATION, HEAD, Evaluation
from ajepa.features import Views
from ajepa.finetune import finetune
from ajepa.finetune_recipes import finetune_recipe
from ajepa.learnt import Learnt, held_out, shared_classes
from ajepa.run import Run
from ajepa.scores import logits_of
from ajepa.stamp import place_of, refuse_replacing
from ajepa.subject import RANDOM, TRAINED, Subject
from ajepa.tasks.catalogue import TASKS
from pipeline.errors import RunError
from pipeline.melspec import mel_spec
from pipeline.ontology import ClassList
from pipeline.store import FeatureStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tuned(store_path, tmp_path_factory) -> Run:
    """Two steps of a classifier of several labels, trained on propagated ones."""
    path, recipe = tmp_path_factory.mktemp("runs") / "tuned", tiny_finetune(steps=2, checkpoint_every=1)
    how = {"label_set": "unambiguous", "device": "cpu", "loader": "plain", "say": lambda line: None}
    return finetune(store_path, TASKS["own"], recipe, path, **how)


@pytest.fixture(scope="module")
def found(other_store_path, tuned) -> Evaluation:
    return evaluate(other_store_path, tuned.path, device="cpu")


def test_measured_again_on_its_own_store_a_run_says_what_it_said_at_its_end(store_path, tuned):
    """The same clips, classes, resamples: not a digit moves, and the protocol is the same."""
    before = (tuned.path / EVALUATION).read_bytes()
    evaluate(store_path, tuned.path, device="cpu")
    assert (tuned.path / EVALUATION).read_bytes() == before


def test_the_protocol_tells_what_was_trained_and_measured(tuned, store):
    """Task, labels trained on, splits, stores, seed, step, clips, classes, average of the weights."""
    evaluation = Evaluation.read(tuned.path / EVALUATION)
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
    assert {(score.features, score.probe) for score in found.scores} == {(CLASSIFIER, HEAD)}
    assert [score.label_set for score in found.scores] == ["unambiguous", "raw"]
    assert found.protocol["trained_on"] == tuned.identity["store_id"] != other.store_id
    assert found.protocol["store_id"] == other.store_id
    own = Evaluation.read(tuned.path / EVALUATION).protocol["classifier"]
    assert found.protocol["classifier"] == own
    rows_N = other.good_rows(["eval"])
    views = Views(store=other, frames=64, mean=tuned.identity["mean"], std=tuned.identity["std"])
    logits_NC = logits_of(Learnt.of(tuned).classifier(CPU), views, rows_N, CPU, bf16=precision(CPU)[0])
    store_place = [other.classes.index_of[mid] for mid in tuned.identity["classes"]]
    kept_N = other.labels_BC(rows_N, "unambiguous")[:, store_place].any(axis=1)
    for score in found.scores:
        labels_NC = other.labels_BC(rows_N[kept_N], score.label_set)[:, store_place]
        there = labels_NC.any(axis=0)
        expected = average_precision_score(labels_NC[:, there], logits_NC[kept_N][:, there])
        assert score.map == pytest.approx(expected, rel=1e-5)
        assert score.classes == there.sum()
    assert Evaluation.read(tuned.path / "evaluation-other.json") == Evaluation(
        protocol=json.loads(json.dumps(found.protocol)), classes=found.classes, scores=found.scores
    )
    assert max(map(len, found.table().splitlines())) <= 80


def test_its_encoder_is_probed_frozen_beside_a_random_one(tuned, store_path, store):
    """In a file of its own; what fine-tuning held out measures, what it trained on trains."""
    probed = evaluate(store_path, tuned.path, device="cpu", probes=("knn",), labels=("raw",))
    assert Evaluation.read(tuned.path / "evaluation-probes.json").scores == probed.scores
    assert [score.features for score in probed.scores] == [TRAINED, RANDOM, "log-mel statistics"]
    told = probed.protocol
    assert (told["classifier"], told["task"], told["weights"]) == (None, "own", "average")
    assert (told["probes"]["train_splits"], told["eval_splits"]) == (["a_train"], ["eval"])
    trained = Subject.of(tuned).encoders(CPU)[TRAINED]
    average = tuned.load("average").parts["average"]
    assert torch.equal(trained.embed.weight, average["encoder.embed.weight"])
    assert told["eval_clips"] == int(store.labels_BC(store.good_rows(["eval"])).any(axis=1).sum())
    assert "encoder fine-tuned on task own" in probed.table()
    own = tuned.path / EVALUATION
    before = own.read_bytes()
    evaluate(store_path, tuned.path, device="cpu", probes=("knn",), out=own)
    assert Learnt.of(tuned).train_clips is None  # that file tells of probes alone now
    own.write_bytes(before)
    compared = compare([tuned.path])
    assert compared.index("evaluation.json") < compared.index("evaluation-probes.json")
    assert "pre-training: this one's encoder was fine-tuned, with labels" in compared


def test_what_was_measured_otherwise_is_not_replaced_unless_named(tuned, store_path, tmp_path):
    """Another checkpoint's scores are not the run's; where they are to go has to be said."""
    before = (tuned.path / EVALUATION).read_bytes()
    with pytest.raises(RunError, match=r"measured otherwise \(checkpoint: last, now 1\); keep .* --out FILE"):
        evaluate(store_path, tuned.path, device="cpu", checkpoint=1)
    assert (tuned.path / EVALUATION).read_bytes() == before
    early = evaluate(store_path, tuned.path, device="cpu", checkpoint=1, out=tmp_path / "early.json")
    assert early.protocol["step"] == 1
    assert evaluate(store_path, tuned.path, device="cpu", checkpoint=1, out=tmp_path / "early.json") == early


def test_more_probes_and_later_steps_may_replace_a_result(found, tmp_path):
    """Nothing is lost by them; by fewer probes, another pooling or another store of that name there is."""
    probes = {"names": ["knn"], "pooling": "mean", "train_clips": 10}
    held = replace(found, protocol=found.protocol | {"classifier": None, "probes": probes})
    held.save(tmp_path / EVALUATION)
    refuse_replacing(tmp_path / "none.json", held.protocol)
    for more in (
        {"step": 9},
        {"device": "cuda"},
        {"probes": probes | {"names": ["knn", "linear"]}},
    ):
        refuse_replacing(tmp_path / EVALUATION, held.protocol | more)
    for other, said in (
        ({"probes": probes | {"pooling": "moments"}}, "probes.pooling: mean, now moments"),
        ({"probes": probes | {"names": ["linear"]}}, "probes.names: knn, now linear"),
        ({"probes": None}, "probes: some, now none"),
        ({"store_id": "abc"}, "store_id: .* now abc"),
    ):
        with pytest.raises(RunError, match=said):
            refuse_replacing(tmp_path / EVALUATION, held.protocol | other)
    old = json.loads((tmp_path / EVALUATION).read_text()) | {"format": 2}
    (tmp_path / EVALUATION).write_text(json.dumps(old))
    refuse_replacing(tmp_path / EVALUATION, held.protocol | {"store_id": "abc"})


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
    run = SimpleNamespace(path=tmp_path, identity={"store_id": "a"}, finetuned=finetuned)
    store = SimpleNamespace(store_id="a" if own else "b", place="some/there.zarr")
    assert place_of(run, store, probed=probed) == tmp_path / name


def held(*mids: str) -> SimpleNamespace:
    return SimpleNamespace(place="some.zarr", classes=ClassList(mids=mids, names=tuple(map(str.upper, mids))))


def test_classes_of_both_are_measured_in_the_classifiers_order():
    """A class that the store lacks cannot be, one that the classifier lacks was never learnt."""
    identity = {"classes": ["c", "a", "b"], "task": "own"}
    classes, merge_SC = shared_classes(identity, held("a", "x", "c"))
    assert (classes.mids, classes.names) == (("c", "a"), ("C", "A"))
    assert merge_SC.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_words_that_a_task_does_not_tell_apart_are_of_its_one_class_for_them():
    """Speech Commands v1's unknown; what is no word of the task is no class of it."""
    v1 = TASKS["speech-commands-v1"]
    identity = {"classes": [*v1.told_apart, v1.others], "task": "speech-commands-v1"}
    classes, merge_SC = shared_classes(identity, held("bed", "cat", "yes", "thunder"))
    assert classes.mids == ("yes", "unknown")
    assert merge_SC.tolist() == [[0, 1], [0, 1], [1, 0], [0, 0]]


def test_a_store_of_quite_other_classes_is_refused_with_what_can_be_done():
    with pytest.raises(
        RunError, match=r"none of its 1 classes, such as x, .* 1, such as a; probe its encoder"
    ):
        shared_classes({"classes": ["a"], "task": "own"}, held("x"))


def test_of_another_store_in_folds_all_clips_are_held_out_but_of_the_same_folds_only_the_runs():
    """A run that was trained on folds 2 and 3 must not be measured on them, in whatever copy of the store."""
    rows = {"fold1": 4, "fold2": 5, "fold3": 6}
    other = SimpleNamespace(
        place="folds.zarr",
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
        return held_out(run, other).eval_splits

    assert measured(["fold2", "fold3"], ["fold1"]) == ("fold1",)
    assert measured(["train"], ["test"]) == ("fold1", "fold2", "fold3")


def test_a_network_without_an_encoder_is_not_probed(tuned):
    """It is measured as it was trained."""
    learnt = replace(Learnt.of(tuned), recipe=finetune_recipe("cnn6-small"))
    with pytest.raises(RunError, match="its Cnn6Spec has no encoder to probe; leave out --probe"):
        learnt.encoder()


def test_settings_of_probes_are_refused_where_none_is_asked_for(tuned, store_path, tmp_path):
    """Rather than to be left unsaid; so is a store of other features, and a folder of folds."""
    with pytest.raises(RunError, match="pooling and layer are the probes' on its encoder"):
        evaluate(store_path, tuned.path, pooling="moments")
    told = json.loads((tuned.path / "recipe.json").read_text())
    told["identity"]["mel"] = mel_spec("audio-jepa").to_json()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"holds mel spec a-jepa .*run was trained on audio-jepa"):
        evaluate(store_path, tmp_path / "run")
    (tmp_path / "fold1").mkdir()
    (tmp_path / "fold1" / "recipe.json").write_text("{}")
    with pytest.raises(RunError, match=r"holds a run for each fold; .*fold1"):
        evaluate(store_path, tmp_path)
