"""FeatureStore reads a store. This text documents every file of a store on disk.

NAME.zarr/              a Zarr v3 group: any Zarr v3 library opens it
  zarr.json             attributes["ajepa"]: the `StoreHeader` (`header.py`)
  mel/                  (clip, frame, band), float16 or uint8; one inner chunk per clip, sharded (`shards.py`); frames
                        after the end of a clip are the spec's floor; absent clips read as NaN (uint8: 0)
  manifest.parquet      row i describes mel[i] (`manifest.py`)
  labels.parquet        row i: `raw` and one column per propagated label set, lists of class indices; `outside`:
                        class ids that are not in the class list. Provenance is in the schema metadata
  ledger/N.parquet      the record of committed shard N: the manifest columns of its rows and, in the schema metadata,
                        the `ShardCommit` (`shards.py`). The commit point: a shard without a record does not exist.
                        N.parquet.next: a record whose shard is about to be moved into place; the next build makes it
                        valid if the shard matches, else removes it
  plan.parquet          row i: id, split and times as in the manifest, class ids as listed, and why the row does not
                        count (`plan_file.py`). Later builds need no lists or walks. Older stores lack it
  sources.parquet       row i: where its sound was found, by absolute path; what was asked, and versions of lists and
                        archives, in the schema metadata (`pipeline/build/plan_files.py`). Older stores lack it
  excluded.parquet      optional: clips that exclude lists keep out of `good_rows` (`exclusions.py`)
  stats.json            mean and std over valid frames of good clips, global and per band: all, and per split
  build*.lock, gate.lock    locks of processes that are writing the store; *.held where the disk has no locks
  build.json            options, versions and duration of the build; it and sources.parquet differ between equal builds
"""

import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl

from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import BrokenClipError, RunError, StoreError
from pipeline.files import DEFAULT_CACHE_GB
from pipeline.messages import suggest_known
from pipeline.object_store import is_remote_url
from pipeline.store.cache import BYTES_PER_GB, ShardCache, fetch_store_tables
from pipeline.store.exclusions import Exclusions
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import MANIFEST_SCHEMA
from pipeline.store.manifest_table import ManifestTable
from pipeline.store.reader import ChecksumMode, ReadMethod, RowReader, ShardReader
from pipeline.store.shards import check_mel_array, shard_path
from pipeline.tables import read_table, read_table_schema

if TYPE_CHECKING:  # PyTorch takes seconds to import, and only datasets need it
    from torch import Tensor
    from torch.utils.data import Dataset

    from pipeline.store.dataset import Clip, ClipDataset

    MapStyleDataset = Dataset[Clip]
else:
    MapStyleDataset = object  # a `DataLoader` asks for length and items, and for no parent

# A band varies by at least this share of what bands vary by on average, when it is standardised. Bands above the range
# of all sounds of a store hardly vary, and what float16 rounds there would become as large as a sound.
LEAST_STD_SHARE = 0.25


