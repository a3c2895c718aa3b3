"""The plain loader: its batches are the reference of every other loader."""

import shutil

import numpy as np
import pytest
import torch
from loading_inputs import order_of, store_with_broken_rows, view_of

from pipeline.errors import BrokenClipError, RunError, StoreError
from pipeline.loading.augment import Augment, draw_uniform_B
from pipeline.loading.loader import PlainLoader, View, replace_broken_rows
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore

# Far below, below, exactly and beyond the frames of a whole clip; short clips have 198 or more.
FRAMES = [96, 250, 998, 1024, 1500]


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("crop", ["start", "random"])
def test_a_batch_is_what_its_formula_says(any_store, frames, crop):
    """(log-mel - mean) / std, value by value in double precision, from the stored numbers."""
    store, view = any_store, view_of(any_store, frames=frames, crop=crop)
    loader = PlainLoader(store, order_of(store), view)
    for step in range(3):
        batch = loader.make_batch(step)
        cuts = loader.batch_maker.cuts_at_step(step)
        wanted_BTF = np.zeros((6, frames, store.bands))
        for clip, (row, start, n_frames) in enumerate(
            zip(cuts.rows_B, cuts.starts_B, cuts.n_frames_B, strict=True)
        ):
            stored_TF = store.read(np.array([row]))[0].astype(np.float64)
            mel_TF = store.offset + store.scale * stored_TF
            wanted_BTF[clip, :n_frames] = ((mel_TF - view.mean) / view.std)[start : start + n_frames]
        np.testing.assert_allclose(batch.mel_BTF, wanted_BTF, rtol=1e-5, atol=2e-6)
        assert np.array_equal(batch.n_frames_B, cuts.n_frames_B)
        assert np.array_equal(batch.rows_B, order_of(store).rows_at_step(step))


def test_padding_is_exactly_zero(store):
    """A padded frame is the mean, not the floor: or a model learns the length of a clip from its silence."""
    short = store.good_rows()[store.n_frames_N[store.good_rows()] < store.frames]
    assert len(short) >= 2
    order = RowOrder(rows_N=short, clips=len(short), seed=0)
    batch = PlainLoader(store, order, view_of(store, frames=1_024)).make_batch(0)
    for mel_TF, n_frames, row in zip(batch.mel_BTF, batch.n_frames_B, batch.rows_B, strict=True):
        assert n_frames == store.n_frames_N[row]
        assert (mel_TF[n_frames:] == 0).all()
        assert (mel_TF[:n_frames] != 0).any(dim=1).all()


def test_normalised_audio_has_mean_0_and_std_1(any_store):
    """The statistics of the store are those of what a loader shows."""
    store = any_store
    rows = store.good_rows()
    loader = PlainLoader(store, RowOrder(rows_N=rows, clips=len(rows), seed=0), view_of(store, frames=998))
    batch = loader.make_batch(0)
    audio_N = torch.cat([mel_TF[:n] for mel_TF, n in zip(batch.mel_BTF, batch.n_frames_B, strict=True)])
    assert abs(audio_N.double().mean()) < 1e-4
    assert abs(audio_N.double().std() - 1) < 1e-4


def test_random_crops_lie_within_the_audio_and_reach_both_its_ends(store):
    """With 3 frames to spare a crop starts at 0, 1, 2 or 3; a short clip at 0. Never past the audio's end."""
    loader = PlainLoader(store, order_of(store), view_of(store, frames=995))
    cuts = [loader.batch_maker.cuts_at_step(step) for step in range(60)]
    rows_N, starts_N, n_frames_N = (
        np.concatenate([getattr(cut, name) for cut in cuts]) for name in ("rows_B", "starts_B", "n_frames_B")
    )
    whole_N = store.n_frames_N[rows_N] == 998
    assert set(starts_N[whole_N]) == {0, 1, 2, 3}
    assert set(starts_N[~whole_N]) == {0}
    assert (starts_N + n_frames_N <= store.n_frames_N[rows_N]).all()


def test_draws_are_uniform():
    """Mean 1/2 and variance 1/12 over 40,000 draws, within five standard errors."""
    order = RowOrder(rows_N=np.arange(400), clips=400, seed=0)
    draws_N = np.concatenate([draw_uniform_B("crop", 0, step, order) for step in range(100)])
    assert abs(draws_N.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / 40_000)
    assert abs(draws_N.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / 40_000)


