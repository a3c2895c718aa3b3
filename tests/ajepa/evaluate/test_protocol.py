"""Protocols of evaluations: their form in evaluation.json, and which differences count as another measurement."""

import json

import pytest
import torch
from evaluations import classifier_training, evaluation_protocol, probe_training

from ajepa.evaluate.protocol import METRIC_NOTES, EvaluationProtocol, weights_digest

KEYS = [
    *[
        "run",
        "recipe",
        "seed",
        "step",
        "checkpoint",
        "chosen_by",
        "weights",
        "weights_sha256",
        "task",
        "trained_on",
    ],
    *[
        "trained_with",
        "store",
        "store_id",
        "excluded",
        "eval_splits",
        "eval_clips",
        "left_out",
        "folds",
        "kind",
        "labels",
    ],
    *[
        "map",
        "accuracy",
        "clips",
        "folds_mean",
        "intervals",
        "confidence",
        "resamples",
        "classifier",
        "probes",
    ],
    *["device", "precision", "versions"],
]

CLASSIFIER_KEYS = [
    *["task", "kind", "label_set", "from", "ema", "clips_per_step", "train_splits", "train_clips", "classes"],
    "views",
]

PROBE_KEYS = [
    *["names", "pooling", "layer", "grid", "train_splits", "val_splits", "train_clips", "val_clips"],
    *["val_share", "knn", "l2_grid"],
]

PROTOCOLS = [
    evaluation_protocol(probes=probe_training()),
    evaluation_protocol(task="esc50", classifier=classifier_training(start={"step": 9, "sha256": "cd"})),
    evaluation_protocol(folds=2, weights_sha256=("ab" * 32, "cd" * 32), classifier=classifier_training()),
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=["probes", "classifier", "folds"])
def test_a_protocol_is_read_as_it_was_written(protocol):
    """Also through JSON, which has lists in place of tuples."""
    assert EvaluationProtocol.from_json(json.loads(json.dumps(protocol.to_json()))) == protocol


def test_the_keys_and_their_order_are_those_of_the_files_that_exist():
    """Files of format 4 are compared byte for byte, and read by other programs."""
    protocol = evaluation_protocol(classifier=classifier_training(), probes=probe_training())
    record = protocol.to_json()
    assert list(record) == KEYS
    assert list(record["classifier"]) == CLASSIFIER_KEYS
    assert list(record["probes"]) == PROBE_KEYS
    assert {key: record[key] for key in METRIC_NOTES} == METRIC_NOTES


def test_notes_of_another_version_are_kept_as_they_are():
    """A file that is read and written again keeps its writer's definitions of the metrics."""
    record = evaluation_protocol(probes=probe_training()).to_json()
    record["map"] = "micro"
    record["probes"]["svm"] = "none"
    assert EvaluationProtocol.from_json(record).to_json() == record


@pytest.mark.parametrize(
    "changes",
    [{"step": 9}, {"device": "cuda"}, {"versions": {}}, {"probes": probe_training(names=("knn", "linear"))}],
)
def test_later_steps_other_machines_and_more_probes_are_no_other_measurement(changes):
    """Nothing is lost if such a result replaces another."""
    stored = evaluation_protocol(probes=probe_training())
    assert stored.differences(evaluation_protocol(**({"probes": probe_training()} | changes))) == []


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"probes": probe_training(pooling="moments")}, "probes.pooling: mean, now moments"),
        ({"probes": probe_training(names=("linear",))}, "probes.names: knn, now linear"),
        ({"probes": None}, "probes: some, now none"),
        ({"store_id": "abc"}, "store_id: own, now abc"),
        ({"checkpoint": "5"}, "checkpoint: last, now 5"),
        ({"eval_splits": ()}, "eval_splits: eval, now none"),
    ],
)
def test_settings_that_make_another_measurement_are_named_with_both_values(changes, difference):
    """The user sees which settings of a requested protocol differ, and how."""
    stored = evaluation_protocol(probes=probe_training())
    requested = evaluation_protocol(**({"probes": probe_training()} | changes))
    assert stored.differences(requested) == [difference]


def test_the_digest_of_weights_depends_on_names_shapes_and_values_alone():
    """It does not depend on their order or their layout in memory."""
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.arange(6.0).view(2, 3).T.contiguous().T}
    assert weights_digest(same) == weights_digest(weights)
    for other in ({"a": weights["a"]}, weights | {"a": torch.arange(6.0)}, weights | {"b": torch.zeros(2)}):
        assert weights_digest(other) != weights_digest(weights)
