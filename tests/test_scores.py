"""Scores of a classifier: whole clips, right means, metrics by scikit-learn, a protocol that tells all."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

from ajepa.evaluation import CLASSIFIER, HEAD
from ajepa.scores import Held, clip_logits, judged
from ajepa.truth import Truth, recall_C
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


def test_recall_is_scikit_learns_and_a_class_without_a_clip_has_none():
    rng = np.random.default_rng(0)
    true_N, logits_NC = rng.integers(0, 3, 50), rng.standard_normal((50, 4)).astype(np.float32)
    told_C = recall_C(np.eye(4)[true_N], logits_NC)
    assert told_C[:3] == pytest.approx(
        recall_score(true_N, logits_NC.argmax(1), labels=[0, 1, 2], average=None)
    )
    assert np.isnan(told_C[3])


def held(*, single: bool, logits_NC: np.ndarray) -> Held:
    """Four clips and three classes under two label sets, of which `wider` was trained."""
    wider = np.eye(3)[[0, 1, 0, 2]] if single else np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    labels = {"raw": np.eye(3)[[0, 1, 0, 1]], "wider": wider}
    made = SimpleNamespace(
        single=single,
        label_set="wider",
        store=SimpleNamespace(label_sets=("raw", "wider"), place="some.zarr"),
        classes=ClassList(mids=("a", "b", "c"), names=("A", "B", "C")),
        eval_N=np.arange(4),
        labels_NC=lambda rows_N, label_set: labels[label_set][rows_N],
    )
    return Held(assignment=made, logits_NC=logits_NC)


PROTOCOL = {"resamples": 50, "seed": 0}


def test_several_labels_are_measured_on_every_label_set_the_trained_one_first():
    """Class by class, with intervals; what cannot be measured is told as such."""
    logits_NC = np.random.default_rng(0).standard_normal((4, 3))
    found = judged(PROTOCOL, [held(single=False, logits_NC=logits_NC)])
    assert found.classes == (("a", "A"), ("b", "B"), ("c", "C"))
    wider, raw = found.scores
    assert (wider.label_set, raw.label_set, raw.skipped, raw.per_class_ap[2]) == ("wider", "raw", 1, None)
    assert (raw.features, raw.probe, raw.kind, raw.per_class_recall) == (CLASSIFIER, HEAD, "multi", ())
    expected = [average_precision_score(labels_N, logits_NC[:, c]) for c, labels_N in enumerate(LABELS_2N)]
    assert raw.per_class_ap[:2] == pytest.approx(expected, abs=1e-6)
    assert raw.map == pytest.approx(np.mean(expected))
    areas = [roc_auc_score(labels_N, logits_NC[:, c]) for c, labels_N in enumerate(LABELS_2N)]
    assert raw.metrics["auc"].value == pytest.approx(np.mean(areas))
    assert raw.metrics["map"].low <= raw.map <= raw.metrics["map"].high
    assert held(single=False, logits_NC=logits_NC).logged() == {
        "eval_map_wider": pytest.approx(wider.map),
        "eval_map_raw": pytest.approx(raw.map),
    }


LABELS_2N = ([1, 0, 1, 0], [0, 1, 0, 1])


def test_one_label_is_measured_by_accuracy_and_macro_f1():
    """On every label set of which each clip has one."""
    logits_NC = np.eye(3)[[0, 1, 0, 0]]
    wider, raw = judged(PROTOCOL, [held(single=True, logits_NC=logits_NC)]).scores
    assert (wider.kind, wider.primary.value, wider.chance) == ("single", 0.75, 0.5)
    assert wider.per_class_recall == (1.0, 1.0, 0.0)
    expected = f1_score([0, 1, 0, 2], logits_NC.argmax(1), average="macro", zero_division=0)
    assert wider.metrics["f1"].value == pytest.approx(expected)
    assert raw.kind == "single"


def test_a_network_of_several_labels_is_not_measured_by_accuracy_unless_asked():
    """Its raw labels here are one to a clip: mAP is what it was trained for."""
    one = held(single=False, logits_NC=np.eye(3)[[0, 1, 0, 0]])
    assert [truth.kind for truth in one.truths()] == ["multi", "multi"]
    assert [truth.kind for truth in one.truths("single", ("raw",))] == ["single"]


def test_a_value_on_the_way_is_the_value_at_the_end():
    """Without the thousand resamples that an interval takes."""
    labels_NC, rng = np.eye(4)[np.arange(40) % 4], np.random.default_rng(0)
    truth = Truth.of("raw", labels_NC, "auto", "some.zarr")
    scores_NC = labels_NC + rng.standard_normal((40, 4))
    whole = truth.score(CLASSIFIER, HEAD, [truth.measured(np.arange(40), scores_NC, 20, 0)])
    assert truth.value(scores_NC) == pytest.approx(whole.primary.value)
