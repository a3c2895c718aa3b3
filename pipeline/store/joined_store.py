"""JoinedStore reads several stores as one; AnyStore is the interface of one or several stores."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import polars as pl

from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import BrokenClipError, StoreError
from pipeline.labels.ontology import ClassList
from pipeline.store.feature_store import (
    FeatureStore,
    pool_band_mean_and_std,
    pool_mean_and_std,
    refuse_unknown_splits,
)
from pipeline.store.header import dequantise


class AnyStore(Protocol):
    """Spectrograms and labels by row; `FeatureStore` documents each of these members."""

    spec: MelSpec
    classes: ClassList
    scale: float
    offset: float
    frames: int
    bands: int
    dtype: np.dtype
    store_id: str

    @property
    def location(self) -> str: ...
    @property
    def manifest(self) -> pl.DataFrame: ...
    def manifest_columns(self, *names: str) -> pl.DataFrame: ...
    @property
    def split_names(self) -> tuple[str, ...]: ...
    @property
    def n_frames_N(self) -> np.ndarray: ...
    @property
    def spec_id(self) -> str: ...
    @property
    def label_sets(self) -> tuple[str, ...]: ...
    def mean_and_std(self, splits: Sequence[str]) -> tuple[float, float]: ...
    def band_mean_and_std(self, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...
    def good_rows(self, splits: str | Sequence[str] | None = None) -> np.ndarray: ...
    def shard_numbers(self, rows_N: np.ndarray) -> np.ndarray: ...
    def flat_labels(self, label_set: str = "raw") -> tuple[np.ndarray, np.ndarray]: ...
    def labels_BC(self, rows_B: np.ndarray, label_set: str = "raw") -> np.ndarray: ...
    def to_log_mel(self, stored: np.ndarray) -> np.ndarray: ...

    def read(
        self,
        rows_B: np.ndarray,
        *,
        out: np.ndarray | None = None,
        starts_B: np.ndarray | None = None,
        frames: int | None = None,
    ) -> np.ndarray: ...


class JoinedStore:
    """Several stores as one: the rows of the first store, then those of the second, and so on.

    Raises StoreError if a stored value or a class index differs in meaning between stores, or a store is given twice.
    """

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        # All stores are of one kind, and each is given once.
        first = stores[0]
        for store in stores[1:]:
            refuse_different_stores(first, store)
        for number, store in enumerate(stores):
            for earlier in stores[:number]:
                if earlier.store_id == store.store_id:
                    raise StoreError(
                        f"{store.location}: is the same store as {earlier.location}; give it once"
                    )

        # The facts that all stores share.
        self.stores = tuple(stores)
        self.spec = first.spec
        self.classes = first.classes
        self.scale = first.scale
        self.offset = first.offset
        self.frames = first.frames
        self.bands = first.bands
        self.dtype = first.dtype

        # The joined facts: the first row of each store (and the end of the last), the id.
        self.first_rows_N = np.cumsum([0, *(store.header.layout.clips for store in stores)])
        ids = " ".join(["joined", *(store.store_id for store in stores)])
        self.store_id = hashlib.sha256(ids.encode()).hexdigest()[:12]

    @property
    def location(self) -> str:
        """The locations of all stores, for messages."""
        return " + ".join(store.location for store in self.stores)

    @property
    def spec_id(self) -> str:
        """The id of the mel spec that all stores have."""
        return self.spec.spec_id

    @cached_property
    def manifest(self) -> pl.DataFrame:
        """The manifests of all stores, one below the other: row i describes row i of the joined store."""
        return pl.concat([store.manifest for store in self.stores])

    def manifest_columns(self, *names: str) -> pl.DataFrame:
        """Return some columns of `manifest`, which needs less memory than the whole."""
        return pl.concat([store.manifest_columns(*names) for store in self.stores])

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits of all stores, in the order in which they first occur."""
        return tuple(dict.fromkeys(split for store in self.stores for split in store.split_names))

    @cached_property
    def n_frames_N(self) -> np.ndarray:
        """The valid frames of each row, 0 if it is not good, int32."""
        return np.concatenate([store.n_frames_N for store in self.stores])

    @property
    def label_sets(self) -> tuple[str, ...]:
        """The label sets that all stores have."""
        shared = set.intersection(*(set(store.label_sets) for store in self.stores))
        return tuple(name for name in self.stores[0].label_sets if name in shared)

    def mean_and_std(self, splits: Sequence[str]) -> tuple[float, float]:
        """Return mean and std of log-mel over the valid frames of the good clips of `splits`, over all stores.

        StoreError if there is no such frame, or if all values are equal.
        """
        return pool_mean_and_std(self._split_stats(splits), self.location, splits)

    def band_mean_and_std(self, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and std like `mean_and_std`, but for each band, float64 `F`."""
        return pool_band_mean_and_std(self._split_stats(splits))

    def _split_stats(self, splits: Sequence[str]) -> list[dict[str, Any]]:
        return [store.stats[split] for store in self.stores for split in splits if split in store.stats]

    def good_rows(self, splits: str | Sequence[str] | None = None) -> np.ndarray:
        """Return the rows of the good, not excluded clips of `splits` (None: of all splits), int64, ascending.

        StoreError if no store has one of the splits.
        """
        if isinstance(splits, str):
            splits = [splits]
        # A split may exist in only some of the stores: request from each store the splits that it has.
        splits_by_store = [set(store.split_names) for store in self.stores]
        if splits is not None:
            refuse_unknown_splits(splits, set().union(*splits_by_store), self.location)
        rows = []
        for first_row, store, own_splits in zip(
            self.first_rows_N, self.stores, splits_by_store, strict=False
        ):
            wanted = None if splits is None else sorted(own_splits.intersection(splits))
            rows.append(first_row + store.good_rows(wanted))
        return np.concatenate(rows)

    def store_numbers(self, rows_N: np.ndarray) -> np.ndarray:
        """Return the number of the store that each row belongs to."""
        return np.searchsorted(self.first_rows_N[1:], rows_N, side="right")

    def rows_per_store(self, rows_N: np.ndarray) -> list[int]:
        """Return how many of these rows each store has."""
        return np.bincount(self.store_numbers(rows_N), minlength=len(self.stores)).tolist()

    def row_weights(self, rows_N: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """Return a weight for each of these rows, float64 `[N]`.

        `weights` has one entry per store, which the rows of that store share equally.
        """
        # A store without any of these rows divides by 1; no row uses the result.
        row_counts = np.maximum(self.rows_per_store(rows_N), 1)
        return (np.asarray(weights, np.float64) / row_counts)[self.store_numbers(rows_N)]

    def shard_numbers(self, rows_N: np.ndarray) -> np.ndarray:
        """Return the number of each row's shard, numbered consecutively over all stores."""
        # A store's first shard follows the last shard of the store before it.
        shard_counts = [store.header.layout.shard_count for store in self.stores]
        shards_N = np.empty(len(rows_N), np.int64)
        for number, places_N, own_rows_N in self._split_by_store(rows_N):
            own_shards_N = self.stores[number].shard_numbers(own_rows_N)
            shards_N[places_N] = sum(shard_counts[:number]) + own_shards_N
        return shards_N

    def flat_labels(self, label_set: str = "raw") -> tuple[np.ndarray, np.ndarray]:
        """Return the class indices of all rows and the offset of each row, as `FeatureStore.flat_labels` does."""
        # The offsets of each store begin where the labels of the stores before it end.
        parts = [store.flat_labels(label_set) for store in self.stores]
        first_offsets = np.cumsum([0, *(len(class_N) for class_N, _ in parts)])
        offsets = [first + offset_N[:-1] for first, (_, offset_N) in zip(first_offsets, parts, strict=False)]
        classes_N = np.concatenate([class_N for class_N, _ in parts])
        return classes_N, np.concatenate([*offsets, first_offsets[-1:]])

    def labels_BC(self, rows_B: np.ndarray, label_set: str = "raw") -> np.ndarray:
        """Return 1 if a row has a class, else 0, float32 `[B, C]`; StoreError if a store lacks the label set."""
        labels_BC = np.zeros((len(rows_B), len(self.classes)), np.float32)
        # Call every store, even without rows, because any store may lack the label set.
        for number, places_B, own_rows_B in self._split_by_store(rows_B):
            labels_BC[places_B] = self.stores[number].labels_BC(own_rows_B, label_set)
        return labels_BC

    def to_log_mel(self, stored: np.ndarray) -> np.ndarray:
        """Return values from `read` as log-mel: natural logarithm of power, float32, in the same shape."""
        return dequantise(stored, self.scale, self.offset)

    def read(
        self,
        rows_B: np.ndarray,
        *,
        out: np.ndarray | None = None,
        starts_B: np.ndarray | None = None,
        frames: int | None = None,
    ) -> np.ndarray:
        """Return the stored values of rows as `[B, T, F]`, as `FeatureStore.read` does.

        It raises the same errors; the row of a BrokenClipError is the row of the joined store.
        """
        starts_B, mel_BTF = self.stores[0].prepare_read(rows_B, out, starts_B, frames)
        # Read all rows of one store in one call, which is faster on its disk.
        for number, places_B, own_rows_B in self._split_by_store(rows_B):
            # If all rows belong to one store, they are read directly into the output, else copied to it.
            whole_BTF = mel_BTF if len(places_B) == len(rows_B) else None
            try:
                part_BTF = self.stores[number].read(
                    own_rows_B, out=whole_BTF, starts_B=starts_B[places_B], frames=mel_BTF.shape[1]
                )
            except BrokenClipError as broken:
                raise BrokenClipError(int(self.first_rows_N[number]) + broken.row, str(broken)) from None
            if whole_BTF is None:
                mel_BTF[places_B] = part_BTF
        return mel_BTF

    def _split_by_store(self, rows_N: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield for each store: its number, the positions of its rows in `rows_N`, and these rows as numbered in it."""
        store_N = self.store_numbers(rows_N)
        for number in range(len(self.stores)):
            places_N = np.flatnonzero(store_N == number)
            yield number, places_N, rows_N[places_N] - self.first_rows_N[number]


def refuse_different_stores(first: FeatureStore, second: FeatureStore) -> None:
    """Raise StoreError if a stored value or a class index has different meanings in the two stores."""
    # Both sides are described in words, so that the message shows the difference.
    first_facts = _describe_meaning(first, second)
    second_facts = _describe_meaning(second, first)
    for fact, first_text in first_facts.items():
        if first_text != second_facts[fact]:
            raise StoreError(
                f"{second.location}: has {fact} {second_facts[fact]}, but {first.location} has {first_text}; "
                "only stores of one kind can be joined; build one of them again"
            )


def _describe_meaning(store: FeatureStore, compared_with: FeatureStore) -> dict[str, str]:
    """Return the facts, in words, that decide the meaning of a store's values and class indices."""
    return {
        "mel spec": f"{store.spec.name} ({store.frames} x {store.bands}, {store.spec_id})",
        "dtype": str(store.dtype),
        "scale and offset": f"{store.scale:g} and {store.offset:g}",
        "class list": describe_class_list(store.classes.mids, compared_with.classes.mids),
    }


def describe_class_list(mids: Sequence[str], other_mids: Sequence[str]) -> str:
    """Return the number of classes of a list, and its first class that differs from the other list."""
    for number, mid in enumerate(mids):
        if number >= len(other_mids) or other_mids[number] != mid:
            return f"of {len(mids)} classes, number {number} is {mid}"
    return f"of {len(mids)} classes"
