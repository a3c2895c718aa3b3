"""Augmentations are drawn fairly and reproducibly, and applied as their formulas say."""

import itertools

import numpy as np
import pytest
import torch
from loading_inputs import order_of, view_of
from scipy import stats

from pipeline.errors import RunError
from pipeline.loading.augment import Augment, draw_changes, draw_uniform_B, mixup_partners, symmetric_beta
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore

EVERYTHING = {
    "roll": True,
    "gain_db": 6.0,
    "time_mask_frames": 40,
    "band_mask_bands": 48,
    "mixup_share": 0.6,
}

SUBSETS = [
    {name: EVERYTHING[name] for name in names}
    for count in range(len(EVERYTHING) + 1)
    for names in itertools.combinations(EVERYTHING, count)
]

SUBSETS.append({**EVERYTHING, "masks_each": 2})


def labelled_view(store: FeatureStore, **changes) -> View:
    """A view of 1,024 frames with raw labels."""
    return view_of(store, **{"frames": 1_024, "label_set": "raw"} | changes)


def draw(clips: int, *, step: int = 0, n_frames: int = 96, **augment):
    order = RowOrder(rows_N=np.arange(clips), clips=clips, seed=0)
    n_frames_B = np.full(clips, n_frames)
    return draw_changes(Augment(**augment), 0, step, order, n_frames_B=n_frames_B, bands=128)


