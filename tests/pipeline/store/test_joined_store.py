"""Several stores are read as one."""

import pickle
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from stores import build

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.audioset import audioset_corpus
from pipeline.errors import BrokenClipError, StoreError
from pipeline.loading.dali import DaliLoader
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import LEAST_STD_SHARE, FeatureStore, pool_band_mean_and_std
from pipeline.store.joined_store import JoinedStore, describe_class_list

CLIPS, OTHER_CLIPS = 48, 24


@pytest.fixture(scope="module")
def other(other_store_path) -> FeatureStore:
    return FeatureStore.open(other_store_path)


@pytest.fixture(scope="module")
def joined(store, other) -> JoinedStore:
    return JoinedStore([store, other])


def test_rows_of_the_second_store_follow_those_of_the_first(joined, store, other):
    """All data of a row are those of its own store: values, labels, lengths, shards, manifest."""
    rows_N = np.concatenate([store.good_rows(), CLIPS + other.good_rows()])
    assert np.array_equal(joined.good_rows(), rows_N)
    assert np.array_equal(joined.n_frames_N, np.concatenate([store.n_frames_N, other.n_frames_N]))
    assert joined.manifest.equals(pl.concat([store.manifest, other.manifest]))
    for row in rows_N[::5]:
        owner, own = (store, row) if row < CLIPS else (other, row - CLIPS)
        one, same = np.array([row]), np.array([own])
        assert np.array_equal(joined.read(one), owner.read(same))
        assert np.array_equal(joined.labels_BC(one, "unambiguous"), owner.labels_BC(same, "unambiguous"))


def test_a_batch_of_both_stores_keeps_its_order(joined, store, other):
    """Rows of both stores alternate; crops are read into given memory."""
    rows_B, starts_B = np.array([60, 0, 1, 61, 62, 2]), np.array([0, 7, 3, 5, 9, 1])
    out_BTF = np.zeros((6, 50, store.bands), store.dtype)
    assert joined.read(rows_B, out=out_BTF, starts_B=starts_B, frames=50) is out_BTF
    for clip_TF, row, start in zip(out_BTF, rows_B, starts_B, strict=True):
        owner, own = (store, row) if row < CLIPS else (other, row - CLIPS)
        assert np.array_equal(clip_TF, owner.read(np.array([own]))[0, start : start + 50])


def test_a_broken_clip_is_reported_by_its_row_of_the_joined_store(store, other_store_path, monkeypatch):
    """A loader that skips the clip knows only this row; the message names the store and its own row."""
    other = FeatureStore.open(other_store_path)

    def broken(rows_B, **options):
        raise BrokenClipError(int(rows_B[0]), f"{other.path}: row {rows_B[0]} cannot be read")

    monkeypatch.setattr(other, "read", broken)
    with pytest.raises(BrokenClipError, match=r"other\.zarr: row 3 cannot be read") as caught:
        JoinedStore([store, other]).read(np.array([1, CLIPS + 3]))
    assert caught.value.row == CLIPS + 3


def test_no_rows_are_read_as_no_rows(joined):
    """This works as for one store; loaders read no rows to check that a label set exists."""
    assert joined.read(np.zeros(0, np.int64)).shape == (0, joined.frames, joined.bands)
    assert joined.labels_BC(np.zeros(0, np.int64)).shape == (0, 527)


def test_flat_labels_are_those_of_every_row(joined):
    """The flat labels, which give the sampling weights, agree with the labels of batches."""
    class_N, begins_N = joined.flat_labels("unambiguous")
    assert len(begins_N) == CLIPS + OTHER_CLIPS + 1
    labels_NC = joined.labels_BC(np.arange(CLIPS + OTHER_CLIPS), "unambiguous")
    for row, labels_C in enumerate(labels_NC):
        assert set(class_N[begins_N[row] : begins_N[row + 1]]) == set(np.flatnonzero(labels_C))


