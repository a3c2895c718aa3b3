"""FeatureStore: the on-disk schema, in full, and how to read it.

NAME.zarr/              a Zarr v3 group: any Zarr v3 library opens it
  zarr.json             attributes["ajepa"]: the `Header`
  mel/                  (clip, frame, band), float16 or uint8; one inner chunk per clip, sharded (`shards.py`);
                        frames past a clip's own are the spec's floor; clips that are not there read as NaN (uint8: 0)
  manifest.parquet      row i describes mel[i] (`manifest.py`)
  labels.parquet        row i: `raw` and one column per propagated label set, lists of class indices; `outside`:
                        class ids that are not in the class list. Provenance in the schema metadata
  ledger/N.parquet      shard N is committed: the manifest columns of its rows and, in the schema metadata, the
                        `Commit`. THE commit point: what is not in the ledger does not exist. N.parquet.next: its
                        shard is about to be placed; the next build adopts it if the shard matches, or drops it
  excluded.parquet      maybe: clips that exclude lists keep out of `good_rows` (`exclusions.py`)
  stats.json            mean and std over valid frames of good clips, global and per band: all, and per split
  build*.lock, gate.lock    who is writing, while somebody is
  build.json            what was asked, versions, time taken: of the run, so the one file in which equal builds differ
"""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import BrokenClipError, RunError, StoreError
from pipeline.files import DEFAULT_CACHE_GB
from pipeline.object_store import is_remote_url
from pipeline.store.cache import BYTES_PER_GB, ShardCache, fetch_store_tables
from pipeline.store.exclusions import Exclusions
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import check_manifest_schema
from pipeline.store.reader import ChecksumMode, ReadMethod, RowReader, ShardReader
from pipeline.store.shards import check_mel_array, shard_path
from pipeline.tables import read_table


