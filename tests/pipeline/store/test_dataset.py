"""A store as PyTorch expects a dataset: length, items, workers; and what a notebook shows of it."""

import numpy as np
import pytest
import torch
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