def test_shards_are_counted_through(joined, store):
    """The last row of one store and the first row of the next are in different shards."""
    shards_N = joined.shard_numbers(np.arange(CLIPS + OTHER_CLIPS))
    assert store.header.layout.shard_clips == 16
    assert shards_N.tolist() == [0] * 16 + [1] * 16 + [2] * 16 + [3] * 16 + [4] * 8


def test_mean_and_deviation_are_those_of_all_values(joined):
    """They are computed over the frames of both stores, from the stored statistics."""
    rows_N = joined.good_rows(["a_train"])
    audio = [joined.read(np.array([row]))[0, : joined.n_frames_N[row]] for row in rows_N]
    values_N = np.concatenate(audio).astype(np.float64)
    assert joined.mean_and_std(["a_train"]) == pytest.approx((values_N.mean(), values_N.std()), rel=1e-4)
    values_NF = np.concatenate(audio).astype(np.float64)
    mean_F, std_F = joined.band_mean_and_std(["a_train"])
    np.testing.assert_allclose(mean_F, values_NF.mean(0), rtol=1e-4)
    expected_F = values_NF.std(0)
    np.testing.assert_allclose(std_F, np.maximum(expected_F, LEAST_STD_SHARE * expected_F.mean()), rtol=1e-3)


def test_a_band_of_one_value_has_a_deviation_to_divide_by():
    """High bands of sounds with a rate of 8 kHz contain only the floor, which float16 rounds by 0.003 nat."""
    part = {"frames": 10, "mean_F": [1.0, 2.0], "std_F": [0.0, 1.0]}
    assert pool_band_mean_and_std([part])[1].tolist() == [0.125, 1.0]


def test_weights_are_shared_out_among_the_rows_of_each_store(joined):
    """Weights of 70 and 30 stay 70 and 30, whatever the sizes of the stores."""
    rows_N = joined.good_rows(["a_train"])
    weights_N = joined.row_weights(rows_N, [0.7, 0.3])
    first_N = rows_N < CLIPS
    assert weights_N[first_N].sum() == pytest.approx(0.7)
    assert weights_N[~first_N].sum() == pytest.approx(0.3)
    assert len(set(weights_N[first_N])) == len(set(weights_N[~first_N])) == 1


@pytest.mark.parametrize("kind", [PlainLoader, DaliLoader])
def test_batches_of_joined_stores_are_those_of_each_store(joined, store, kind):
    """With both loaders: a clip and its labels are the same as from its own store alone."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not there: only Linux has it")
    view = View(frames=96, mean=-5.0, std=3.0, crop="start", label_set="raw")
    order = RowOrder(rows_N=joined.good_rows(), clips=7, seed=2)
    with kind(joined, order, view) as loader:
        batches = list(loader.batches(0, 2 * order.steps_per_epoch))
    rows_N = np.concatenate([batch.rows_B for batch in batches])
    assert (rows_N < CLIPS).any()
    assert (rows_N >= CLIPS).any()
    for batch in batches:
        for clip, row in enumerate(batch.rows_B):
            if row < CLIPS:
                alone = PlainLoader(
                    store, RowOrder(rows_N=np.array([row]), clips=1, seed=0), view
                ).make_batch(0)
                assert torch.equal(batch.mel_BTF[clip], alone.mel_BTF[0])
                assert torch.equal(batch.labels_BC[clip], alone.labels_BC[0])


def test_a_joined_store_goes_to_other_processes(joined):
    """It is pickled as the paths of its stores."""
    again = pickle.loads(pickle.dumps(joined))
    rows_B = np.array([0, 50])
    assert np.array_equal(again.read(rows_B), joined.read(rows_B))


def test_the_id_depends_on_the_stores_and_their_order(store, other, joined):
    """A run is resumed on the same rows or not at all."""
    assert JoinedStore([store, other]).store_id == joined.store_id
    assert len({joined.store_id, JoinedStore([other, store]).store_id, store.store_id}) == 3


def test_a_split_that_no_store_has_is_refused(joined):
    """A split that only one store has gives the rows of that store."""
    with pytest.raises(
        StoreError, match=r"no split 'a_tarin'; did you mean 'a_train'\? There are: a_train, eval"
    ):
        joined.good_rows(["a_tarin"])
    with pytest.raises(StoreError, match="no good clip in nothing"):
        joined.mean_and_std(["nothing"])


def test_a_store_of_silence_cannot_be_normalised(store, other):
    """Its std is zero except for rounding; the error is one line and no ValueError, for one store and for several."""
    flat = {"frames": 3, "mean": -15.9424, "std": 0.0}
    silent = [FeatureStore(one.path, one.header, one.manifest, one.store_id) for one in (store, other)]
    for one in silent:
        one.stats = {"a_train": flat, "eval": flat}
    message = r"every value of the good clips in a_train, eval is -15\.9424, nothing to learn from; build it"
    for place, one in (("tiny", silent[0]), ("other.zarr", JoinedStore(silent))):
        with pytest.raises(StoreError, match=rf"{place}.*: {message}"):
            one.mean_and_std(["a_train", "eval"])


def test_a_split_of_one_store_only_is_that_stores_rows(store, corpus, tmp_path):
    """AudioSet has `unbalanced_train`, one's own sounds have `train`."""
    segments = tmp_path / "mine_segments.csv"
    shutil.copy(corpus / "eval_segments.csv", segments)
    own_corpus = audioset_corpus([corpus / "audio"], [segments])
    build_store(
        own_corpus,
        StoreOutput(path=tmp_path / "mine.zarr", spec=preset_mel_spec("a-jepa")),
        BuildOptions(workers=0),
    )
    both = JoinedStore([store, FeatureStore.open(tmp_path / "mine.zarr")])
    assert (both.good_rows(["mine"]) >= CLIPS).all()
    assert (both.good_rows(["eval"]) < CLIPS).all()
    assert both.label_sets == ("raw",)
    with pytest.raises(StoreError, match=r"mine\.zarr: no label set 'unambiguous'"):
        both.labels_BC(np.array([0]), "unambiguous")