class FeatureStore:
    """Spectrograms and labels, row for row with their manifest; open one with `FeatureStore.open`.

    Reads are thread-safe; a pickled store opens itself again by its place, in the same way. With a `reader` its
    values come from there, and not from the shards.
    """

    def __init__(
        self,
        path: Path,
        header: StoreHeader,
        manifest: pl.DataFrame,
        store_id: str,
        *,
        io: ReadMethod = "pread",
        check: ChecksumMode = "first-epoch",
        cache: ShardCache | None = None,
        reader: RowReader | None = None,
    ) -> None:
        self.path, self.header, self.manifest, self.store_id = path, header, manifest, store_id
        self.location = str(path) if cache is None else cache.url
        self.spec, self.classes = header.spec, header.classes
        self.scale, self.offset = header.scale, header.offset
        self.frames, self.bands = header.layout.frames, header.layout.bands
        self.dtype = np.dtype(header.layout.dtype)
        self.n_frames_N = manifest["n_frames"].to_numpy()
        self._cache, self._io, self._check, self._custom_reader = cache, io, check, reader
        self._checked_rows, self._thread_local = bytearray(header.layout.clips), threading.local()
        self._own_shard_reader()  # refuses an `io` or a `check` that there is not

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
        """Open a finished store; raises StoreError where it is none, unfinished, or of another spec than `expect`.

        `io` and `check` as `ShardReader` has them. Of a store at a URL the shards last read lie in the folder
        `cache`, up to `cache_gb` of them (10^9 bytes); other processes may use the same one.
        """
        if is_remote_url(location) and cache is None:
            raise StoreError(
                f"{location}: lies on an object store; give --cache DIR, a folder for its last shards"
            )
        path = (
            fetch_store_tables(str(location), Path(cache))
            if is_remote_url(location) and cache is not None
            else Path(location)
        )
        header = StoreHeader.read(path)
        if expect is not None and expect.spec_id != header.spec.spec_id:
            raise StoreError(
                f"{location} holds {header.spec}, expected {expect}; build a store with --spec {expect.name}"
            )
        check_mel_array(path, header.layout)
        manifest, metadata = read_table(path / "manifest.parquet")
        if "store_id" not in metadata:
            raise StoreError(
                f"{location}: its build has not finished; run the same ajepa-data build command again"
            )
        manifest, shards = check_manifest_schema(manifest, path / "manifest.parquet"), None
        if is_remote_url(location) and cache is not None:
            shards = ShardCache(
                url=str(location).rstrip("/"),
                cache_folder=Path(cache),
                max_bytes=int(cache_gb * BYTES_PER_GB),
                snapshot_folder=path.parent / metadata["store_id"],
                layout=header.layout,
                manifest=manifest,
            )
        return cls(path, header, manifest, metadata["store_id"], io=io, check=check, cache=shards)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._custom_reader is not None:
            whole = partial(FeatureStore, reader=self._custom_reader)
            return whole, (self.path, self.header, self.manifest, self.store_id)
        how: dict[str, Any] = {"io": self._io, "check": self._check}
        if self._cache is not None:
            how |= {"cache": self._cache.cache_folder, "cache_gb": self._cache.max_bytes / BYTES_PER_GB}
        return partial(FeatureStore.open, **how), (self.location if self._cache else self.path,)

    def refuse_other_front_end(self, required_spec: MelSpec, required_by: str) -> None:
        """RunError where values mean something else than in `wanted`, which `who` was made for."""
        if self.spec.same_front_end(required_spec):
            return
        held, asked = (
            f"{spec.name} ({spec.mel_bands} bands, {spec.spec_id})" for spec in (self.spec, required_spec)
        )
        told = f"holds mel spec {held}, {required_by} {asked}"
        raise RunError(f"{self.location}: {told}; build a store with --spec {required_spec.name}")

    @property
    def spec_id(self) -> str:
        return self.spec.spec_id

    @cached_property
    def stats(self) -> dict[str, dict[str, Any]]:
        """`all` and each split: frames, mean, std, mean_F, std_F of log-mel over valid frames of good clips."""
        return json.loads((self.path / "stats.json").read_text())

    def mean_and_std(self, splits: Sequence[str]) -> tuple[float, float]:
        """Of log-mel over the valid frames of good clips of some splits; StoreError: none, or all one value."""
        parts = [self.stats[split] for split in splits if split in self.stats]
        return pool_mean_and_std(parts, self.location, splits)

    def band_mean_and_std(self, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same of each band by itself, float64 `F`; the std is at least a hundredth of the mean one."""
        return pool_band_mean_and_std([self.stats[split] for split in splits if split in self.stats])

    def good_rows(self, splits: Sequence[str] | None = None) -> np.ndarray:
        """Ascending rows (int64) of good, not excluded clips of the given splits or all; StoreError on unknown ones."""
        known = set(self.manifest["split"].unique())
        if splits is not None and set(splits) - known:
            raise StoreError(
                f"{self.location}: no split {sorted(set(splits) - known)}; it has {sorted(known)}"
            )
        wanted = (pl.col("status") == "good") & ~pl.Series(self.exclusions.excluded_mask_N(self.manifest))
        if splits is not None:
            wanted &= pl.col("split").is_in(list(splits))
        return self.manifest.select(wanted).to_series().arg_true().to_numpy().astype(np.int64)

    def shard_numbers(self, rows_N: np.ndarray) -> np.ndarray:
        """The shard that each row lies in."""
        return rows_N // self.header.layout.shard_clips

    @cached_property
    def exclusions(self) -> Exclusions:
        """What exclude lists are recorded; StoreError where they are damaged."""
        return Exclusions.read_from_store(self.path)

    @cached_property
    def _label_table(self) -> pl.DataFrame:
        return read_table(self.path / "labels.parquet")[0]

    @property
    def label_sets(self) -> tuple[str, ...]:
        """`raw` and the rules by which labels have been propagated."""
        return tuple(name for name in self._label_table.columns if name != "outside")

    def labels_BC(self, rows_B: np.ndarray, label_set: str = "raw") -> np.ndarray:
        """1 where a row has a class, else 0, float32; raises StoreError where the label set is not there."""
        indices_N, offsets_N = self.flat_labels(label_set)
        labels_BC = np.zeros((len(rows_B), len(self.classes.mids)), np.float32)
        for clip, row in enumerate(rows_B):
            labels_BC[clip, indices_N[offsets_N[row] : offsets_N[row + 1]]] = 1
        return labels_BC

    def flat_labels(self, label_set: str = "raw") -> tuple[np.ndarray, np.ndarray]:
        """The classes of all rows, row after row, and where each row's begin, with the end of the last; StoreError."""
        if label_set not in self.label_sets:
            have = ", ".join(self.label_sets)
            hint = f"ajepa-data propagate-labels {self.location} --rule {label_set}"
            raise StoreError(
                f"{self.location}: no label set {label_set!r}, it has {have}; add it with: {hint}"
            )
        flat = self.__dict__.setdefault("_flat", {})
        if label_set not in flat:
            lists = self._label_table[label_set]
            offsets_N = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy(), dtype=np.int64)])
            flat[label_set] = lists.explode(empty_as_null=False).to_numpy(), offsets_N
        return flat[label_set]

    def to_log_mel(self, stored: np.ndarray) -> np.ndarray:
        """Values as `read` gives them as log-mel, natural logarithm of power, float32, in the same shape."""
        return self.header.to_log_mel(stored)

    def read(
        self,
        rows_B: np.ndarray,
        *,
        out: np.ndarray | None = None,
        starts_B: np.ndarray | None = None,
        frames: int | None = None,
    ) -> np.ndarray:
        """The stored values of rows as `[B, T, F]`, with `frames` only those in [start, start + frames) of each.

        Reads just these bytes where no check is due, into `out` (C-contiguous, stored dtype) if given. Raises
        BrokenClip for a clip that cannot be read as it was written, StoreError for a row that is not good; a crop
        beyond the stored frames is a ValueError.
        """
        frames = self.frames if frames is None else frames
        starts_B = np.zeros(len(rows_B), np.int64) if starts_B is None else starts_B
        if len(rows_B) and (starts_B.min() < 0 or starts_B.max() + frames > self.frames):
            raise ValueError(f"crops of {frames} frames from {starts_B} leave the stored 0..{self.frames}")
        mel_BTF = np.empty((len(rows_B), frames, self.bands), self.dtype) if out is None else out
        if self._cache and self._cache.fetch_missing_shards(
            np.unique(rows_B // self.header.layout.shard_clips).tolist()
        ):
            self._own_shard_reader().close_missing_files()
        try:
            self._active_reader().read(rows_B, starts_B, mel_BTF)
        except BrokenClipError as broken:
            raise self._explain_broken_clip(broken) from None
        return mel_BTF

    def local_shard_path(self, shard: int) -> Path:
        """Where a shard lies on this machine, fetched if need be; a path to nothing where no clip of it is good."""
        try:
            return self._cache.local_path(shard) if self._cache else shard_path(self.path, shard)
        except ValueError as error:
            raise StoreError(f"{self.location}: shard {shard} {error}") from None

    def _explain_broken_clip(self, broken: BrokenClipError) -> StoreError:
        """What a user is told of a row that could not be read."""
        row, shard = broken.row, broken.row // self.header.layout.shard_clips
        clip_id, status, reason = self.manifest.select("clip_id", "status", "reason").row(row)
        if status != "good":
            why = f"is not good: {reason}; draw rows from good_rows()"
            return StoreError(f"{self.location}: row {row} (clip {clip_id}) {why}")
        mends = f"run: ajepa-data verify {self.location} --repair"
        if self._custom_reader is not None:
            mends = f"its sound is not what it was; see: ajepa-data verify {self.location} --against-audio"
        if self._cache is not None:
            mends = f"where the copy is at fault, delete {self._cache.snapshot_folder}: it is fetched again"
        what = f"row {row} (clip {clip_id}, shard {shard}) cannot be read"
        return BrokenClipError(row, f"{self.location}: {what}: {broken}; {mends}")

    def _active_reader(self) -> RowReader:
        return self._own_shard_reader() if self._custom_reader is None else self._custom_reader

    def _own_shard_reader(self) -> ShardReader:
        if not hasattr(self._thread_local, "reader"):
            locate = self._cache.local_path if self._cache else partial(shard_path, self.path)
            self._thread_local.reader = ShardReader(
                locate, self.header.layout, io=self._io, check=self._check, checked_rows=self._checked_rows
            )
        return self._thread_local.reader


def pool_mean_and_std(
    split_stats: Sequence[Mapping[str, Any]], location: str, splits: Sequence[str]
) -> tuple[float, float]:
    """Mean and std of all frames of parts of `stats`; StoreError where there are none, or nothing to divide by."""
    frames = sum(part["frames"] for part in split_stats)
    if not frames:
        raise StoreError(f"{location}: no good clip in {', '.join(splits)}; see: ajepa-data report")
    mean = sum(part["frames"] * part["mean"] for part in split_stats) / frames
    square = sum(part["frames"] * (part["std"] ** 2 + part["mean"] ** 2) for part in split_stats) / frames
    variance = square - mean**2  # to the last bit as ever: a run compares it when it is carried on
    if variance <= 1e-9 * square:  # what rounding leaves of none
        told = f"every value of the good clips in {', '.join(splits)} is {mean:g}, nothing to learn from"
        raise StoreError(f"{location}: {told}; build it from sounds that are not silent")
    return mean, math.sqrt(variance)


def pool_band_mean_and_std(split_stats: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """`pooled`, of each band by itself; where a band is one value its std is a hundredth of the mean one."""
    frames_S = np.array([part["frames"] for part in split_stats], np.float64)
    share_S1 = (frames_S / frames_S.sum())[:, None]
    mean_SF, std_SF = (np.array([part[name] for part in split_stats]) for name in ("mean_F", "std_F"))
    mean_F = (share_S1 * mean_SF).sum(0)
    std_F = np.sqrt((share_S1 * (std_SF**2 + (mean_SF - mean_F) ** 2)).sum(0))
    return mean_F, np.maximum(std_F, 0.01 * std_F.mean())
