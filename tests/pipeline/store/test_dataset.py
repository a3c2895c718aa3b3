"""A store as PyTorch expects a dataset: length, items, workers; and what a notebook shows of it."""

import os

import numpy as np
import pytest
import torch
from forked import start_forked
from forked_workers import (
    compare_forked_workers,
    name_the_broken_row_in_a_forked_worker,
    refuse_tables_in_a_forked_worker,
)
from torch.utils.data import DataLoader

from pipeline.errors import StoreError


def halve(mel_TF: torch.Tensor) -> torch.Tensor:
    """A transform that a spawned process can import."""
    return mel_TF / 2


def test_a_store_is_a_dataset_of_its_good_clips(store):
    """`DataLoader(store)` meets no clip that cannot be read."""
    rows_N = store.good_rows()
    assert len(store) == len(rows_N) < len(store.n_frames_N)
    batches = list(DataLoader(store, batch_size=32))
    assert torch.cat([batch["row"] for batch in batches]).tolist() == rows_N.tolist()
    mel_TF = store.to_log_mel(store.read(rows_N[:1]))[0]
    assert batches[0]["mel"].shape[1:] == (store.frames, store.bands)
    np.testing.assert_array_equal(batches[0]["mel"][0], mel_TF)
    assert batches[0]["clip_id"][0] == store.manifest["clip_id"][int(rows_N[0])]
    assert batches[0]["n_frames"].tolist() == store.n_frames_N[rows_N[:32]].tolist()
    assert "labels" not in store[0]
    assert store[-1]["row"] == rows_N[-1]
    with pytest.raises(IndexError):
        store[len(store)]


def test_a_dataset_has_a_split_and_its_labels(store):
    """The clips of a split, in the order of their rows, with the labels of any set, changed by a transform."""
    dataset = store.dataset("eval", labels="unambiguous", transform=halve)
    rows_N = store.good_rows("eval")
    assert len(dataset) == len(rows_N) == len(store.good_rows(["eval"]))
    clip = dataset[2]
    np.testing.assert_array_equal(clip["labels"], store.labels_BC(rows_N[2:3], "unambiguous")[0])
    plain = store.dataset(["eval"])[2]
    assert torch.equal(clip["mel"] * 2, plain["mel"])
    with pytest.raises(StoreError, match="no split 'evel'; did you mean 'eval'"):
        store.dataset("evel")
    with pytest.raises(StoreError, match="no label set 'own'"):
        store.dataset("eval", labels="own")


def test_forked_workers_do_not_wait_for_threads_of_their_parent(store_path, other_store_path, tmp_path):
    """Workers of a `DataLoader` are forked by default, and polars has had threads by then."""
    paths = (store_path, other_store_path)
    process = start_forked(compare_forked_workers, *paths, output=tmp_path / "output", environment=os.environ)
    process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()


def test_a_table_in_a_forked_worker_is_refused_instead_of_waited_for(store_path, tmp_path):
    """A store whose dataset has not been made is read by the worker."""
    process = start_forked(
        refuse_tables_in_a_forked_worker, store_path, output=tmp_path / "output", environment=os.environ
    )
    process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()


def test_a_broken_clip_in_a_forked_worker_is_named_by_its_row(store_path, tmp_path):
    """What is broken must not be told as a table that cannot be read."""
    process = start_forked(
        name_the_broken_row_in_a_forked_worker,
        *(store_path, tmp_path),
        output=tmp_path / "output",
        environment=os.environ,
    )
    process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()


def test_a_spawned_worker_reads_the_same(store):
    """A process that is spawned opens the store for itself."""
    dataset = store.dataset("eval", labels="raw", transform=halve)
    loader = DataLoader(dataset, batch_size=8, num_workers=1, multiprocessing_context="spawn")
    for batch, own in zip(loader, DataLoader(dataset, batch_size=8), strict=True):
        assert torch.equal(batch["mel"], own["mel"])
        assert torch.equal(batch["labels"], own["labels"])
        assert batch["clip_id"] == own["clip_id"]


def test_a_notebook_shows_a_store_in_a_line(store):
    """Location, clips, splits, mel spec: no table of rows."""
    shown = repr(store)
    assert shown.startswith(
        f"FeatureStore({store.location}: {len(store.n_frames_N)} clips, {len(store)} good ("
    )
    assert "eval " in shown
    assert f"a-jepa {store.frames} x {store.bands} float16" in shown
    assert repr(store.dataset("eval", labels="raw")).endswith("labels raw)")
