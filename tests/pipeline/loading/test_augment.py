"""What may be changed about a clip is drawn fairly, reproducibly, and done as its formula says."""

import itertools

import numpy as np
import pytest
import torch
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


@pytest.fixture(scope="session", params=["float16", "uint8"])
def any_store(request) -> FeatureStore:
    fixture = {"float16": "store_path", "uint8": "uint8_store_path"}[request.param]
    return FeatureStore.open(request.getfixturevalue(fixture))


def view_of(store: FeatureStore, **kind) -> View:
    """Normalised by the store's own statistics, labelled."""
    stats_of = store.stats["all"]
    return View(
        **{"frames": 1_024, "mean": stats_of["mean"], "std": stats_of["std"], "label_set": "raw"} | kind
    )


def order_of(store: FeatureStore, **kind) -> RowOrder:
    return RowOrder(**{"rows_N": store.good_rows(), "clips": 6, "seed": 1} | kind)


def changes(clips: int, *, step: int = 0, n_frames: int = 96, **augment):
    order = RowOrder(rows_N=np.arange(clips), clips=clips, seed=0)
    n_frames_B = np.full(clips, n_frames)
    return draw_changes(Augment(**augment), 0, step, order, n_frames_B=n_frames_B, bands=128)


def rendered(
    store: FeatureStore, loader: PlainLoader, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mel, labels and valid frames of a step, one value after the other in double precision."""
    view, cuts = loader.feed.view, loader.feed.cuts_at_step(step)
    drawn = cuts.changes
    mel_BTF = np.zeros((len(cuts.rows_B), view.frames, store.bands))
    for clip, (row, start, n) in enumerate(zip(cuts.rows_B, cuts.starts_B, cuts.n_frames_B, strict=True)):
        log_mel_TF = store.offset + store.scale * store.read(np.array([row]))[0].astype(np.float64)
        shown_TF = np.roll(log_mel_TF[start : start + n], drawn.rolls_B[clip], axis=0) + drawn.gains_B[clip]
        shown_TF = (shown_TF - view.mean) / view.std
        frames_T, bands_F = np.arange(n), np.arange(store.bands)
        for first, end in drawn.time_masks_BN2[clip]:
            shown_TF[(frames_T >= first) & (frames_T < end)] = 0
        for low, high in drawn.band_masks_BN2[clip]:
            shown_TF[:, (bands_F >= low) & (bands_F < high)] = 0
        mel_BTF[clip, :n] = shown_TF
    labels_BC = store.labels_BC(cuts.rows_B, view.label_set).astype(np.float64)
    own, other = drawn.shares_B.astype(np.float64), drawn.partners_B
    mixed_BTF = own[:, None, None] * mel_BTF + (1 - own)[:, None, None] * mel_BTF[other]
    mixed_BC = own[:, None] * labels_BC + (1 - own)[:, None] * labels_BC[other]
    return mixed_BTF, mixed_BC, np.maximum(cuts.n_frames_B, cuts.n_frames_B[other])


@pytest.mark.parametrize("augment", SUBSETS, ids=lambda augment: "+".join(augment) or "none")
def test_a_batch_is_what_its_changes_say(any_store, augment):
    """Every augmentation on and off, against a rendering that shares nothing with the loaders but the draws."""
    view = view_of(any_store, augment=Augment(**augment))
    loader = PlainLoader(any_store, order_of(any_store), view)
    for step in range(3):
        batch, (mel_BTF, labels_BC, n_frames_B) = loader.make_batch(step), rendered(any_store, loader, step)
        np.testing.assert_allclose(batch.mel_BTF, mel_BTF, rtol=2e-5, atol=4e-6)
        np.testing.assert_allclose(batch.labels_BC, labels_BC, atol=1e-6)
        assert np.array_equal(batch.n_frames_B, n_frames_B)
        assert np.array_equal(batch.rows_B, loader.feed.order.rows_at_step(step))


def test_without_augmentation_not_a_bit_has_changed(any_store):
    """What pre-training saw before there were augmentations: runs from then can be carried on with."""
    store, view, order = any_store, view_of(any_store, frames=250, seed=5), order_of(any_store)
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
    """An ablation compares runs that differ in what is ablated."""
    alone, all_of_them = changes(64, roll=True), changes(64, **EVERYTHING)
    assert np.array_equal(alone.rolls_B, all_of_them.rolls_B)
    masks = changes(64, time_mask_frames=40)
    assert np.array_equal(masks.time_masks_BN2, all_of_them.time_masks_BN2)
    assert not masks.band_masks_BN2.any()
    twice = changes(64, time_mask_frames=40, masks_each=2).time_masks_BN2
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
    view = view_of(store, augment=Augment(**EVERYTHING))
    whole = PlainLoader(store, order_of(store, clips=8), view).feed.cuts_at_step(4).changes
    ranks = [
        PlainLoader(store, order_of(store, clips=4, rank=rank, world=2), view).feed.cuts_at_step(4).changes
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
        [changes(512, step=step, n_frames=5, time_mask_frames=2).time_masks_BN2[:, 0] for step in range(8)]
    )
    seen, counts = np.unique(spans, axis=0, return_counts=True)
    wanted = {(start, start + width) for width in (0, 1, 2) for start in range(6 - width)}
    assert {tuple(span) for span in seen.tolist()} == wanted
    widths = seen[:, 1] - seen[:, 0]
    for width in (0, 1, 2):
        places = counts[widths == width]
        assert abs(places.sum() - 4_096 / 3) < 5 * np.sqrt(4_096 * 2 / 9)
        assert stats.chisquare(places).pvalue > 1e-4


def test_a_mask_is_never_wider_than_the_clip():
    """Clips may be shorter than the widest mask; then any part of them may be hidden, up to all of it."""
    spans = changes(4_000, n_frames=3, time_mask_frames=192).time_masks_BN2[:, 0]
    assert spans.min() == 0
    assert spans.max() == 3
    assert set((spans[:, 1] - spans[:, 0]).tolist()) == {0, 1, 2, 3}


def test_rolls_reach_every_frame_and_gains_their_decibels():
    """Ten decibels are a factor of ten in power, ln 10 in the log-mel."""
    drawn = changes(4_000, n_frames=7, roll=True, gain_db=10.0)
    assert set(drawn.rolls_B.tolist()) == set(range(7))
    assert stats.kstest(drawn.gains_B / np.log(10), stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 1.0, 10.0, 1_000.0])
def test_shares_follow_the_beta_distribution(alpha):
    """Against scipy's; alpha 0.01 overflows on the way and must still give shares of 0 and 1."""
    rng = np.random.default_rng(0)
    shares = symmetric_beta(alpha, rng.random(20_000), rng.random(20_000))
    assert shares.min() >= 0
    assert shares.max() <= 1
    low = stats.beta(alpha, alpha).cdf(1e-9)  # the cdf is steep beyond double precision at the ends
    assert stats.kstest(np.clip(shares, 1e-9, 1 - 1e-9), stats.beta(alpha, alpha).cdf).statistic < low + 0.015


def test_the_asked_share_of_clips_is_mixed_and_nobody_with_themselves():
    """The rest keep their own values, whatever their neighbours hold."""
    drawn = changes(4_000, mixup_share=0.3)
    mixed = drawn.partners_B != np.arange(4_000)
    assert abs(mixed.mean() - 0.3) < 5 * np.sqrt(0.21 / 4_000)
    assert (drawn.shares_B[~mixed] == 1).all()
    assert (drawn.shares_B[mixed] < 1).all()


@pytest.mark.parametrize("clips", [1, 2, 3, 4, 7, 64])
def test_neighbours_give_once_and_take_once(clips):
    """Only who is alone mixes with themselves; pairs stay together however evenly they are dealt."""
    partners_B = mixup_partners(clips)
    assert sorted(partners_B) == list(range(clips))
    assert clips == 1 or (partners_B != np.arange(clips)).all()
    assert (abs(partners_B - np.arange(clips)) <= 2).all()


def test_ranks_cannot_tear_a_pair(store):
    """A rank reads its own clips alone: an odd number of them would leave one without its neighbour."""
    view = view_of(store, augment=Augment(mixup_share=1.0))
    rows_N = store.good_rows()
    with pytest.raises(
        RunError, match=r"3 clips of each of 2 ranks is an odd number; choose --batch a multiple of 4"
    ):
        PlainLoader(store, RowOrder(rows_N=rows_N, clips=3, seed=0, world=2), view)
    PlainLoader(store, RowOrder(rows_N=rows_N, clips=3, seed=0), view)


def test_a_mixture_with_a_longer_clip_is_valid_as_far_as_that(store):
    """Beyond its own end the shorter clip adds the mean, 0: there the mixture is the longer clip, at its share."""
    rows = store.good_rows()
    short, whole = rows[store.n_frames_N[rows] < 900][0], rows[store.n_frames_N[rows] == 998][0]
    view = view_of(store, augment=Augment(mixup_share=1.0))
    order = RowOrder(rows_N=np.array([short, whole]), clips=2, seed=0)
    batch = PlainLoader(store, order, view).make_batch(0)
    plain = PlainLoader(store, order, view_of(store)).make_batch(0)
    (at,), (other,) = np.flatnonzero(batch.rows_B == short), np.flatnonzero(batch.rows_B == whole)
    end = int(store.n_frames_N[short])
    share = PlainLoader(store, order, view).feed.cuts_at_step(0).changes.shares_B[at]
    assert batch.n_frames_B.tolist() == [998, 998]
    torch.testing.assert_close(
        batch.mel_BTF[at, end:], plain.mel_BTF[other, end:] * float(np.float32(1) - share)
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
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        Augment(**wrong)