def render(store: FeatureStore, loader: PlainLoader, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mel, labels and valid frames of a step, one value after the other in double precision."""
    view = loader.batch_maker.view
    cuts = loader.batch_maker.cuts_at_step(step)
    changes = cuts.changes
    mel_BTF = np.zeros((len(cuts.rows_B), view.frames, store.bands))
    for clip, (row, start, n) in enumerate(zip(cuts.rows_B, cuts.starts_B, cuts.n_frames_B, strict=True)):
        log_mel_TF = store.offset + store.scale * store.read(np.array([row]))[0].astype(np.float64)
        shown_TF = (
            np.roll(log_mel_TF[start : start + n], changes.rolls_B[clip], axis=0) + changes.gains_B[clip]
        )
        shown_TF = (shown_TF - view.mean) / view.std
        frames_T, bands_F = np.arange(n), np.arange(store.bands)
        for first, end in changes.time_masks_BN2[clip]:
            shown_TF[(frames_T >= first) & (frames_T < end)] = 0
        for low, high in changes.band_masks_BN2[clip]:
            shown_TF[:, (bands_F >= low) & (bands_F < high)] = 0
        mel_BTF[clip, :n] = shown_TF
    labels_BC = store.labels_BC(cuts.rows_B, view.label_set).astype(np.float64)
    shares_B = changes.shares_B.astype(np.float64)
    partners_B = changes.partners_B
    mixed_BTF = shares_B[:, None, None] * mel_BTF + (1 - shares_B)[:, None, None] * mel_BTF[partners_B]
    mixed_BC = shares_B[:, None] * labels_BC + (1 - shares_B)[:, None] * labels_BC[partners_B]
    return mixed_BTF, mixed_BC, np.maximum(cuts.n_frames_B, cuts.n_frames_B[partners_B])


@pytest.mark.parametrize("augment", SUBSETS, ids=lambda augment: "+".join(augment) or "none")
def test_a_batch_is_what_the_formulas_of_its_changes_give(any_store, augment):
    """Every augmentation on and off, against a rendering that shares nothing with the loaders but the draws."""
    view = labelled_view(any_store, augment=Augment(**augment))
    loader = PlainLoader(any_store, order_of(any_store), view)
    for step in range(3):
        batch = loader.make_batch(step)
        mel_BTF, labels_BC, n_frames_B = render(any_store, loader, step)
        np.testing.assert_allclose(batch.mel_BTF, mel_BTF, rtol=2e-5, atol=4e-6)
        np.testing.assert_allclose(batch.labels_BC, labels_BC, atol=1e-6)
        assert np.array_equal(batch.n_frames_B, n_frames_B)
        assert np.array_equal(batch.rows_B, loader.batch_maker.order.rows_at_step(step))


def test_without_augmentation_not_a_bit_has_changed(any_store):
    """Pre-training saw these bits before there were augmentations: runs of that time can be resumed."""
    store = any_store
    view = labelled_view(store, frames=250, seed=5)
    order = order_of(store)
    centre = np.float32((view.mean - store.offset) / store.scale)
    factor = np.float32(1) / np.float32(view.std / store.scale)
    loader = PlainLoader(store, order, view)
    for step in range(5):
        rows_B = order.rows_at_step(step)
        room_B = np.maximum(store.n_frames_N[rows_B].astype(np.int64) - 250, 0)
        uniform_B = np.random.default_rng([5, step, 0x63726F70]).random(6)
        starts_B = (uniform_B * (1 + room_B)).astype(np.int64)
        mel_BTF = store.read(rows_B, starts_B=starts_B, frames=250).astype(np.float32)
        mel_BTF = (mel_BTF - centre) * factor
        batch = loader.make_batch(step)
        mel_BTF[np.arange(250) >= batch.n_frames_B.numpy()[:, None]] = 0
        assert torch.equal(batch.mel_BTF.view(torch.int32), torch.from_numpy(mel_BTF).view(torch.int32))


def test_one_augmentation_more_leaves_the_draws_of_the_others(store):
    """An ablation compares runs that differ in one augmentation alone."""
    everything = draw(64, **EVERYTHING)
    assert np.array_equal(draw(64, roll=True).rolls_B, everything.rolls_B)
    masks = draw(64, time_mask_frames=40)
    assert np.array_equal(masks.time_masks_BN2, everything.time_masks_BN2)
    assert not masks.band_masks_BN2.any()
    twice = draw(64, time_mask_frames=40, masks_each=2).time_masks_BN2
    assert np.array_equal(twice[:, :1], masks.time_masks_BN2)
    assert (twice[:, 0] != twice[:, 1]).any(axis=1).mean() > 0.9


def test_draws_of_different_names_are_unrelated():
    """A width that goes with its place, or a gain with a roll, would be another augmentation."""
    order = RowOrder(rows_N=np.arange(10_000), clips=10_000, seed=0)
    names = ["crop", "roll", "gain", "time mask width", "time mask start", "mixup", "mixup radius"]
    correlations = np.corrcoef([draw_uniform_B(name, 0, 0, order) for name in names])
    assert np.abs(correlations - np.eye(len(names))).max() < 0.05


def test_changes_do_not_depend_on_the_number_of_ranks(store):
    """Two ranks of 4 clips do to a step what one of 8 does, partners included; a rank counts them from its first."""
    view = labelled_view(store, augment=Augment(**EVERYTHING))
    whole = PlainLoader(store, order_of(store, clips=8), view).batch_maker.cuts_at_step(4).changes
    ranks = [
        PlainLoader(store, order_of(store, clips=4, rank=rank, world=2), view)
        .batch_maker.cuts_at_step(4)
        .changes
        for rank in (0, 1)
    ]
    for name in ("rolls_B", "gains_B", "time_masks_BN2", "band_masks_BN2", "shares_B"):
        joined = np.concatenate([getattr(rank, name) for rank in ranks])
        assert np.array_equal(joined, getattr(whole, name)), name
    assert (
        np.concatenate([ranks[0].partners_B, 4 + ranks[1].partners_B]).tolist() == whole.partners_B.tolist()
    )
    assert (whole.partners_B != np.arange(8)).any()


def test_masks_take_every_legal_place_and_width():
    """In 5 frames a mask of up to 2: 6 places for none, 5 for one, 4 for two; the ends included, widths alike."""
    spans = np.concatenate(
        [draw(512, step=step, n_frames=5, time_mask_frames=2).time_masks_BN2[:, 0] for step in range(8)]
    )
    distinct_spans, counts = np.unique(spans, axis=0, return_counts=True)
    legal_spans = {(start, start + width) for width in (0, 1, 2) for start in range(6 - width)}
    assert {tuple(span) for span in distinct_spans.tolist()} == legal_spans
    widths = distinct_spans[:, 1] - distinct_spans[:, 0]
    for width in (0, 1, 2):
        place_counts = counts[widths == width]
        assert abs(place_counts.sum() - 4_096 / 3) < 5 * np.sqrt(4_096 * 2 / 9)
        assert stats.chisquare(place_counts).pvalue > 1e-4


def test_a_mask_is_never_wider_than_the_clip():
    """Clips may be shorter than the widest mask; then any part of them may be hidden, up to all of it."""
    spans = draw(4_000, n_frames=3, time_mask_frames=192).time_masks_BN2[:, 0]
    assert spans.min() == 0
    assert spans.max() == 3
    assert set((spans[:, 1] - spans[:, 0]).tolist()) == {0, 1, 2, 3}


def test_rolls_reach_every_frame_and_gains_their_decibels():
    """Ten decibels are a factor of ten in power, ln 10 in the log-mel."""
    changes = draw(4_000, n_frames=7, roll=True, gain_db=10.0)
    assert set(changes.rolls_B.tolist()) == set(range(7))
    assert stats.kstest(changes.gains_B / np.log(10), stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 1.0, 10.0, 1_000.0])
def test_shares_follow_the_beta_distribution(alpha):
    """Against scipy's; alpha 0.01 overflows on the way and must still give shares of 0 and 1."""
    rng = np.random.default_rng(0)
    shares = symmetric_beta(alpha, rng.random(20_000), rng.random(20_000))
    assert shares.min() >= 0
    assert shares.max() <= 1
    low = stats.beta(alpha, alpha).cdf(1e-9)  # the cdf is steep beyond double precision at the ends
    assert stats.kstest(np.clip(shares, 1e-9, 1 - 1e-9), stats.beta(alpha, alpha).cdf).statistic < low + 0.015


def test_mixup_share_of_the_clips_are_mixed_and_none_with_itself():
    """The other clips keep their values, whatever their neighbours hold."""
    changes = draw(4_000, mixup_share=0.3)
    is_mixed_B = changes.partners_B != np.arange(4_000)
    assert abs(is_mixed_B.mean() - 0.3) < 5 * np.sqrt(0.21 / 4_000)
    assert (changes.shares_B[~is_mixed_B] == 1).all()
    assert (changes.shares_B[is_mixed_B] < 1).all()


@pytest.mark.parametrize("clips", [1, 2, 3, 4, 7, 64])
def test_every_clip_is_the_partner_of_one_other(clips):
    """Only a lone clip is its own partner; partners are neighbours, so that ranks of even size split no pair."""
    partners_B = mixup_partners(clips)
    assert sorted(partners_B) == list(range(clips))
    assert clips == 1 or (partners_B != np.arange(clips)).all()
    assert (abs(partners_B - np.arange(clips)) <= 2).all()


def test_ranks_that_would_split_a_pair_are_refused(store):
    """A rank reads its own clips alone: an odd number of them would leave one without its neighbour."""
    view = labelled_view(store, augment=Augment(mixup_share=1.0))
    rows_N = store.good_rows()
    with pytest.raises(
        RunError, match=r"3 clips of each of 2 ranks is an odd number; choose --batch a multiple of 4"
    ):
        PlainLoader(store, RowOrder(rows_N=rows_N, clips=3, seed=0, world=2), view)
    PlainLoader(store, RowOrder(rows_N=rows_N, clips=3, seed=0), view)


def test_a_mixture_with_a_longer_clip_is_valid_as_far_as_that(store):
    """Beyond its own end the shorter clip adds the mean, 0: there the mixture is the longer clip, at its share."""
    rows = store.good_rows()
    short = rows[store.n_frames_N[rows] < 900][0]
    whole = rows[store.n_frames_N[rows] == 998][0]
    view = labelled_view(store, augment=Augment(mixup_share=1.0))
    order = RowOrder(rows_N=np.array([short, whole]), clips=2, seed=0)
    batch = PlainLoader(store, order, view).make_batch(0)
    plain = PlainLoader(store, order, labelled_view(store)).make_batch(0)
    (short_clip,) = np.flatnonzero(batch.rows_B == short)
    (whole_clip,) = np.flatnonzero(batch.rows_B == whole)
    end = int(store.n_frames_N[short])
    share = PlainLoader(store, order, view).batch_maker.cuts_at_step(0).changes.shares_B[short_clip]
    assert batch.n_frames_B.tolist() == [998, 998]
    torch.testing.assert_close(
        batch.mel_BTF[short_clip, end:], plain.mel_BTF[whole_clip, end:] * float(np.float32(1) - share)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"gain_db": -1.0},
        {"gain_db": float("nan")},
        {"time_mask_frames": -1},
        {"band_mask_bands": -2},
        {"masks_each": 0},
        {"mixup_share": 1.5},
        {"mixup_alpha": 0.0},
    ],
)
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        Augment(**wrong)
