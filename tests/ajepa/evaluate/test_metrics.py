"""Metrics are scikit-learn's, also for weighted clips; their intervals cover the truth as often as stated."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from ajepa.evaluate.metrics import (
    MetricEstimate,
    ScoredFold,
    accuracy_B,
    d_prime,
    estimate_metrics,
    macro_f1_B,
    mean_average_precision,
    precisions_and_areas_CB,
    resample_count,
    resample_weights_NB,
)
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


def test_a_class_without_positives_is_skipped():
    """The nan of one class must not make the mean nan, and must not count as 0."""
    labels_NC, scores_NC = labels_and_scores(0)
    labels_NC[:, [2, 5]] = 0
    result = mean_average_precision(labels_NC, scores_NC)
    others = [0, 1, 3, 4, 6]
    expected = average_precision_score(labels_NC[:, others], scores_NC[:, others], average="macro")
    assert result.value == pytest.approx(expected, abs=1e-12)
    assert np.flatnonzero(np.isnan(result.per_class_C)).tolist() == [2, 5]


def test_a_perfect_ranking_reaches_one_whatever_the_scale_of_the_scores():
    """Only the order of the clips counts."""
    labels_NC, _ = labels_and_scores(1)
    assert mean_average_precision(labels_NC, labels_NC * 1e-6 - 3).value == 1.0


def test_chance_is_what_random_orders_reach_on_average_even_for_rare_classes():
    """The chance level printed with every result has to be exact; the share of positives is not."""
    rng = np.random.default_rng(0)
    labels_NC = (np.arange(50)[:, None] < [1, 3, 20]).astype(np.float32)
    draws = [mean_average_precision(labels_NC, rng.random(labels_NC.shape)) for _ in range(300)]
    assert np.mean([draw.value for draw in draws]) == pytest.approx(draws[0].chance, abs=0.01)
    assert draws[0].chance > labels_NC.mean() + 0.02


def test_labels_without_any_positive_are_refused():
    """A mean over no class is undefined; the message gives the numbers of classes and clips."""
    with pytest.raises(InputError, match="none of 3 classes has a positive among 4 clips"):
        mean_average_precision(np.zeros((4, 3)), np.zeros((4, 3)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_precision_and_area_are_scikit_learns_of_the_clips_as_often_as_they_weigh(seed, decimals):
    """For every class, with few ties or nearly only ties, and for samples that lack clips or repeat them."""
    labels_NC, scores_NC = labels_and_scores(seed)
    scores_NC = scores_NC.round(decimals)
    weights_NB = np.random.default_rng(seed).integers(0, 3, (len(labels_NC), 4)).astype(np.float64)
    weights_NB[:, 0] = 1
    precision_CB, area_CB = precisions_and_areas_CB(labels_NC, scores_NC, weights_NB)
    for index, (labels_N, scores_N) in enumerate(zip(labels_NC.T, scores_NC.T, strict=True)):
        for place in range(4):
            clips_M = np.repeat(np.arange(len(labels_N)), weights_NB[:, place].astype(int))
            sample = labels_N[clips_M], scores_N[clips_M]
            assert precision_CB[index, place] == pytest.approx(average_precision_score(*sample), abs=1e-12)
            assert area_CB[index, place] == pytest.approx(roc_auc_score(*sample), abs=1e-12)


def test_a_class_that_nobody_or_everybody_has_is_nan_where_it_has_no_value():
    """Without a positive both are nan; without a negative precision is 1 and the area nan. A sample may lack either."""
    labels_NC = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 0]])
    weights_NB = np.array([[1, 0], [1, 2], [1, 1]], np.float64)
    precision_CB, area_CB = precisions_and_areas_CB(labels_NC, np.arange(9.0).reshape(3, 3), weights_NB)
    np.testing.assert_array_equal(precision_CB, [[np.nan, np.nan], [1, 1], [1 / 3, np.nan]])
    np.testing.assert_array_equal(area_CB, [[np.nan, np.nan], [np.nan, np.nan], [0, np.nan]])


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_and_f1_are_scikit_learns_of_the_clips_as_often_as_they_weigh(seed):
    """Also where a class is predicted that no clip has, and where a sample has lost a class."""
    rng = np.random.default_rng(seed)
    true_N, predicted_N = rng.integers(0, 4, 30), rng.integers(0, 6, 30)
    weights_NB = rng.integers(0, 2, (30, 5)).astype(np.float64)
    for place, weights_N in enumerate(weights_NB.T):
        in_sample_N = weights_N > 0
        expected = f1_score(true_N[in_sample_N], predicted_N[in_sample_N], average="macro", zero_division=0)
        assert macro_f1_B(true_N, predicted_N, weights_NB)[place] == pytest.approx(expected, abs=1e-6)
        expected = accuracy_score(true_N[in_sample_N], predicted_N[in_sample_N])
        assert accuracy_B(true_N, predicted_N, weights_NB)[place] == pytest.approx(expected)


def test_d_prime_is_the_distance_of_two_normal_distributions_with_that_area():
    """Scores of positives and negatives are drawn at a known distance, which d' recovers from the area."""
    rng = np.random.default_rng(0)
    labels_N = np.arange(40_000) % 2
    area = roc_auc_score(labels_N, rng.standard_normal(40_000) + 1.5 * labels_N)
    assert d_prime(area) == pytest.approx(1.5, abs=0.03)
    assert d_prime(np.array([0.5, 1.0])) == pytest.approx([0.0, 8.48], abs=0.01)