def test_crops_differ_from_step_to_step_and_seed_to_seed(store):
    """The same clip is seen at another place the next time."""
    loaders = [PlainLoader(store, order_of(store), view_of(store, seed=seed)) for seed in (0, 1)]
    starts = {
        tuple(loader.batch_maker.cuts_at_step(step).starts_B) for loader in loaders for step in range(5)
    }
    assert len(starts) == 10


def test_batches_do_not_depend_on_the_number_of_ranks(store):
    """Two ranks of 3 clips make of one step what one rank of 6 does, crops included."""
    whole = PlainLoader(store, order_of(store), view_of(store)).make_batch(4)
    halves = [
        PlainLoader(store, order_of(store, clips=3, rank=rank, world=2), view_of(store)).make_batch(4)
        for rank in (0, 1)
    ]
    assert torch.equal(whole.mel_BTF, torch.cat([half.mel_BTF for half in halves]))


def test_several_crops_of_a_clip_lie_side_by_side_at_positions_of_their_own(store):
    """The first crop is where a single one would be, so that more crops do not change it."""
    order = order_of(store)
    one = PlainLoader(store, order, view_of(store, frames=32)).make_batch(3)
    three = PlainLoader(store, order, view_of(store, frames=32, crops=3)).make_batch(3)
    np.testing.assert_array_equal(three.rows_B, one.rows_B)
    assert three.mel_BTF.shape == (18, 32, store.bands)
    assert torch.equal(three.mel_BTF[::3], one.mel_BTF)
    assert torch.equal(three.n_frames_B[::3], one.n_frames_B)
    long_B = (one.n_frames_B == 32).numpy() & (store.n_frames_N[one.rows_B] > 64)
    assert long_B.any()
    for clip in np.flatnonzero(long_B):
        crops_TF = three.mel_BTF[3 * clip : 3 * clip + 3]
        assert not torch.equal(crops_TF[0], crops_TF[1])
        assert not torch.equal(crops_TF[1], crops_TF[2])


def test_crops_do_not_depend_on_the_number_of_ranks(store):
    """Half of the clips on each of two ranks: the same crops."""
    view = view_of(store, frames=32, crops=2)
    whole = PlainLoader(store, order_of(store), view).make_batch(1)
    halves = [
        PlainLoader(store, order_of(store, clips=3, rank=rank, world=2), view).make_batch(1)
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([half.mel_BTF for half in halves]), whole.mel_BTF)


@pytest.mark.parametrize(
    "wrong",
    [{"crops": 0}, {"crops": 2, "crop": "start"}, {"crops": 2, "augment": Augment(roll=True)}],
    ids=str,
)
def test_crops_that_contradict_the_rest_of_a_view_are_refused(store, wrong):
    with pytest.raises(ValueError, match="crops must be 1 or more, and several need random crops"):
        view_of(store, **wrong)


def test_a_step_alone_is_the_step_of_the_whole_run(store):
    """Resuming is asking for the rest of the steps."""
    loader = PlainLoader(store, order_of(store), view_of(store))
    walked = list(loader.batches(0, 9))
    resumed = list(PlainLoader(store, order_of(store), view_of(store)).batches(5, 9))
    assert len(resumed) == 4
    for before, after in zip(walked[5:], resumed, strict=True):
        assert torch.equal(before.mel_BTF, after.mel_BTF)


def test_labels_are_those_of_the_rows(store):
    """Propagated labels if the view names their label set, none if it names no set."""
    view = view_of(store, label_set="unambiguous")
    batch = PlainLoader(store, order_of(store), view).make_batch(0)
    assert np.array_equal(batch.labels_BC, store.labels_BC(batch.rows_B, "unambiguous"))
    unlabelled = PlainLoader(store, order_of(store), view_of(store)).make_batch(0)
    assert unlabelled.labels_BC is None


def test_a_label_set_that_is_not_there_is_refused_before_the_first_batch(store):
    with pytest.raises(StoreError, match="propagate-labels"):
        PlainLoader(store, order_of(store), view_of(store, label_set="dominators"))


def test_a_missing_shard_is_named_and_never_read_as_silence(store_path, tmp_path):
    """Plain Zarr would read it as fill values and training would go on."""
    shutil.copytree(store_path, tmp_path / "damaged.zarr")
    shard = next((tmp_path / "damaged.zarr" / "mel" / "c").glob("*/0/0"))
    shard.unlink()
    damaged = FeatureStore.open(tmp_path / "damaged.zarr")
    with pytest.raises(StoreError, match=str(shard)):
        list(PlainLoader(damaged, order_of(damaged), view_of(damaged)).batches(0, 7))


