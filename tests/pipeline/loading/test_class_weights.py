"""Weights that draw rare classes more often."""

import itertools
import shutil

import numpy as np
import pytest
import torch

from pipeline.errors import InputError, StoreError
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.loading.class_weights import WEIGHT_SCHEMES, balanced_weights
from pipeline.loading.dali import DaliLoader
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder, WeightedSampling
from pipeline.store.feature_store import FeatureStore
from pipeline.store.joined_store import JoinedStore


def weights_by_formula(store, rows_N, label_set, scheme) -> np.ndarray:
    """The weights computed clip by clip, from dense labels."""
    labels_NC = store.labels_BC(rows_N, label_set)
    clips_C = labels_NC.sum(0)
    classes = (clips_C > 0).sum()
    class_weight = {
        "ast": lambda clips: 1000 / (clips + 0.01),
        "passt": lambda clips: 1000 / (clips + 100),
        "panns": lambda clips: 1 / (classes * clips),
    }[scheme]
    return np.array([sum(class_weight(clips_C[c]) for c in np.flatnonzero(row_C)) for row_C in labels_NC])


@pytest.mark.parametrize("label_set", ["raw", "unambiguous"])
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_a_clip_weighs_the_sum_over_its_labels(store, scheme, label_set):
    """Each scheme by its formula, counted over the rows that are drawn from and no others."""
    rows_N = store.good_rows(["a_train"])
    weights = balanced_weights(store, rows_N, label_set=label_set, scheme=scheme)
    expected_N = weights_by_formula(store, rows_N, label_set, scheme)
    np.testing.assert_allclose(weights.weights_N, expected_N, rtol=1e-6)
    assert weights.clips_C.sum() == store.labels_BC(rows_N, label_set).sum()
    assert ((weights.weights_C > 0) == (weights.clips_C > 0)).all()


def test_rows_may_come_in_any_order(store):
    """Weights go with them."""
    rows_N = store.good_rows()
    reversed_N = balanced_weights(store, rows_N[::-1]).weights_N
    assert np.array_equal(reversed_N[::-1], balanced_weights(store, rows_N).weights_N)


def test_clips_without_labels_are_counted_and_never_drawn(store):
    """A fifth of the corpus has none: a loss on them would teach that nothing sounds."""
    rows_N = store.good_rows()
    is_unlabelled_N = store.labels_BC(rows_N).sum(1) == 0
    weights = balanced_weights(store, rows_N)
    assert weights.unlabelled_clips == is_unlabelled_N.sum() > 0
    assert np.array_equal(weights.weights_N == 0, is_unlabelled_N)
    drawn_N = WeightedSampling(weights_N=weights.weights_N, clips_per_epoch=2_000).epoch_indices(
        len(rows_N), 0, 0
    )
    assert not is_unlabelled_N[drawn_N].any()
    assert str(weights) == (
        f"weights 'ast' of label set 'raw': {len(rows_N)} clips, of which {is_unlabelled_N.sum()} have no label "
        f"and are never drawn; 5 of 527 classes occur"
    )


def test_panns_weights_draw_as_its_sampler_does_in_the_long_run(store):
    """Each class in turn, then the next clip of its own round: counted over 20 rounds of all classes' clips."""
    rows_N = store.good_rows()
    labels_NC = store.labels_BC(rows_N, "unambiguous")
    clips_of = [itertools.cycle(np.flatnonzero(column_N)) for column_N in labels_NC.T if column_N.any()]
    turns = 20 * int(np.lcm.reduce(labels_NC.sum(0)[labels_NC.any(0)].astype(int)))
    counts_N = np.zeros(len(rows_N))
    for clips in clips_of:
        np.add.at(counts_N, [next(clips) for _ in range(turns)], 1)
    weights_N = balanced_weights(store, rows_N, label_set="unambiguous", scheme="panns").weights_N
    np.testing.assert_allclose(weights_N, counts_N / counts_N.sum(), rtol=1e-9)
    assert weights_N.sum() == pytest.approx(1)


