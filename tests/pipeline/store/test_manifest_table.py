"""An open store reads what is asked for, and nothing else."""

import pickle
import shutil

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import feature_store, manifest_table
from pipeline.store.feature_store import FeatureStore
from pipeline.store.joined_store import JoinedStore
from pipeline.store.manifest import MANIFEST_SCHEMA
from pipeline.store.splits import train_splits
from pipeline.tables import read_table, write_table


@pytest.fixture
def columns_read(monkeypatch) -> list[str]:
    """The columns of all tables of the store that are read during the test."""
    names: list[str] = []

    def note_columns(path, columns=None):
        frame, metadata = read_table(path, columns)
        names.extend(frame.columns)
        return frame, metadata

    for module in (manifest_table, feature_store):
        monkeypatch.setattr(module, "read_table", note_columns)
    return names


def test_training_reads_four_columns_and_each_once(store_path, columns_read):
    """Two million rows have 20 columns, 1 GB of them texts, and every rank opens the store."""
    store = FeatureStore.open(store_path)
    assert columns_read == []
    for _ in range(2):
        store.good_rows(train_splits(store))
        store.n_frames_N.sum()
        store.labels_BC(np.array([0]))
    assert sorted(columns_read) == ["n_frames", "raw", "split", "status"]


def test_columns_are_those_of_the_whole_manifest(store_path):
    """However a column is asked for, its values are the same."""
    whole = read_table(store_path / "manifest.parquet")[0]
    store = FeatureStore.open(store_path)
    assert store.manifest_columns("n_frames", "clip_id").equals(whole.select("n_frames", "clip_id"))
    assert store.manifest_rows([3, 1]).equals(whole[[3, 1]])
    assert store.split_names == tuple(whole["split"].unique(maintain_order=True))
    assert store.manifest.equals(whole)
    assert store.manifest_columns(*MANIFEST_SCHEMA).equals(whole)
    good = (whole["status"] == "good") & (whole["split"] == "eval")
    assert store.good_rows(["eval"]).tolist() == good.arg_true().to_list()
    assert pickle.loads(pickle.dumps(store)).good_rows().tolist() == store.good_rows().tolist()


def test_joined_stores_have_the_columns_of_both(store_path):
    """Row i of the joined store is described by row i."""
    store = FeatureStore.open(store_path)
    reversed_store = FeatureStore(store.path, store.header, store.manifest.reverse(), "another id")
    joined = JoinedStore([store, reversed_store])
    whole = joined.manifest
    assert joined.manifest_columns("clip_id", "n_frames").equals(whole.select("clip_id", "n_frames"))
    assert joined.split_names == tuple(whole["split"].unique(maintain_order=True))
    assert joined.n_frames_N.tolist() == whole["n_frames"].to_list()


def test_a_store_that_was_built_anew_is_not_read_on(store_path, tmp_path):
    """Rows of two builds must not be mixed: the frames of one would cut the clips of the other."""
    shutil.copytree(store_path, tmp_path / "x.zarr")
    store = FeatureStore.open(tmp_path / "x.zarr")
    path = tmp_path / "x.zarr" / "manifest.parquet"
    write_table(path, read_table(path)[0], {"store_id": "another"})
    with pytest.raises(StoreError, match="has been built anew since it was opened"):
        store.good_rows()