SHARES = {"some": [0.15, 0.3, 0.5], "rare": [0.02, 0.03, 0.3]}


def simulated_clips(rng, clips: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels of three classes, and scores whose positives are 1.5 standard deviations above the negatives."""
    if kind == "single":
        labels_NC = np.eye(3, dtype=np.float32)[rng.integers(0, 3, clips)]
    else:
        labels_NC = (rng.random((clips, 3)) < SHARES[kind]).astype(np.float32)
    return labels_NC, labels_NC * 1.5 + rng.standard_normal((clips, 3))


def simulated_fold(rng, clips: int, *, seed: int = 0, kind: str = "some", count: int = 200) -> ScoredFold:
    labels_NC, scores_NC = simulated_clips(rng, clips, kind)
    weights_NB = resample_weights_NB(clips, count, seed)
    return ScoredFold(
        labels_NC=labels_NC, scores_NC=scores_NC, weights_NB=weights_NB, single=kind == "single"
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [("some", ("map", "auc", "d_prime")), ("rare", ("map",)), ("single", ("accuracy", "f1"))],
)
def test_intervals_cover_what_is_estimated_in_about_95_of_100_studies(kind, names):
    """200 studies of 200 clips each; the truth is the mean value of 600 other such studies.

    At 95 % the count of 200 has a standard deviation of 1.5 %, and percentiles of few positives are known to be
    a little narrow: 90 to 99 % pass, of rare classes (4 positives) 86 % and more.
    """
    rng = np.random.default_rng(0)
    others = [simulated_fold(rng, 200, kind=kind, count=1).metric_values() for _ in range(600)]
    truth = {name: np.mean([other[name][0] for other in others]) for name in names if name != "d_prime"}
    if "d_prime" in names:
        truth["d_prime"] = d_prime(truth["auc"])
    covered = dict.fromkeys(names, 0)
    for study in range(200):
        estimates = estimate_metrics([simulated_fold(rng, 200, seed=study, kind=kind)])
        for name in names:
            covered[name] += estimates[name].low <= truth[name] <= estimates[name].high
    least = 0.86 if kind == "rare" else 0.90
    assert all(least <= count / 200 <= 0.99 for count in covered.values()), covered


def test_an_interval_lies_about_its_value_even_of_rare_classes():
    """Unshifted percentiles do not: for 527 classes and 20,000 clips both are above the value."""
    labels_NC = (np.random.default_rng(0).random((2_000, 40)) < 0.004).astype(np.float32)
    scores_NC = labels_NC + np.random.default_rng(1).standard_normal(labels_NC.shape)
    fold = ScoredFold(
        labels_NC=labels_NC, scores_NC=scores_NC, weights_NB=resample_weights_NB(2_000, 200, 0), single=False
    )
    estimate = estimate_metrics([fold])["map"]
    resampled_B = fold.metric_values()["map"][1:]
    assert np.percentile(resampled_B, 20) > estimate.value
    assert estimate.low < estimate.value < estimate.high
    assert estimate.high - estimate.low == pytest.approx(np.ptp(np.percentile(resampled_B, [2.5, 97.5])))


def test_four_times_the_clips_halve_the_interval():
    """The width of an interval shows how much the number of clips matters."""
    rng = np.random.default_rng(1)
    few, many = (estimate_metrics([simulated_fold(rng, clips)])["map"] for clips in (500, 2_000))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.25)


def test_a_metric_of_folds_is_the_mean_over_them():
    """Scores of two folds' probes are not ranked together; the interval is based on all clips."""
    rng = np.random.default_rng(2)
    folds = [simulated_fold(rng, 300, seed=seed) for seed in range(4)]
    estimate = estimate_metrics(folds)["map"]
    values = [average_precision_score(fold.labels_NC, fold.scores_NC, average="macro") for fold in folds]
    assert estimate.value == pytest.approx(np.mean(values), abs=1e-6)
    alone = estimate_metrics(folds[:1])["map"]
    assert estimate.low < estimate.value < estimate.high
    assert (estimate.high - estimate.low) / (alone.high - alone.low) == pytest.approx(0.5, rel=0.3)


def test_d_prime_is_that_of_the_mean_area_at_every_end():
    """A monotonic function of the area has the interval of the area, transformed."""
    estimates = estimate_metrics([simulated_fold(np.random.default_rng(3), 300)])
    for end in ("value", "low", "high"):
        expected = d_prime(getattr(estimates["auc"], end))
        assert getattr(estimates["d_prime"], end) == pytest.approx(expected, abs=2e-3)


def test_a_class_that_a_sample_loses_is_left_out_of_its_mean():
    """One positive in twelve clips is missing from a third of all samples."""
    labels_NC = np.zeros((12, 2), np.float32)
    labels_NC[0, 0] = labels_NC[:6, 1] = 1
    scores_NC = np.random.default_rng(0).random((12, 2))
    weights_NB = resample_weights_NB(12, 200, 0)
    fold = ScoredFold(labels_NC=labels_NC, scores_NC=scores_NC, weights_NB=weights_NB, single=False)
    assert np.isnan(fold.precision_and_area_CB[0]).any()
    estimate = estimate_metrics([fold])["map"]
    assert 0 < estimate.low <= estimate.value <= estimate.high <= 1


def test_without_a_class_that_some_clips_lack_there_is_no_area():
    """The metric is missing, not nan."""
    labels_NC = np.ones((4, 1), np.float32)
    fold = ScoredFold(
        labels_NC=labels_NC, scores_NC=labels_NC, weights_NB=resample_weights_NB(4, 10, 0), single=False
    )
    assert estimate_metrics([fold]) == {"map": MetricEstimate(value=1.0, low=1.0, high=1.0)}


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("fold_sizes", [(9,), (4, 5)])
def test_clips_that_are_all_right_or_all_wrong_have_the_exact_interval(right, fold_sizes):
    """Of 9 of 9 the resamples know only 1; every other accuracy keeps the interval of its resamples."""

    def fold(clips: int, wrong: int = 0) -> ScoredFold:
        labels_NC = np.eye(2, dtype=np.float32)[np.arange(clips) % 2]
        scores_NC = labels_NC if right else 1 - labels_NC
        scores_NC = np.concatenate([1 - scores_NC[:wrong], scores_NC[wrong:]])
        weights_NB = resample_weights_NB(clips, 200, 0)
        return ScoredFold(labels_NC=labels_NC, scores_NC=scores_NC, weights_NB=weights_NB, single=True)

    estimate = estimate_metrics([fold(clips) for clips in fold_sizes])["accuracy"]
    exact = binomtest(9 * right, 9).proportion_ci(0.95, method="exact")
    assert (estimate.low, estimate.high) == pytest.approx((exact.low, exact.high))
    assert estimate.value == float(right)

    # Another accuracy has the interval of its resamples.
    mixed = fold(9, wrong=1)
    assert estimate_metrics([mixed])["accuracy"] == MetricEstimate.from_resamples(
        mixed.metric_values()["accuracy"]
    )


def test_samples_are_drawn_by_the_seed_with_replacement_after_the_clips_themselves():
    """A sample has as many draws as there are clips; the same seed gives the same samples."""
    weights_NB = resample_weights_NB(50, 30, 7)
    assert weights_NB.shape == (50, 31)
    assert (weights_NB[:, 0] == 1).all()
    assert (weights_NB.sum(axis=0) == 50).all()
    assert weights_NB.max() > 2
    assert np.array_equal(weights_NB, resample_weights_NB(50, 30, 7))
    assert not np.array_equal(weights_NB, resample_weights_NB(50, 30, 8))


@pytest.mark.parametrize(
    ("clips", "classes", "count"), [(400, 50, 1000), (20_000, 527, 200), (4_000, 1_000, 500)]
)
def test_large_sets_are_drawn_less_often(clips, classes, count):
    """At least 200 times: the ends of an interval are then the fifth smallest and the fifth largest value."""
    assert resample_count(clips, classes) == count
