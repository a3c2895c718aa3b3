"""DataLoaders with forked workers, in a process that has no threads but those of polars: start it by `start_forked`."""

from pathlib import Path

import polars as pl
import pytest
import torch
from damage import copied, flip
from torch.utils.data import DataLoader

from pipeline.errors import StoreError
from pipeline.store.dataset import ClipDataset
from pipeline.store.feature_store import FeatureStore
from pipeline.store.joined_store import JoinedStore


def use_polars_threads() -> None:
    """Let polars start its threads, for which a forked process would wait."""
    assert pl.DataFrame({"a": range(9)}).filter(pl.col("a") > 3).height == 5


def compare_forked_workers(store_path: Path, other_store_path: Path) -> None:
    """Read batches of one store and of two by forked workers, and compare them with those of this process."""
    use_polars_threads()
    store = FeatureStore.open(store_path)
    for opened in (store, JoinedStore([store, FeatureStore.open(other_store_path)])):
        dataset = ClipDataset(opened, "eval", labels="raw")
        loader = DataLoader(dataset, batch_size=8, num_workers=2, timeout=60, multiprocessing_context="fork")
        for batch, own in zip(loader, DataLoader(dataset, batch_size=8), strict=True):
            assert torch.equal(batch["mel"], own["mel"])
            assert torch.equal(batch["labels"], own["labels"])
            assert torch.equal(batch["n_frames"], own["n_frames"])
            assert batch["clip_id"] == own["clip_id"]


def refuse_tables_in_a_forked_worker(store_path: Path) -> None:
    """Nothing of the store has been read when its worker is forked: an error, and no waiting."""
    use_polars_threads()
    loader = DataLoader(
        FeatureStore.open(store_path), num_workers=1, timeout=60, multiprocessing_context="fork"
    )
    with pytest.raises(
        StoreError, match=r"no table can be read in a process that was forked; make store\.dataset"
    ):
        next(iter(loader))


def name_the_broken_row_in_a_forked_worker(store_path: Path, folder: Path) -> None:
    """The worker cannot read the clip's id in the tables; it says which row is broken, and why."""
    use_polars_threads()
    store_path = copied(store_path, folder)
    row = int(FeatureStore.open(store_path).good_rows("eval")[0])
    flip(store_path, row)
    dataset = FeatureStore.open(store_path).dataset("eval")
    loader = DataLoader(dataset, num_workers=1, timeout=60, multiprocessing_context="fork")
    with pytest.raises(
        Exception, match=rf"row {row} \(shard \d+\) cannot be read: .*: its spectrogram does not match"
    ):
        next(iter(loader))