class FeatureStore(MapStyleDataset):
    """Spectrograms and labels, with one row of the manifest for each; open a store with `FeatureStore.open`.

    `classes` is the class list; a store without labels has the one class `unlabelled`, which is that of no clip.

    Reads are thread-safe. Unpickling opens the store again, at the same location and with the same options. With a
    `reader`, values come from that reader and not from the shards.
    """

    def __init__(
        self,
        path: Path,
        header: StoreHeader,
        manifest: pl.DataFrame | ManifestTable,
        store_id: str,
        *,
        io: ReadMethod = "pread",
        check: ChecksumMode = "first-epoch",
        cache: ShardCache | None = None,
        reader: RowReader | None = None,
    ) -> None:
        self.path = path
        self.location = str(path) if cache is None else cache.url
        self.header = header
        self.store_id = store_id
        if isinstance(manifest, pl.DataFrame):
            manifest = ManifestTable(path / "manifest.parquet", store_id, manifest)
        self.manifest_table = manifest

        # Loaders use these for every batch.
        self.spec = header.spec
        self.classes = header.classes
        self.scale = header.scale
        self.offset = header.offset
        self.frames = header.layout.frames
        self.bands = header.layout.bands
        self.dtype = np.dtype(header.layout.dtype)

        # Each thread has its own reader; all of them share the record of the rows that have been checked.
        self._cache = cache
        self._io = io
        self._check = check
        self._custom_reader = reader
        self._checked_rows = bytearray(header.layout.clips)
        self._flat_labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by label set, filled at first use
        self._thread_local = threading.local()
        self._own_shard_reader()  # raises at once if `io` or `check` is unknown

    @classmethod
    def open(
        cls,
        location: Path | str,
        expect: MelSpec | None = None,
        *,
        io: ReadMethod = "pread",
        check: ChecksumMode = "first-epoch",
        cache: Path | str | None = None,
        cache_gb: float = DEFAULT_CACHE_GB,
    ) -> Self:
        """Open a finished store; StoreError if it is no store, unfinished, or has another spec than `expect`.

        `io` and `check` are explained at `ShardReader`. For a store at a URL, the shards that were read last are kept
        in the folder `cache`, up to `cache_gb` (10^9 bytes); other processes may use the same folder.
        """
        # Fetch the tables of a store at a URL.
        path = Path(location)
        cache_folder = None
        if is_remote_url(location):
            if cache is None:
                raise StoreError(
                    f"{location}: is on an object store; give --cache DIR, a folder for the shards read last"
                )
            cache_folder = Path(cache)
            path = fetch_store_tables(str(location), cache_folder)

        # Check by the header and the form of the array that the values can be read.
        header = StoreHeader.read(path)
        if expect is not None and expect.spec_id != header.spec.spec_id:
            raise StoreError(
                f"{location} holds {header.spec}, expected {expect}; build a store with --spec {expect.name}"
            )
        check_mel_array(path, header.layout)

        # The store's id is written last: without it the build has not finished.
        manifest = ManifestTable.open(path / "manifest.parquet")
        if manifest is None:
            raise StoreError(
                f"{location}: its build has not finished; run the same ajepa-data build command again"
            )

        shard_cache = None
        if cache_folder is not None:
            shard_cache = ShardCache(
                url=str(location).rstrip("/"),
                cache_folder=cache_folder,
                max_bytes=int(cache_gb * BYTES_PER_GB),
                snapshot_folder=path.parent / manifest.store_id,
                layout=header.layout,
                manifest=manifest,
            )
        return cls(path, header, manifest, manifest.store_id, io=io, check=check, cache=shard_cache)

    def __reduce__(self) -> tuple[Any, ...]:
        # Open files and the locks of threads cannot be pickled; the arguments of `open` can.
        if self._custom_reader is not None:
            rebuild = partial(FeatureStore, reader=self._custom_reader)
            return rebuild, (self.path, self.header, self.manifest_table, self.store_id)
        options: dict[str, Any] = {"io": self._io, "check": self._check}
        if self._cache is None:
            return partial(FeatureStore.open, **options), (self.path,)
        options["cache"] = self._cache.cache_folder
        options["cache_gb"] = self._cache.max_bytes / BYTES_PER_GB
        return partial(FeatureStore.open, **options), (self.location,)

    def refuse_other_front_end(self, required_spec: MelSpec, required_by: str) -> None:
        """Raise RunError if the store's mel spec gives other values than `required_spec`.

        `required_by` names the user of the spec in the message, `STORE: holds mel spec A, REQUIRED_BY B`.
        """
        if self.spec.same_front_end(required_spec):
            return
        stored, required = (
            f"{spec.name} ({spec.mel_bands} bands, {spec.spec_id})" for spec in (self.spec, required_spec)
        )
        raise RunError(
            f"{self.location}: holds mel spec {stored}, {required_by} {required}; "
            f"build a store with --spec {required_spec.name}"
        )

    @property
    def spec_id(self) -> str:
        """The id of the mel spec."""
        return self.spec.spec_id

    @property
    def manifest(self) -> pl.DataFrame:
        """The whole manifest, one row per clip; `manifest_columns` needs less memory."""
        return self.manifest_table.frame

    def manifest_columns(self, *names: str) -> pl.DataFrame:
        """Return some columns of the manifest, which are read from the disk if they are not in memory."""
        return self.manifest_table.columns(*names)

    def manifest_rows(self, rows: Sequence[int]) -> pl.DataFrame:
        """Return some rows of the manifest; one column at a time is in memory."""
        columns = [self.manifest_columns(name)[list(rows)] for name in MANIFEST_SCHEMA]
        return pl.concat(columns, how="horizontal")

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits, in the order in which they first occur in the manifest."""
        return self.manifest_table.split_names

    @cached_property
    def n_frames_N(self) -> np.ndarray:
        """The valid frames of each row, 0 if it is not good, int32."""
        return self.manifest_table.columns("n_frames").to_series().to_numpy()

    @cached_property
    def stats(self) -> dict[str, dict[str, Any]]:
        """For `all` and each split: frames, mean, std, mean_F, std_F of log-mel over valid frames of good clips."""
        return json.loads((self.path / "stats.json").read_text())

    def mean_and_std(self, splits: Sequence[str]) -> tuple[float, float]:
        """Return mean and std of log-mel over the valid frames of the good clips of `splits`.

        StoreError if there is no such frame, or if all values are equal.
        """
        parts = [self.stats[split] for split in splits if split in self.stats]
        return pool_mean_and_std(parts, self.location, splits)

    def band_mean_and_std(self, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and std like `mean_and_std`, but for each band, float64 `F`; see `pool_band_mean_and_std`."""
        return pool_band_mean_and_std([self.stats[split] for split in splits if split in self.stats])

    def __repr__(self) -> str:
        counts = self.manifest_columns("split")["split"].value_counts().sort("split").iter_rows()
        splits = ", ".join(f"{split} {count:,}" for split, count in counts)
        return (
            f"FeatureStore({self.location}: {len(self.n_frames_N):,} clips, {len(self.good_rows()):,} good ({splits}); "
            f"{self.spec.name} {self.frames} x {self.bands} {self.dtype}; {len(self.classes)} classes)"
        )

    def __len__(self) -> int:
        """Return the number of good clips, as loaders draw them; `good_rows` has their rows."""
        return len(self._good_clips)

    def __getitem__(self, index: int) -> "Clip":
        """Return the `index`-th good clip, so that a store is a map-style dataset; `read` takes rows."""
        return self._good_clips[index]

    def __getitems__(self, indices: Sequence[int]) -> "list[Clip]":
        """Return several good clips from one read; a `DataLoader` calls this for each batch."""
        return self._good_clips.__getitems__(indices)

    @cached_property
    def _good_clips(self) -> "ClipDataset":
        return self.dataset()

    def dataset(
        self,
        splits: str | Sequence[str] | None = None,
        *,
        labels: str | None = None,
        transform: "Callable[[Tensor], Tensor] | None" = None,
    ) -> "ClipDataset":
        """Return the good clips of some splits as a dataset of PyTorch, with the labels of a set (`ClipDataset`)."""
        from pipeline.store.dataset import ClipDataset

        return ClipDataset(self, splits, labels=labels, transform=transform)

    def good_rows(self, splits: str | Sequence[str] | None = None) -> np.ndarray:
        """Return the rows of the good, not excluded clips of `splits` (None: of all splits), int64, ascending.

        One split may be given by its name alone. StoreError if a split is unknown.
        """
        if isinstance(splits, str):
            splits = [splits]
        is_wanted_N = self.manifest_table.good_N
        if splits is not None:
            refuse_unknown_splits(splits, self.split_names, self.location)
            is_wanted_N = is_wanted_N & np.isin(self.split_names, list(splits))[self.manifest_table.split_N]
        return np.flatnonzero(is_wanted_N & ~self.excluded_N)

    def shard_numbers(self, rows_N: np.ndarray) -> np.ndarray:
        """Return the number of each row's shard."""
        return rows_N // self.header.layout.shard_clips

    @cached_property
    def exclusions(self) -> Exclusions:
        """The clips that exclude lists name; StoreError if their record is damaged."""
        return Exclusions.read_from_store(self.path)

    @property
    def excluded_N(self) -> np.ndarray:
        """Whether an exclude list names each row, good or not, bool."""
        if self.exclusions.frame.is_empty():
            return np.zeros(self.header.layout.clips, bool)
        return self.exclusions.excluded_mask_N(self.manifest_columns("clip_id", "split"))

    @cached_property
    def label_sets(self) -> tuple[str, ...]:
        """`raw` and the names of the rules by which labels have been propagated."""
        schema, _ = read_table_schema(self.path / "labels.parquet")
        return tuple(name for name in schema if name != "outside")

    def labels_BC(self, rows_B: np.ndarray, label_set: str = "raw") -> np.ndarray:
        """Return 1 if a row has a class, else 0, float32 `[B, C]`; StoreError if the store lacks the label set."""
        class_N, offsets_N = self.flat_labels(label_set)
        labels_BC = np.zeros((len(rows_B), len(self.classes)), np.float32)
        for clip, row in enumerate(rows_B):
            labels_BC[clip, class_N[offsets_N[row] : offsets_N[row + 1]]] = 1
        return labels_BC

    def flat_labels(self, label_set: str = "raw") -> tuple[np.ndarray, np.ndarray]:
        """Return the class indices of all rows, row after row, and the offset at which each row begins.

        The offsets have one more entry, the end of the last row. StoreError if the store lacks the label set.
        """
        if label_set not in self.label_sets:
            raise StoreError(
                f"{self.location}: no label set {label_set!r}, it has {', '.join(self.label_sets)}; "
                f"add it with: ajepa-data propagate-labels {self.location} --rule {label_set}"
            )

        # Flatten each label set only once, because every batch needs it.
        if label_set not in self._flat_labels:
            lists = read_table(self.path / "labels.parquet", [label_set])[0][label_set]
            offsets_N = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy(), dtype=np.int64)])
            self._flat_labels[label_set] = (lists.explode(empty_as_null=False).to_numpy(), offsets_N)
        return self._flat_labels[label_set]

    def to_log_mel(self, stored: np.ndarray) -> np.ndarray:
        """Return values from `read` as log-mel: natural logarithm of power, float32, in the same shape."""
        return self.header.to_log_mel(stored)

    def read(
        self,
        rows_B: np.ndarray,
        *,
        out: np.ndarray | None = None,
        starts_B: np.ndarray | None = None,
        frames: int | None = None,
    ) -> np.ndarray:
        """Return the stored values of rows as `[B, T, F]`; with `frames`, only frames [start, start + frames).

        These are log-mels in a float16 store, and codes in a uint8 store; `to_log_mel` makes log-mels of both.
        Only these bytes are read if no check is due, into `out` (C-contiguous, stored dtype) if given. Raises
        BrokenClipError if a clip is missing or not as it was written, StoreError if a row is not good, ValueError if
        a crop exceeds the stored frames.
        """
        starts_B, mel_BTF = self.prepare_read(rows_B, out, starts_B, frames)

        # To free space for the fetched shards, the cache may have deleted shards that are still open here.
        if self._cache and self._cache.fetch_missing_shards(np.unique(self.shard_numbers(rows_B)).tolist()):
            self._own_shard_reader().close_missing_files()
        try:
            self._active_reader().read(rows_B, starts_B, mel_BTF)
        except BrokenClipError as broken:
            raise self._explain_broken_clip(broken) from None
        return mel_BTF

    def prepare_read(
        self, rows_B: np.ndarray, out: np.ndarray | None, starts_B: np.ndarray | None, frames: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the crops' starts and the array to read into, with the defaults of `read` filled in.

        ValueError if a crop exceeds the stored frames.
        """
        # The default is whole clips, from their first frame.
        frames = self.frames if frames is None else frames
        starts_B = np.zeros(len(rows_B), np.int64) if starts_B is None else starts_B
        if len(rows_B) and (starts_B.min() < 0 or starts_B.max() + frames > self.frames):
            raise ValueError(f"crops of {frames} frames from {starts_B} leave the stored 0..{self.frames}")
        mel_BTF = np.empty((len(rows_B), frames, self.bands), self.dtype) if out is None else out
        return starts_B, mel_BTF

    def local_shard_path(self, shard: int) -> Path:
        """Return the local path of a shard, fetched if necessary; no file exists if the shard has no good clip."""
        try:
            return self._cache.local_path(shard) if self._cache else shard_path(self.path, shard)
        except ValueError as error:
            raise StoreError(f"{self.location}: shard {shard} {error}") from None

    def _explain_broken_clip(self, broken: BrokenClipError) -> StoreError:
        """Return the error for a row that could not be read, with the clip, the shard and the remedy."""
        row = broken.row
        shard = row // self.header.layout.shard_clips
        try:
            clip_id, status, reason = self.manifest_columns("clip_id", "status", "reason").row(row)
        except StoreError:
            # No table can be read, as in a forked worker of a DataLoader: row and shard must do.
            return BrokenClipError(
                row, f"{self.location}: row {row} (shard {shard}) cannot be read: {broken}"
            )
        if status != "good":
            return StoreError(
                f"{self.location}: row {row} (clip {clip_id}) is not good: {reason}; draw rows from good_rows()"
            )

        # The remedy depends on where the values come from.
        if self._cache is not None:
            remedy = f"if only the copy is damaged, delete {self._cache.snapshot_folder}: it is fetched again"
        elif self._custom_reader is not None:
            remedy = f"its sound has changed; see: ajepa-data verify {self.location} --against-audio"
        else:
            remedy = f"run: ajepa-data verify {self.location} --repair"
        return BrokenClipError(
            row,
            f"{self.location}: row {row} (clip {clip_id}, shard {shard}) cannot be read: {broken}; {remedy}",
        )

    def _active_reader(self) -> RowReader:
        return self._own_shard_reader() if self._custom_reader is None else self._custom_reader

    def _own_shard_reader(self) -> ShardReader:
        # Created at a thread's first read, because a reader's buffers and files are for one thread.
        if not hasattr(self._thread_local, "reader"):
            locate = self._cache.local_path if self._cache else partial(shard_path, self.path)
            self._thread_local.reader = ShardReader(
                locate, self.header.layout, io=self._io, check=self._check, checked_rows=self._checked_rows
            )
        return self._thread_local.reader


def refuse_unknown_splits(splits: Iterable[str], known: Iterable[str], location: str) -> None:
    """Raise StoreError if one of `splits` is not in `known`; the message suggests the most similar name."""
    unknown = sorted(set(splits) - set(known))
    if unknown:
        raise StoreError(f"{location}: no split {unknown[0]!r}; {suggest_known(unknown[0], sorted(known))}")


def pool_mean_and_std(
    split_stats: Sequence[Mapping[str, Any]], location: str, splits: Sequence[str]
) -> tuple[float, float]:
    """Return mean and std over all frames of the given entries of `stats`.

    StoreError if there are no frames, or if the std is zero, so that nothing can be divided by it.
    """
    frames = sum(part["frames"] for part in split_stats)
    if not frames:
        raise StoreError(f"{location}: no good clip in {', '.join(splits)}; see: ajepa-data report")

    # Keep this order of operations: a resumed run compares the result bit for bit.
    mean = sum(part["frames"] * part["mean"] for part in split_stats) / frames
    square = sum(part["frames"] * (part["std"] ** 2 + part["mean"] ** 2) for part in split_stats) / frames
    variance = square - mean**2

    # The variance of equal values is zero, except for rounding.
    if variance <= 1e-9 * square:
        raise StoreError(
            f"{location}: every value of the good clips in {', '.join(splits)} is {mean:g}, nothing to learn from; "
            "build it from sounds that are not silent"
        )
    return mean, math.sqrt(variance)


def pool_band_mean_and_std(split_stats: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and std of each band over all frames of the given entries of `stats`, float64 `F`.

    No std is below a quarter of the mean std (`LEAST_STD_SHARE`), not even if all values of a band are equal.
    """
    # Axis S is that of the entries; each is weighted by its share of the frames.
    frames_S = np.array([part["frames"] for part in split_stats], np.float64)
    share_S1 = (frames_S / frames_S.sum())[:, None]
    mean_SF = np.array([part["mean_F"] for part in split_stats])
    std_SF = np.array([part["std_F"] for part in split_stats])

    # The variance within the entries, and that of their means.
    mean_F = (share_S1 * mean_SF).sum(0)
    std_F = np.sqrt((share_S1 * (std_SF**2 + (mean_SF - mean_F) ** 2)).sum(0))
    return mean_F, np.maximum(std_F, LEAST_STD_SHARE * std_F.mean())
