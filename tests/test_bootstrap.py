"""Intervals: they cover what they should, of folds as of one part, and say how they were drawn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from ajepa.bootstrap import Estimate, Measured, estimates, resampled_NB, resamples
from ajepa.metrics import d_prime

SHARES = {"some": [0.15, 0.3, 0.5], "rare": [0.02, 0.03, 0.3]}


def simulated(rng, clips: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels of three classes and scores that tell them apart by 1.5 standard deviations."""
    if kind == "single":
        labels_NC = np.eye(3, dtype=np.float32)[rng.integers(0, 3, clips)]
    else:
        labels_NC = (rng.random((clips, 3)) < SHARES[kind]).astype(np.float32)
    return labels_NC, labels_NC * 1.5 + rng.standard_normal((clips, 3))


def measured(rng, clips: int, *, seed: int = 0, kind: str = "some", count: int = 200) -> Measured:
    labels_NC, scores_NC = simulated(rng, clips, kind)
    weights_NB = resampled_NB(clips, count, seed)
    return Measured(labels_NC=labels_NC, scores_NC=scores_NC, weights_NB=weights_NB, single=kind == "single")


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
    others = [measured(rng, 200, kind=kind, count=1).metrics() for _ in range(600)]
    truth = {name: np.mean([other[name][0] for other in others]) for name in names if name != "d_prime"}
    if "d_prime" in names:
        truth["d_prime"] = d_prime(truth["auc"])
    covered = dict.fromkeys(names, 0)
    for study in range(200):
        told = estimates([measured(rng, 200, seed=study, kind=kind)])
        for name in names:
            covered[name] += told[name].low <= truth[name] <= told[name].high
    least = 0.86 if kind == "rare" else 0.90
    assert all(least <= count / 200 <= 0.99 for count in covered.values()), covered


def test_an_interval_lies_about_its_value_even_of_rare_classes():
    """The percentiles themselves would not: of 527 classes of 20,000 clips they lie above the value."""
    labels_NC = (np.random.default_rng(0).random((2_000, 40)) < 0.004).astype(np.float32)
    scores_NC = labels_NC + np.random.default_rng(1).standard_normal(labels_NC.shape)
    one = Measured(
        labels_NC=labels_NC, scores_NC=scores_NC, weights_NB=resampled_NB(2_000, 200, 0), single=False
    )
    told, drawn_B = estimates([one])["map"], one.metrics()["map"][1:]
    assert np.percentile(drawn_B, 20) > told.value
    assert told.low < told.value < told.high
    assert told.high - told.low == pytest.approx(np.ptp(np.percentile(drawn_B, [2.5, 97.5])))


def test_four_times_the_clips_halve_the_interval():
    """What an interval is for: it tells how much the number of clips is worth."""
    rng = np.random.default_rng(1)
    few, many = (estimates([measured(rng, clips)])["map"] for clips in (500, 2_000))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.25)


def test_a_metric_of_folds_is_the_mean_over_them():
    """Scores of two probes may not be ranked among each other; intervals are those of all clips."""
    rng = np.random.default_rng(2)
    folds = [measured(rng, 300, seed=seed) for seed in range(4)]
    told = estimates(folds)["map"]
    values = [average_precision_score(fold.labels_NC, fold.scores_NC, average="macro") for fold in folds]
    assert told.value == pytest.approx(np.mean(values), abs=1e-6)
    alone = estimates(folds[:1])["map"]
    assert told.low < told.value < told.high
    assert (told.high - told.low) / (alone.high - alone.low) == pytest.approx(0.5, rel=0.3)


def test_d_prime_is_that_of_the_mean_area_at_every_end():
    """A monotonous function of it has the same interval."""
    told = estimates([measured(np.random.default_rng(3), 300)])
    for end in ("value", "low", "high"):
        assert getattr(told["d_prime"], end) == pytest.approx(d_prime(getattr(told["auc"], end)), abs=2e-3)


def test_a_class_that_a_sample_loses_is_left_out_of_its_mean():
    """One positive in twelve clips is missing from a third of all samples."""
    labels_NC = np.zeros((12, 2), np.float32)
    labels_NC[0, 0] = labels_NC[:6, 1] = 1
    scores_NC = np.random.default_rng(0).random((12, 2))
    weights_NB = resampled_NB(12, 200, 0)
    one = Measured(labels_NC=labels_NC, scores_NC=scores_NC, weights_NB=weights_NB, single=False)
    assert np.isnan(one.ranked[0]).any()
    told = estimates([one])["map"]
    assert 0 < told.low <= told.value <= told.high <= 1


def test_without_a_class_that_some_clips_lack_there_is_no_area():
    """And no nan in its place."""
    labels_NC = np.ones((4, 1), np.float32)
    one = Measured(labels_NC=labels_NC, scores_NC=labels_NC, weights_NB=resampled_NB(4, 10, 0), single=False)
    assert estimates([one]) == {"map": Estimate(value=1.0, low=1.0, high=1.0)}


def test_samples_are_drawn_by_the_seed_with_replacement_after_the_clips_themselves():
    """As many as there are; the same for the same seed."""
    drawn_NB = resampled_NB(50, 30, 7)
    assert drawn_NB.shape == (50, 31)
    assert (drawn_NB[:, 0] == 1).all()
    assert (drawn_NB.sum(axis=0) == 50).all()
    assert drawn_NB.max() > 2
    assert np.array_equal(drawn_NB, resampled_NB(50, 30, 7))
    assert not np.array_equal(drawn_NB, resampled_NB(50, 30, 8))


@pytest.mark.parametrize(
    ("clips", "classes", "count"), [(400, 50, 1000), (20_000, 527, 200), (4_000, 1_000, 500)]
)
def test_large_sets_are_drawn_less_often(clips, classes, count):
    """At least 200 times: the ends of an interval are then the fifth from either side."""
    assert resamples(clips, classes) == count