def test_labels_propagated_anew_count_at_once(store_path, tmp_path):
    """Nothing is stored that could be out of date."""
    shutil.copytree(store_path, tmp_path / "again.zarr")
    before = FeatureStore.open(tmp_path / "again.zarr")
    rows_N = before.good_rows()
    propagate_store_labels(tmp_path / "again.zarr", rule="all-ancestors")
    after = FeatureStore.open(tmp_path / "again.zarr")
    clips_C = balanced_weights(after, rows_N, label_set="all-ancestors").clips_C
    assert clips_C.sum() > balanced_weights(after, rows_N, label_set="raw").clips_C.sum()
    with pytest.raises(StoreError, match="no label set 'dominators'"):
        balanced_weights(after, rows_N, label_set="dominators")


def test_joined_stores_are_counted_together(store, other_store_path):
    """A class that is rare here may be common there."""
    other = FeatureStore.open(other_store_path)
    joined = JoinedStore([store, other])
    rows_N = joined.good_rows()
    weights = balanced_weights(joined, rows_N)
    apart = [balanced_weights(part, part.good_rows()).clips_C for part in (store, other)]
    assert np.array_equal(weights.clips_C, sum(apart))
    expected_N = weights_by_formula(joined, rows_N, "raw", "ast")
    np.testing.assert_allclose(weights.weights_N, expected_N, rtol=1e-6)


@pytest.mark.parametrize("replacement", [True, False])
def test_both_loaders_draw_the_same_balanced_batches(store, replacement):
    """From the store through weights and order to batches: equal, resumable, and rare classes above their share."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not there: only Linux has it")
    rows_N = store.good_rows(["a_train"])
    weights_N = balanced_weights(store, rows_N, label_set="unambiguous").weights_N
    clips = 20 if not replacement else 120
    sampling = WeightedSampling(weights_N=weights_N, clips_per_epoch=clips, replacement=replacement)
    order = RowOrder(rows_N=rows_N, clips=5, seed=4, sampling=sampling)
    view = View(frames=64, mean=-5.0, std=3.0, label_set="unambiguous")
    plain = PlainLoader(store, order, view)
    steps = 2 * order.steps_per_epoch
    with DaliLoader(store, order, view) as loader:
        batches = list(loader.batches(0, steps))
        resumed = next(iter(loader.batches(steps - 1, steps)))
    assert torch.equal(resumed.mel_BTF, batches[-1].mel_BTF)
    for step, batch in enumerate(batches):
        expected = plain.make_batch(step)
        assert torch.equal(batch.mel_BTF, expected.mel_BTF)
        assert torch.equal(batch.labels_BC, expected.labels_BC)
        assert np.array_equal(batch.rows_B, expected.rows_B)
        assert (batch.labels_BC.sum(1) > 0).all()


class LabelledStore:
    """The labels of a store: 900, 90 and 10 clips of a class each, and a class without clips."""

    classes = ("common", "rare", "rarest", "never")

    def flat_labels(self, label_set: str) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(np.arange(3, dtype=np.uint16), [900, 90, 10]), np.arange(1_001)


@pytest.mark.parametrize(
    ("scheme", "shares"), [("ast", [1, 1, 1]), ("panns", [1, 1, 1]), ("passt", [0.9, 9 / 19, 1 / 11])]
)
def test_draws_even_the_classes_out(scheme, shares):
    """As far as the scheme does: PaSST's offset of 100 clips leaves rare classes rare. Chi-square over 3 cells."""
    weights = balanced_weights(LabelledStore(), np.arange(1_000), scheme=scheme)
    assert weights.weights_C[3] == 0
    places_N = WeightedSampling(weights_N=weights.weights_N, clips_per_epoch=30_000).epoch_indices(
        1_000, 0, 0
    )
    counts_C = np.bincount(np.digitize(places_N, [900, 990]), minlength=3)
    expected_C = 30_000 * np.array(shares) / sum(shares)
    assert ((counts_C - expected_C) ** 2 / expected_C).sum() < 13.8  # exceeded once in a thousand


def test_unknown_weights_are_refused_with_the_nearest(store):
    with pytest.raises(InputError, match="weights 'pasta' are unknown; did you mean 'passt'"):
        balanced_weights(store, store.good_rows(), scheme="pasta")


def test_rows_without_any_label_are_refused(store):
    """Nothing could be drawn."""
    rows_N = store.good_rows()
    unlabelled_N = rows_N[store.labels_BC(rows_N).sum(1) == 0]
    with pytest.raises(InputError, match=f"none of {len(unlabelled_N)} clips has a label in 'raw'"):
        balanced_weights(store, unlabelled_N)