def test_stores_of_another_dtype_are_refused(store, uint8_store_path):
    """Stored values would have two meanings."""
    message = r"tiny-uint8.zarr: has dtype uint8, but .*tiny.zarr has float16; .* build one of them again"
    with pytest.raises(StoreError, match=message):
        JoinedStore([store, FeatureStore.open(uint8_store_path)])


def test_stores_of_another_mel_spec_are_refused(store, corpus, tmp_path):
    """The message describes both, by name, shape and id."""
    build(corpus, tmp_path / "panns.zarr", spec="panns")
    message = (
        r"panns.zarr: has mel spec panns \(1001 x 64, \w+\), but .*tiny.zarr has a-jepa \(998 x 128, \w+\)"
    )
    with pytest.raises(StoreError, match=message):
        JoinedStore([store, FeatureStore.open(tmp_path / "panns.zarr")])


def test_stores_of_other_classes_are_refused(store, store_path, tmp_path):
    """Each index must mean only one class."""
    shutil.copytree(store_path, tmp_path / "swapped.zarr")
    swapped = FeatureStore.open(tmp_path / "swapped.zarr")
    mids = swapped.classes.mids
    swapped.classes = replace(swapped.classes, mids=(mids[1], mids[0], *mids[2:]))
    message = (
        f"has class list of 527 classes, number 0 is {mids[1]}, but .* of 527 classes, number 0 is {mids[0]}"
    )
    with pytest.raises(StoreError, match=message):
        JoinedStore([store, swapped])


def test_the_first_class_that_differs_is_named():
    """If one list is longer, it is the first class that the other lacks."""
    assert describe_class_list(["a", "b", "c"], ["a", "b"]) == "of 3 classes, number 2 is c"
    assert describe_class_list(["a", "b"], ["a", "b", "c"]) == "of 2 classes"


def test_a_store_given_twice_is_refused(store, store_path, tmp_path):
    """This includes copies: the clips would count twice without the user's request."""
    shutil.copytree(store_path, tmp_path / "copy.zarr")
    with pytest.raises(StoreError, match=r"copy.zarr: is the same store as .*tiny.zarr; give it once"):
        JoinedStore([store, FeatureStore.open(tmp_path / "copy.zarr")])
