"""The training set of a pre-training run: which stores, how much of each, and in which order."""

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
from ajepa.training.run_identity import BlockShuffleIdentity, RunIdentity
from ajepa.training.trained_stores import TrainedStore
from pipeline.audio.mel_spec import MelSpec, preset_mel_spec
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
    """The training splits of some stores, and the order of their clips; RunError for settings that contradict.

    Without weights every clip comes once an epoch. With one for each store, clips are drawn with replacement so
    that a store's share of them is that of its weight, whatever its size; an epoch has as many draws as there are
    clips. Splits that are named eval or test are kept to measure on.
    """

    stores: tuple[Path | str | FeatureStore, ...]
    weights: tuple[float, ...] = ()
    shuffle: Literal["full", "block"] = "full"
    window_blocks: int | None = None  # shards that a block shuffle mixes at a time; None: 64

    def __post_init__(self) -> None:
        # Weights: one for each of two stores or more.
        store_count = len(self.stores)
        weight_count = len(self.weights)
        if weight_count and (weight_count != store_count or store_count < 2):
            raise RunError(
                f"{weight_count} store weights for {store_count} stores; give one for each of two or more, or none"
            )
        if not all(weight > 0 for weight in self.weights) or not math.isfinite(sum(self.weights)):
            weights = ", ".join(f"{weight:g}" for weight in self.weights)
            raise RunError(
                f"store weights {weights}: expected numbers above 0 with a finite sum; "
                "leave out a store that is not wanted"
            )

        # The order: shuffled whole, or in blocks, which weights and windows exclude or need.
        if self.shuffle not in ("full", "block"):
            raise RunError(f"shuffle must be full or block, got {self.shuffle!r}")
        if weight_count and self.shuffle == "block":
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
        """The order in which clips come to this rank; InputError where there are too few."""
        rows_N = store.good_rows(train_splits(store))
        refuse_empty_store(store, rows_N)

        # Every clip once an epoch, a share of each store, or a few shards at a time.
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

    def data_identity(self, store: AnyStore) -> RunIdentity:
        """The data that a run is trained on: compared on resume, and needed later to normalise other clips alike."""
        mean, std = store.mean_and_std(train_splits(store))
        is_joined = isinstance(store, JoinedStore)

        # The clips that exclude lists leave out: None where they leave out none, whatever the number of stores.
        digests = _exclusion_digests(store)
        excluded: str | tuple[str | None, ...] | None = None
        if any(digests):
            excluded = digests if is_joined else digests[0]

        block_shuffle = None
        if self.shuffle == "block":
            block_shuffle = BlockShuffleIdentity(window_blocks=self.shuffle_window)
        return RunIdentity(
            store_id=store.store_id,
            spec_id=store.spec_id,
            mel=store.spec,
            mean=mean,
            std=std,
            stores=tuple(part.store_id for part in _member_stores(store)) if is_joined else (),
            excluded=excluded,
            store_weights=tuple(self.weights),
            block_shuffle=block_shuffle,
        )

    def trained_stores(self, store: AnyStore) -> list[TrainedStore]:
        """Where the stores lie, and their splits that train."""
        return [TrainedStore.from_store(part, train_splits(store)) for part in _member_stores(store)]

    def band_statistics(self, store: AnyStore) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each band, both `F`, of clips that are normalised as `data_identity` says."""
        mean, std = store.mean_and_std(train_splits(store))
        mean_F, std_F = store.band_mean_and_std(train_splits(store))
        return torch.from_numpy((mean_F - mean) / std).float(), torch.from_numpy(std_F / std).float()

    def describe_order(self, store: AnyStore, order: RowOrder) -> Iterator[str]:
        """Yield lines for the user: each store's share, where there are several, and how well a block shuffle mixes."""
        if isinstance(store, JoinedStore):
            rows_of_each = store.rows_per_store(order.rows_N)
            weights_N = np.asarray(self.weights or rows_of_each, np.float64)
            shares = weights_N / weights_N.sum()
            for part, rows, share in zip(store.stores, rows_of_each, shares, strict=True):
                yield f"{part.location}: {rows:,} clips, {share:.1%} of those trained on"
        if isinstance(order.sampling, BlockShuffle):
            clip_bytes = store.frames * store.bands * store.dtype.itemsize
            yield str(measure_mixing(order.sampling, order.clips_per_step, order.seed, clip_bytes=clip_bytes))


def _exclusion_digests(store: AnyStore) -> tuple[str | None, ...]:
    """The digest of the clips that exclude lists leave out of each store; None where they leave out nothing."""
    return tuple(part.exclusions.digest for part in _member_stores(store))


def _member_stores(store: AnyStore) -> list[FeatureStore]:
    """The stores that a store consists of: its parts, or itself."""
    parts = store.stores if isinstance(store, JoinedStore) else (store,)
    return [part for part in parts if isinstance(part, FeatureStore)]


def open_training_store(store: Path | str | FeatureStore, recipe: Pretrain) -> FeatureStore:
    """The store, opened; RunError where its features are not those that the recipe needs, or its clips too short.

    Clips may be longer or shorter than those of the recipe's mel spec, as long as they fill a view; a view that is
    longer than the clips of the mel spec itself is padded.
    """
    if not isinstance(store, FeatureStore):
        store = FeatureStore.open(store)
    wanted_spec = preset_mel_spec(recipe.mel)
    if not store.spec.same_front_end(wanted_spec):
        raise RunError(
            f"{store.location}: holds mel spec {_describe_spec(store.spec)}, "
            f"recipe {recipe.name} needs {_describe_spec(wanted_spec)}; build a store with --spec {wanted_spec.name}"
        )
    needed_frames = min(recipe.view_frames, wanted_spec.frames)
    if store.frames < needed_frames:
        seconds = wanted_spec.samples_of(needed_frames) / wanted_spec.sample_rate_hz
        raise RunError(
            f"{store.location}: clips of {store.spec.clip_seconds:g} s are shorter than a view of recipe "
            f"{recipe.name}, {seconds:.2f} s; build it with --clip-seconds {math.ceil(10 * seconds) / 10:g}, "
            "or choose another recipe"
        )
    return store


def _describe_spec(spec: MelSpec) -> str:
    """A mel spec in an error: name, frames and bands, and the digest that tells specs of one name apart."""
    return f"{spec.name} ({spec.frames} x {spec.mel_bands}, {spec.spec_id})"


def refuse_empty_store(store: AnyStore, rows_N: np.ndarray) -> None:
    """RunError, naming the store, where no row of one of the stores is left to train on."""
    rows_of_each = store.rows_per_store(rows_N) if isinstance(store, JoinedStore) else [len(rows_N)]
    for part, rows in zip(_member_stores(store), rows_of_each, strict=True):
        if not rows:
            raise RunError(
                f"{part.location}: no clip to train on is left in {describe_splits(part)}; "
                f"leave it out, or see: ajepa-data report {part.location}"
            )
