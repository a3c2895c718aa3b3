"""Labels and the scoring of predictions: scikit-learn's recall, and one metric with and without its interval."""

import numpy as np
import pytest
from sklearn.metrics import recall_score

from ajepa.evaluate.true_labels import TrueLabels, class_recall_C
from pipeline.errors import RunError


def test_recall_is_scikit_learns_and_a_class_without_a_clip_has_none():
    """Class 3 has no labelled clip, but is predicted."""
    rng = np.random.default_rng(0)
    true_N = rng.integers(0, 3, 50)
    logits_NC = rng.standard_normal((50, 4)).astype(np.float32)
    recall_C = class_recall_C(np.eye(4)[true_N], logits_NC)
    expected = recall_score(true_N, logits_NC.argmax(1), labels=[0, 1, 2], average=None)
    assert recall_C[:3] == pytest.approx(expected)
    assert np.isnan(recall_C[3])


def test_a_value_during_training_is_the_value_of_the_final_evaluation():
    """It is computed without the thousand resamples of an interval."""
    labels_NC = np.eye(4)[np.arange(40) % 4]
    true_labels = TrueLabels.from_labels("raw", labels_NC, "auto", "some.zarr")
    scores_NC = labels_NC + np.random.default_rng(0).standard_normal((40, 4))
    fold = true_labels.scored_fold(np.arange(40), scores_NC, 20, 0)
    score = true_labels.summarise_folds("encoder", "linear", [fold])
    assert true_labels.primary_value(scores_NC) == pytest.approx(score.primary_estimate.value)


def test_labels_are_single_where_every_clip_has_exactly_one():
    """If a clip has several labels, a request for single labels is refused."""
    one, several = np.eye(3), np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    assert TrueLabels.from_labels("raw", one, "auto", "some.zarr").kind == "single"
    assert TrueLabels.from_labels("raw", one, "multi", "some.zarr").kind == "multi"
    assert TrueLabels.from_labels("raw", several, "auto", "some.zarr").kind == "multi"
    with pytest.raises(RunError, match=r"some\.zarr: 2 of 3 clips have no raw label or several"):
        TrueLabels.from_labels("raw", several, "single", "some.zarr")
