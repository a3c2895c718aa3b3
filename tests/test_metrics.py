"""Metrics: what scikit-learn says they are, also of weighted clips, and where a class has nobody."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from ajepa.metrics import accuracy_B, d_prime, macro_f1_B, mean_average_precision
from ajepa.ranking import ranked_CB
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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_precision_and_area_are_scikit_learns_of_the_clips_as_often_as_they_weigh(seed, decimals):
    """Every class, with ties from few to nearly all, and samples in which clips are missing or come again."""
    labels_NC, scores_NC = labels_and_scores(seed)
    scores_NC = scores_NC.round(decimals)
    weights_NB = np.random.default_rng(seed).integers(0, 3, (len(labels_NC), 4)).astype(np.float64)
    weights_NB[:, 0] = 1
    precision_CB, area_CB = ranked_CB(labels_NC, scores_NC, weights_NB)
    for index, (labels_N, scores_N) in enumerate(zip(labels_NC.T, scores_NC.T, strict=True)):
        for place in range(4):
            clips_M = np.repeat(np.arange(len(labels_N)), weights_NB[:, place].astype(int))
            drawn = labels_N[clips_M], scores_N[clips_M]
            assert precision_CB[index, place] == pytest.approx(average_precision_score(*drawn), abs=1e-12)
            assert area_CB[index, place] == pytest.approx(roc_auc_score(*drawn), abs=1e-12)


def test_a_class_that_nobody_or_everybody_has_is_nan_where_it_has_no_value():
    """No positive: neither value. No negative: precision 1, and no area; a sample may do either to a class."""
    labels_NC = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 0]])
    weights_NB = np.array([[1, 0], [1, 2], [1, 1]], np.float64)
    precision_CB, area_CB = ranked_CB(labels_NC, np.arange(9.0).reshape(3, 3), weights_NB)
    np.testing.assert_array_equal(precision_CB, [[np.nan, np.nan], [1, 1], [1 / 3, np.nan]])
    np.testing.assert_array_equal(area_CB, [[np.nan, np.nan], [np.nan, np.nan], [0, np.nan]])


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_and_f1_are_scikit_learns_of_the_clips_as_often_as_they_weigh(seed):
    """Also where a class is said that no clip has, and where a sample has lost a class."""
    rng = np.random.default_rng(seed)
    true_N, said_N = rng.integers(0, 4, 30), rng.integers(0, 6, 30)
    weights_NB = rng.integers(0, 2, (30, 5)).astype(np.float64)
    for place, weights_N in enumerate(weights_NB.T):
        kept = weights_N > 0
        expected = f1_score(true_N[kept], said_N[kept], average="macro", zero_division=0)
        assert macro_f1_B(true_N, said_N, weights_NB)[place] == pytest.approx(expected, abs=1e-6)
        expected = accuracy_score(true_N[kept], said_N[kept])
        assert accuracy_B(true_N, said_N, weights_NB)[place] == pytest.approx(expected)


def test_d_prime_is_the_distance_of_two_normal_distributions_with_that_area():
    """Scores of both kinds are drawn so far apart, and the area between them tells how far."""
    rng = np.random.default_rng(0)
    labels_N = np.arange(40_000) % 2
    area = roc_auc_score(labels_N, rng.standard_normal(40_000) + 1.5 * labels_N)
    assert d_prime(area) == pytest.approx(1.5, abs=0.03)
    assert d_prime(np.array([0.5, 1.0])) == pytest.approx([0.0, 8.48], abs=0.01)
