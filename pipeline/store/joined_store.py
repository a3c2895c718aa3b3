"""Joined: several stores read as one; AnyStore: what loaders and trainers ask of one store or of several."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import polars as pl

from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import BrokenClipError, StoreError
from pipeline.labels.ontology import ClassList
from pipeline.store.feature_store import FeatureStore, pool_band_mean_and_std, pool_mean_and_std
from pipeline.store.header import dequantise


class AnyStore(Protocol):
    """Spectrograms and labels by row; `FeatureStore` says what each of these is."""

    spec: MelSpec
    classes: ClassList
    scale: float
    offset: float
    frames: int
    bands: int
    dtype: np.dtype
    n_frames_N: np.ndarray
    store_id: str

    @property
    def location(self) -> str: ...
    @property
    def manifest(self) -> pl.DataFrame: ...
    @property
    def spec_id(self) -> str: ...
    @property
    def label_sets(self) -> tuple[str, ...]: ...
    def mean_and_std(self, splits: Sequence[str]) -> tuple[float, float]: ...
    def band_mean_and_std(self, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...
    def good_rows(self, splits: Sequence[str] | None = None) -> np.ndarray: ...
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
    """The rows of the first store, then those of the second, and so on.

    Raises StoreError where two stores differ in what a stored number or a class index means, or are the same.
    """

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        for store in stores[1:]:
            refuse_different_stores(stores[0], store)
        for place, store in enumerate(stores):
            for other in stores[:place]:
                if other.store_id == store.store_id:
                    raise StoreError(f"{store.location}: is the same store as {other.location}; give it once")
        one = stores[0]
        self.stores = tuple(stores)
        self.spec, self.classes, self.dtype = one.spec, one.classes, one.dtype
        self.scale, self.offset, self.frames, self.bands = one.scale, one.offset, one.frames, one.bands
        self.n_frames_N = np.concatenate([store.n_frames_N for store in stores])
        self.first_rows_N = np.cumsum(
            [0, *(len(store.n_frames_N) for store in stores)]
        )  # and the end of the last
        ids = " ".join(["joined", *(store.store_id for store in stores)])
        self.store_id = hashlib.sha256(ids.encode()).hexdigest()[:12]

    @property
    def spec_id(self) -> str:
        return self.spec.spec_id

    @cached_property
    def manifest(self) -> pl.DataFrame:
        """Row i describes row i of them all."""
        return pl.concat([store.manifest for store in self.stores])

    @property
    def label_sets(self) -> tuple[str, ...]:
        """Those that all stores have."""
        shared = set.intersection(*(set(store.label_sets) for store in self.stores))
        return tuple(name for name in self.stores[0].label_sets if name in shared)

    def mean_and_std(self, splits: Sequence[str]) -> tuple[float, float]:
        """Of log-mel over the valid frames of good clips of some splits, all stores pooled; StoreError as of one."""
        parts = [store.stats[split] for store in self.stores for split in splits if split in store.stats]
        return pool_mean_and_std(parts, self.location, splits)

    def band_mean_and_std(self, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same of each band by itself, float64 `F`."""
        return pool_band_mean_and_std(
            [store.stats[split] for store in self.stores for split in splits if split in store.stats]
        )

    def good_rows(self, splits: Sequence[str] | None = None) -> np.ndarray:
        """Ascending rows (int64) whose clips are there, of the splits of that name in any store, or of all.

        StoreError where no store has such a split.
        """
        splits_of = [set(store.manifest["split"].unique()) for store in self.stores]
        known = set().union(*splits_of)
        if splits is not None and set(splits) - known:
            raise StoreError(
                f"{self.location}: no split {sorted(set(splits) - known)}; they have {sorted(known)}"
            )
        rows = []
        for first, store, own in zip(self.first_rows_N, self.stores, splits_of, strict=False):
            rows.append(first + store.good_rows(None if splits is None else sorted(own.intersection(splits))))
        return np.concatenate(rows)

    def store_numbers(self, rows_N: np.ndarray) -> np.ndarray:
        """Which store each row is of, by its number."""
        return np.searchsorted(self.first_rows_N[1:], rows_N, side="right")

    def rows_per_store(self, rows_N: np.ndarray) -> list[int]:
        """How many of these rows each store has."""
        return np.bincount(self.store_numbers(rows_N), minlength=len(self.stores)).tolist()

    def row_weights(self, rows_N: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """A weight for each of these rows, so that those of each store weigh together what is given for it."""
        rows_of_each = np.maximum(self.rows_per_store(rows_N), 1)
        return (np.asarray(weights, np.float64) / rows_of_each)[self.store_numbers(rows_N)]

    def shard_numbers(self, rows_N: np.ndarray) -> np.ndarray:
        """The shard that each row lies in, counted through all stores."""
        counts = [store.header.layout.shard_count for store in self.stores]
        shards_N = np.empty(len(rows_N), np.int64)
        for number, mine_N, own_N in self._split_by_store(rows_N):
            shards_N[mine_N] = sum(counts[:number]) + self.stores[number].shard_numbers(own_N)
        return shards_N

    def flat_labels(self, label_set: str = "raw") -> tuple[np.ndarray, np.ndarray]:
        """As of one store."""
        flat = [store.flat_labels(label_set) for store in self.stores]
        before = np.cumsum([0, *(len(class_N) for class_N, _ in flat)])
        begins = [first + begin_N[:-1] for first, (_, begin_N) in zip(before, flat, strict=False)]
        return np.concatenate([class_N for class_N, _ in flat]), np.concatenate([*begins, before[-1:]])

    def labels_BC(self, rows_B: np.ndarray, label_set: str = "raw") -> np.ndarray:
        """1 where a row has a class, else 0, float32; raises StoreError where a store lacks the label set."""
        labels_BC = np.zeros((len(rows_B), len(self.classes)), np.float32)
        for number, mine_B, own_B in self._split_by_store(
            rows_B
        ):  # all of them, for any may lack the label set
            labels_BC[mine_B] = self.stores[number].labels_BC(own_B, label_set)
        return labels_BC

    def to_log_mel(self, stored: np.ndarray) -> np.ndarray:
        """Values as `read` gives them as log-mel, natural logarithm of power, float32, in the same shape."""
        return dequantise(stored, self.scale, self.offset)

    def read(
        self,
        rows_B: np.ndarray,
        *,
        out: np.ndarray | None = None,
        starts_B: np.ndarray | None = None,
        frames: int | None = None,
    ) -> np.ndarray:
        """The stored values of rows as `[B, T, F]`, as of one store; raises StoreError, BrokenClip (row as here)."""
        frames = self.frames if frames is None else frames
        starts_B = np.zeros(len(rows_B), np.int64) if starts_B is None else starts_B
        mel_BTF = np.empty((len(rows_B), frames, self.bands), self.dtype) if out is None else out
        for number, mine_B, own_B in self._split_by_store(
            rows_B
        ):  # at once all of a store: its disk is quicker so
            place_BTF = mel_BTF if len(mine_B) == len(rows_B) else None
            try:
                read = self.stores[number].read
                part_BTF = read(own_B, out=place_BTF, starts_B=starts_B[mine_B], frames=frames)
            except BrokenClipError as broken:
                raise BrokenClipError(int(self.first_rows_N[number]) + broken.row, str(broken)) from None
            if place_BTF is None:
                mel_BTF[mine_B] = part_BTF
        return mel_BTF

    def _split_by_store(self, rows_N: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each store its number, which of the rows are its own, and what it calls them itself."""
        store_N = self.store_numbers(rows_N)
        for number in range(len(self.stores)):
            mine_N = np.flatnonzero(store_N == number)
            yield number, mine_N, rows_N[mine_N] - self.first_rows_N[number]

    @property
    def location(self) -> str:
        """Where the stores lie, for people."""
        return " + ".join(store.location for store in self.stores)


def refuse_different_stores(one: FeatureStore, other: FeatureStore) -> None:
    """StoreError where a stored number or a class index means one thing here and another there, both told."""
    facts = {
        "mel spec": [f"{s.spec.name} ({s.frames} x {s.bands}, {s.spec_id})" for s in (one, other)],
        "dtype": [str(s.dtype) for s in (one, other)],
        "scale and offset": [f"{s.scale:g} and {s.offset:g}" for s in (one, other)],
        "class list": [
            describe_class_list(s.classes.mids, o.classes.mids) for s, o in ((one, other), (other, one))
        ],
    }
    for what, (here, there) in facts.items():
        if here != there:
            raise StoreError(
                f"{other.location}: has {what} {there}, but {one.location} has {here}; only stores of one kind are "
                "trained on together: build one of them again"
            )


def describe_class_list(mids: Sequence[str], other_mids: Sequence[str]) -> str:
    """How many classes there are, and the first that stands elsewhere, or nowhere, in the other list."""
    pairs = zip(mids, [*other_mids, *[None] * len(mids)], strict=False)
    odd = next((f", number {place} is {mid}" for place, (mid, other) in enumerate(pairs) if mid != other), "")
    return f"of {len(mids)} classes{odd}"
