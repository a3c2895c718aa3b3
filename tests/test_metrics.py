"""Mean average precision: what it is, and what it does where a class has nobody."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from ajepa.metrics import mean_average_precision
from pipeline.errors import InputError


def labels_and_scores(seed, clips=60, classes=7):
    rng = np.random.default_rng(seed)
    labels_NC = (rng.random((clips, classes)) < 0.3).astype(np.float32)
    labels_NC[0] = 1
    return labels_NC, rng.standard_normal((clips, classes)).round(1)  # rounded: ties occur


@pytest.mark.parametrize("seed", range(5))
def test_map_is_scikit_learns_macro_average_where_every_class_has_a_positive(seed):
    """Two ways that must agree, ties included."""
    labels_NC, scores_NC = labels_and_scores(seed)
    expected = average_precision_score(labels_NC, scores_NC, average="macro")
    assert mean_average_precision(labels_NC, scores_NC).value == pytest.approx(expected, abs=1e-12)


def test_a_class_without_positives_is_skipped_and_counted():
    """A nan for one class must not become the result, nor a zero drag it down."""
    labels_NC, scores_NC = labels_and_scores(0)
    labels_NC[:, [2, 5]] = 0
    result = mean_average_precision(labels_NC, scores_NC)
    kept = [0, 1, 3, 4, 6]
    expected = average_precision_score(labels_NC[:, kept], scores_NC[:, kept], average="macro")
    assert result.value == pytest.approx(expected, abs=1e-12)
    assert (result.counted, result.skipped) == (5, 2)
    assert np.flatnonzero(np.isnan(result.per_class_C)).tolist() == [2, 5]


def test_a_perfect_ranking_reaches_one_whatever_the_scale_of_the_scores():
    """Only the order of the clips counts."""
    labels_NC, _ = labels_and_scores(1)
    assert mean_average_precision(labels_NC, labels_NC * 1e-6 - 3).value == 1.0


def test_chance_is_what_random_orders_reach_on_average_even_for_rare_classes():
    """The figure printed beside every result has to be the true floor; the share of positives is not."""
    rng = np.random.default_rng(0)
    labels_NC = (np.arange(50)[:, None] < [1, 3, 20]).astype(np.float32)
    draws = [mean_average_precision(labels_NC, rng.random(labels_NC.shape)) for _ in range(300)]
    assert np.mean([draw.value for draw in draws]) == pytest.approx(draws[0].chance, abs=0.01)
    assert draws[0].chance > labels_NC.mean() + 0.02


def test_labels_without_any_positive_are_refused():
    """A mean over no class is not a number; the message says what was looked at."""
    with pytest.raises(InputError, match="none of 3 classes has a positive among 4 clips"):
        mean_average_precision(np.zeros((4, 3)), np.zeros((4, 3)))