def test_a_broken_clip_ends_the_batches_unless_skipping_is_asked_for(store_path, store):
    """Leaving clips out is the user's decision."""
    row = int(order_of(store).rows_at_step(0)[2])
    damaged = store_with_broken_rows(store_path, [row])
    with pytest.raises(BrokenClipError, match=f"row {row} cannot"):
        PlainLoader(damaged, order_of(store), view_of(store)).make_batch(0)


def test_a_skipped_clip_costs_one_line_and_the_next_of_its_batch_stands_in(store_path, store):
    """Told once in two epochs, counted in every batch, and shown like a clip: labels, frames and crop are its own."""
    broken_rows = [int(row) for row in order_of(store).rows_at_step(0)[[2, 3, 5]]]
    damaged = store_with_broken_rows(store_path, broken_rows)
    view = view_of(store, frames=900, label_set="raw")
    lines: list[str] = []
    loader = PlainLoader(damaged, order_of(store), view, on_broken="skip", say=lines.append)
    for step in range(14):
        batch = loader.make_batch(step)
        rows_B = order_of(store).rows_at_step(step)
        is_good_B = ~np.isin(rows_B, broken_rows)
        assert batch.skipped_clips == (~is_good_B).sum()
        assert np.array_equal(batch.rows_B[is_good_B], rows_B[is_good_B])
        assert not np.isin(batch.rows_B, broken_rows).any()
        assert np.array_equal(batch.labels_BC, store.labels_BC(batch.rows_B))
    assert sorted(lines) == sorted(f"skipped: row {row} cannot be read" for row in broken_rows)
    rows_B = order_of(store).rows_at_step(0)
    assert loader.make_batch(0).rows_B.tolist() == rows_B[[0, 1, 4, 4, 4, 0]].tolist()


def test_skipping_depends_on_the_store_only_not_on_what_was_met_before(store_path, store):
    """A resumed run has met nothing yet, and must see the same batches."""
    broken_rows = order_of(store).rows_at_step(3)[:2].tolist()
    uninterrupted, resumed = (
        PlainLoader(
            store_with_broken_rows(store_path, broken_rows),
            order_of(store),
            view_of(store),
            on_broken="skip",
            say=str,
        )
        for _ in range(2)
    )
    batches = list(uninterrupted.batches(0, 9))
    for step in (3, 8):
        assert torch.equal(resumed.make_batch(step).mel_BTF, batches[step].mel_BTF)


def test_a_step_without_a_readable_clip_is_an_error(store_path, store):
    """Never zeros, and never an endless search."""
    damaged = store_with_broken_rows(store_path, order_of(store).rows_at_step(1))
    loader = PlainLoader(damaged, order_of(store), view_of(store), on_broken="skip", say=str)
    assert loader.make_batch(0).skipped_clips == 0
    for _ in range(2):
        with pytest.raises(StoreError, match="none of the 6 clips"):
            loader.make_batch(1)


@pytest.mark.parametrize(
    ("broken", "stand_in"),
    [([], "abcd"), ("a", "bbcd"), ("d", "abca"), ("cd", "abaa"), ("abd", "cccc"), ("x", "abcd")],
)
def test_the_next_good_row_stands_in_cyclically(broken, stand_in):
    rows_B, skipped = replace_broken_rows(np.array([ord(row) for row in "abcd"]), set(map(ord, broken)))
    assert "".join(map(chr, rows_B)) == stand_in
    assert skipped == len(set(broken) & set("abcd"))


def test_an_unknown_treatment_of_broken_clips_is_refused(store):
    with pytest.raises(RunError, match="on_broken must be raise or skip"):
        PlainLoader(store, order_of(store), view_of(store), on_broken="ignore")


def test_cuda_where_there_is_none_is_refused_in_one_line(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RunError, match="device cuda: PyTorch finds 0 CUDA devices; use cpu"):
        PlainLoader(store, order_of(store), view_of(store), device="cuda")


def test_an_unknown_device_is_refused_in_one_line(store):
    with pytest.raises(RunError, match="device 'gpu': expected cpu, cuda or cuda:N"):
        PlainLoader(store, order_of(store), view_of(store), device="gpu")


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"std": 0.0}, {"std": float("nan")}, {"crop": "middle"}])
def test_a_view_that_shows_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        View(**{"frames": 8, "mean": 0.0, "std": 1.0} | wrong)
