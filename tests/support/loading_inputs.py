"""Views, orders and damaged stores for tests of loaders."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import BrokenClipError
from pipeline.loading.loader import View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore


def view_of(store: FeatureStore, **changes) -> View:
    """A view of 96 frames, normalised by the store's own statistics; `changes` are fields that differ."""
    statistics = store.stats["all"]
    return View(**{"frames": 96, "mean": statistics["mean"], "std": statistics["std"]} | changes)


def order_of(store: FeatureStore, **changes) -> RowOrder:
    """An order of all good rows, 6 a step; `changes` are fields that differ."""
    return RowOrder(**{"rows_N": store.good_rows(), "clips": 6, "seed": 1} | changes)


def store_with_broken_rows(path: Path, rows: Iterable[int]) -> FeatureStore:
    """The store at `path`, some of whose rows cannot be read."""
    store = FeatureStore.open(path)
    read = store.read
    broken_rows = set(rows)

    def read_unless_broken(rows_B, **options):
        for row in rows_B:
            if row in broken_rows:
                raise BrokenClipError(int(row), f"row {row} cannot be read")
        return read(rows_B, **options)

    store.read = read_unless_broken
    return store
