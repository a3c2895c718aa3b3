"""Scores of a classifier: whole clips, right means, metrics by scikit-learn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, recall_score

from ajepa.scores import ClassScores, accuracy, clip_logits, keep, kept_scores, precision, scores, table
from pipeline.ontology import ClassList


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
    logits_BC = clip_logits(model, mel_BVTF, n_frames_BV, torch.device("cpu"), bf16=False)
    whole = mel_BVTF[0].flatten(0, 1)[:20].mean(0)[:2]
    torch.testing.assert_close(logits_BC, torch.stack([whole, mel_BVTF[1, 0, :5].mean(0)[:2]]))
    assert model.seen == [8, 8, 4, 5]


def test_accuracy_and_recall_are_scikit_learns_and_a_class_without_a_clip_has_none():
    rng = np.random.default_rng(0)
    true_N, logits_NC = rng.integers(0, 3, 50), rng.standard_normal((50, 4)).astype(np.float32)
    value, chance, recall_C = accuracy(np.eye(4)[true_N], logits_NC)
    assert value == (logits_NC.argmax(1) == true_N).mean()
    assert chance == np.bincount(true_N).max() / 50
    assert recall_C[:3] == pytest.approx(
        recall_score(true_N, logits_NC.argmax(1), labels=[0, 1, 2], average=None)
    )
    assert np.isnan(recall_C[3])


def assignment(*, single: bool):
    labels = {"raw": np.eye(3)[[0, 1, 0, 1]], "wider": np.eye(3)[[0, 1, 0, 2]]}
    return SimpleNamespace(
        single=single,
        metric="accuracy" if single else "map",
        label_set="wider",
        store=SimpleNamespace(label_sets=("raw", "wider")),
        classes=ClassList(mids=("a", "b", "c"), names=("A", "B", "C")),
        eval_N=np.arange(4),
        labels_NC=lambda rows_N, label_set: labels[label_set][rows_N],
    )


def test_several_labels_are_measured_on_every_label_set_the_trained_one_first(tmp_path):
    """Class by class, what cannot be measured told as such; the file says the same."""
    logits_NC = np.random.default_rng(0).standard_normal((4, 3))
    wider, raw = scores(assignment(single=False), logits_NC)
    assert (wider.label_set, raw.label_set, raw.skipped, raw.per_class["c"]) == ("wider", "raw", 1, None)
    assert raw.per_class["a"] == average_precision_score([1, 0, 1, 0], logits_NC[:, 0])
    assert raw.value == precision(np.eye(3)[[0, 1, 0, 1]], logits_NC)[0]
    keep(tmp_path, {"step": 3}, [wider, raw])
    assert kept_scores(tmp_path) == [wider, raw]
    assert max(len(line) for line in table([wider, raw]).splitlines()) <= 80


def test_one_label_is_measured_on_the_set_that_was_trained():
    """Accuracy knows no clip of two classes."""
    (told,) = scores(assignment(single=True), np.eye(3)[[0, 1, 0, 0]])
    assert isinstance(told, ClassScores)
    assert (told.metric, told.value, told.chance) == ("accuracy", 0.75, 0.5)
    assert told.per_class == {"a": 1.0, "b": 1.0, "c": 0.0}
