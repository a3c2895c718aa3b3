"""TrainingSet: what a run is asked to train on: which stores, how much of each, in what order."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ajepa.recipes.pretrain import Pretrain
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.run import Json
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError
from pipeline.loading.sampling import (
    FULL_SHUFFLE,
    WINDOW_BLOCKS,
    BlockShuffle,
    RowOrder,
    Sampling,
    WeightedSampling,
    measure_mixing,
)
from pipeline.store.feature_store import FeatureStore
from pipeline.store.joined_store import AnyStore, JoinedStore
from pipeline.store.splits import describe_splits, train_splits


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSet:
    """Every split of some stores that its name does not keep to measure on, and how the clips follow each other.

    Without weights every clip comes once an epoch. With one for each store, clips are drawn with replacement so
    that a store's share of them is that of its weight, whatever its size; an epoch is as many as there are.
    Raises RunError where the settings contradict each other.
    """

    stores: tuple[Path | str | FeatureStore, ...]
    weights: tuple[float, ...] = ()
    shuffle: Literal["full", "block"] = "full"
    window_blocks: int | None = None  # shards that a block shuffle mixes at a time; None: 64

    def __post_init__(self) -> None:
        stores, weights = len(self.stores), len(self.weights)
        if weights and (weights != stores or stores < 2):
            raise RunError(
                f"{weights} store weights for {stores} stores; give one for each of two or more, or none"
            )
        if not all(weight > 0 for weight in self.weights) or not math.isfinite(sum(self.weights)):
            describe_mixing = ", ".join(f"{weight:g}" for weight in self.weights)
            raise RunError(
                f"store weights {describe_mixing}: expected numbers above 0 with a finite sum; "
                "leave out a store that is not wanted"
            )
        if self.shuffle not in ("full", "block"):
            raise RunError(f"shuffle must be full or block, got {self.shuffle!r}")
        if weights and self.shuffle == "block":
            raise RunError(
                "store weights draw clips with replacement, shuffle block takes each once: choose one"
            )
        if self.window_blocks is not None and self.shuffle != "block":
            raise RunError(f"window {self.window_blocks} is of no use to a full shuffle; add --shuffle block")

    @property
    def shuffle_window(self) -> int:
        """Shards that a block shuffle mixes at a time."""
        return self.window_blocks or WINDOW_BLOCKS

    def open_stores(self, recipe: Pretrain) -> AnyStore:
        """The stores, read as one; RunError or StoreError where they do not fit the recipe or each other."""
        stores = [open_training_store(store, recipe) for store in self.stores]
        return stores[0] if len(stores) == 1 else JoinedStore(stores)

    def clip_order(self, store: AnyStore, recipe: Pretrain, world: World = SINGLE_PROCESS) -> RowOrder:
        """Which clips come when to this rank; raises InputError where there are too few."""
        rows_N = store.good_rows(train_splits(store))
        refuse_empty_store(store, rows_N)
        sampling: Sampling = FULL_SHUFFLE
        if isinstance(store, JoinedStore) and self.weights:
            weights_N = store.row_weights(rows_N, self.weights)
            sampling = WeightedSampling(weights_N=weights_N, clips_per_epoch=len(rows_N))
        if self.shuffle == "block":
            sampling = BlockShuffle(blocks_N=store.shard_numbers(rows_N), window_blocks=self.shuffle_window)
        return RowOrder(
            rows_N=rows_N,
            clips=world.clips_per_rank(recipe.clips_per_step),
            seed=recipe.seed,
            rank=world.rank,
            world=world.size,
            sampling=sampling,
        )

    def data_identity(self, store: AnyStore) -> Json:
        """What a run was trained on: it is compared on resume, and says how to normalise ever after."""
        mean, std = store.mean_and_std(train_splits(store))
        told: Json = {"store_id": store.store_id, "spec_id": store.spec_id, "mel": store.spec.to_json()}
        told |= {"mean": mean, "std": std}
        if isinstance(store, JoinedStore):
            told["stores"] = [part.store_id for part in store.stores]
        if any(excluded := _exclusion_digests(store)):
            told["excluded"] = excluded if isinstance(store, JoinedStore) else excluded[0]
        if self.weights:
            told["store_weights"] = list(self.weights)
        if self.shuffle == "block":
            told["block_shuffle"] = {"blocks": "shards", "window_blocks": self.shuffle_window}
        return told

    def band_statistics(self, store: AnyStore) -> tuple[Tensor, Tensor]:
        """Mean and std of each band, `F`, of clips that are normalised as `identity` says."""
        mean, std = store.mean_and_std(train_splits(store))
        mean_F, std_F = store.band_mean_and_std(train_splits(store))
        return torch.from_numpy((mean_F - mean) / std).float(), torch.from_numpy(std_F / std).float()

    def told(self, store: AnyStore, order: RowOrder) -> Iterator[str]:
        """Lines on what is out of the ordinary: each of several stores, and how well a block shuffle mixes."""
        if isinstance(store, JoinedStore):
            rows_of_each = store.rows_per_store(order.rows_N)
            weights_N = np.asarray(self.weights or rows_of_each, np.float64)
            shares = weights_N / weights_N.sum()
            for part, rows, share in zip(store.stores, rows_of_each, shares, strict=True):
                yield f"{part.location}: {rows:,} clips, {share:.1%} of those trained on"
        if isinstance(order.sampling, BlockShuffle):
            clip_bytes = store.frames * store.bands * store.dtype.itemsize
            yield str(measure_mixing(order.sampling, order.clips_per_step, order.seed, clip_bytes=clip_bytes))


def _exclusion_digests(store: AnyStore) -> list[str | None]:
    """Of each store the digest of what exclude lists leave out; None where they leave out nothing."""
    return [part.exclusions.digest for part in _member_stores(store)]


def _member_stores(store: AnyStore) -> list[FeatureStore]:
    """The stores that this one is of."""
    parts = store.stores if isinstance(store, JoinedStore) else (store,)
    return [part for part in parts if isinstance(part, FeatureStore)]


def open_training_store(store: Path | str | FeatureStore, recipe: Pretrain) -> FeatureStore:
    """The store, opened; RunError where it does not hold the features that the recipe was made for."""
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    wanted = preset_mel_spec(recipe.mel)
    if store.spec_id != wanted.spec_id:
        held, asked = (f"{s.name} ({s.frames} x {s.mel_bands}, {s.spec_id})" for s in (store.spec, wanted))
        told = f"holds mel spec {held}, recipe {recipe.name} needs {asked}"
        raise RunError(f"{store.location}: {told}; build a store with --spec {wanted.name}")
    return store


def refuse_empty_store(store: AnyStore, rows_N: np.ndarray) -> None:
    """RunError naming a store of which nothing is among the rows to train on, and why."""
    rows_of_each = store.rows_per_store(rows_N) if isinstance(store, JoinedStore) else [len(rows_N)]
    for part, rows in zip(_member_stores(store), rows_of_each, strict=True):
        if not rows:
            told = f"no clip to train on is left in {describe_splits(part)}"
            raise RunError(
                f"{part.location}: {told}; leave it out, or see: ajepa-data report {part.location}"
            )
