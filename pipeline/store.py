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

import hashlib
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.exclusions import Exclusions
from pipeline.files import replacing
from pipeline.manifest import check_schema
from pipeline.melspec import MelSpec
from pipeline.ontology import ClassList
from pipeline.shards import Layout, ShardReader

FORMAT = 1
METADATA_KEY = b"ajepa"
DAMAGED = (
    OSError,
    ValueError,
    pa.ArrowException,
    pl.exceptions.PanicException,
)  # what a damaged table may raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a store is: everything that is known before the first clip is decoded."""

    spec: MelSpec
    layout: Layout
    plan_id: str
    scale: float  # log-mel = offset + scale * stored
    offset: float
    classes: ClassList
    plan_digest: str  # of the manifest's columns of the plan
    labels_digest: str  # of `raw` and `outside` in labels.parquet

    def to_json(self) -> dict[str, object]:
        values = self._values()
        return values | {"digest": _digest_of_json(values)}

    def _values(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "spec": self.spec.to_json(),
            "spec_id": self.spec.spec_id,
            "plan_id": self.plan_id,
            "layout": asdict(self.layout),
            "scale": self.scale,
            "offset": self.offset,
            "classes": list(self.classes.mids),
            "class_names": list(self.classes.names),
            "plan_digest": self.plan_digest,
            "labels_digest": self.labels_digest,
        }

    @classmethod
    def read(cls, store: Path) -> Self:
        """The header of the store at `store`; raises StoreError where there is none of this format."""
        path = store / "zarr.json"
        try:
            header = json.loads(path.read_text())["attributes"]["ajepa"]
            known, digest = header["format"], header.pop("digest", None)
        except (OSError, KeyError, ValueError, TypeError, AttributeError):
            raise StoreError(
                f"{store}: not a feature store; make one with: ajepa-data build-audioset"
            ) from None
        if known != FORMAT:
            raise StoreError(f"{store}: has store format {known}, this version reads format {FORMAT}")
        if digest != _digest_of_json(header):
            raise StoreError(
                f"{path}: does not match its digest; run the build command again: it writes it anew"
            )
        return cls._of(header)

    @classmethod
    def _of(cls, header: dict[str, Any]) -> Self:
        return cls(
            spec=MelSpec.from_json(header["spec"]),
            layout=Layout(**header["layout"]),
            plan_id=header["plan_id"],
            scale=header["scale"],
            offset=header["offset"],
            classes=ClassList(mids=tuple(header["classes"]), names=tuple(header["class_names"])),
            plan_digest=header["plan_digest"],
            labels_digest=header["labels_digest"],
        )


def write_table(path: Path, frame: pl.DataFrame, metadata: dict[str, Any]) -> None:
    """A Parquet file with `metadata` as JSON in its schema, whole or not at all; equal input gives equal bytes."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    with replacing(path) as scratch:
        text = json.dumps(metadata, separators=(",", ":"))
        table = table.replace_schema_metadata({METADATA_KEY: text})
        pq.write_table(table, scratch, compression="zstd", write_page_checksum=True)


def read_table(path: Path, columns: Sequence[str] | None = None) -> tuple[pl.DataFrame, dict[str, Any]]:
    """A frame, or some columns of it, and the metadata that `write_table` put beside it; raises StoreError."""
    try:
        table = pq.read_table(path, columns=columns and list(columns), page_checksum_verification=True)
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        return frame, _metadata(table.schema)
    except DAMAGED as error:
        why = "missing" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise StoreError(
            f"{path}: cannot be read ({why}); delete it, if it is there, and build again"
        ) from None


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write_table` put beside a frame, without the frame; raises StoreError."""
    try:
        return _metadata(pq.read_schema(path))
    except DAMAGED as error:
        raise StoreError(f"{path}: cannot be read ({error}); delete it and build again") from None


def digest_of(frame: pl.DataFrame) -> str:
    """32 hex digits of what a frame holds, column by column, whatever file it lies in; lists, texts and numbers."""
    digest = hashlib.sha256()
    for column in frame.iter_columns():
        digest.update(f"{column.name} {len(column)}\n".encode())
        if column.dtype == pl.List:
            digest.update(column.list.len().fill_null(2**32 - 1).cast(pl.UInt32).to_numpy().tobytes())
            column = column.explode(empty_as_null=False, keep_nulls=False)
        digest.update(column.is_null().to_numpy().tobytes())
        if column.dtype == pl.String:
            digest.update("\0".join(column.drop_nulls()).encode())
        else:
            digest.update(column.fill_null(0).to_numpy().tobytes())
    return digest.hexdigest()[:32]


def _digest_of_json(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))


class FeatureStore:
    """Spectrograms and labels, row for row with their manifest; open one with `FeatureStore.open`.

    Reads are thread-safe; a pickled store opens itself again by its path.
    """

    def __init__(self, path: Path, header: Header, manifest: pl.DataFrame, store_id: str) -> None:
        self.path, self.header, self.manifest, self.store_id = path, header, manifest, store_id
        self.spec, self.classes = header.spec, header.classes
        self.scale, self.offset = header.scale, header.offset
        self.frames, self.bands = header.layout.frames, header.layout.bands
        self.dtype = np.dtype(header.layout.dtype)
        self.n_frames_N = manifest["n_frames"].to_numpy()
        self._local = threading.local()

    @classmethod
    def open(cls, path: Path | str, expect: MelSpec | None = None) -> Self:
        """Open a finished store; raises StoreError where it is none, unfinished, or of another spec than `expect`."""
        path = Path(path)
        header = Header.read(path)
        if expect is not None and expect.spec_id != header.spec.spec_id:
            raise StoreError(
                f"{path} holds {header.spec}, expected {expect}; build a store with --spec {expect.name}"
            )
        manifest, metadata = read_table(path / "manifest.parquet")
        if "store_id" not in metadata:
            raise StoreError(
                f"{path}: its build has not finished; run the same ajepa-data build command again"
            )
        return cls(path, header, check_schema(manifest, path / "manifest.parquet"), metadata["store_id"])

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore.open, (self.path,)

    @property
    def spec_id(self) -> str:
        return self.spec.spec_id

    @cached_property
    def stats(self) -> dict[str, dict[str, Any]]:
        """`all` and each split: frames, mean, std, mean_F, std_F of log-mel over valid frames of good clips."""
        return json.loads((self.path / "stats.json").read_text())

    def mean_and_std(self, splits: Sequence[str]) -> tuple[float, float]:
        """Of log-mel over the valid frames of good clips of some splits; StoreError where they have none."""
        parts = [self.stats[split] for split in splits if split in self.stats]
        frames = sum(part["frames"] for part in parts)
        if not frames:
            raise StoreError(f"{self.path}: no good clip in {', '.join(splits)}; see: ajepa-data report")
        mean = sum(part["frames"] * part["mean"] for part in parts) / frames
        square = sum(part["frames"] * (part["std"] ** 2 + part["mean"] ** 2) for part in parts) / frames
        return mean, math.sqrt(square - mean**2)

    def good_rows(self, splits: Sequence[str] | None = None) -> np.ndarray:
        """Ascending rows (int64) of good, not excluded clips of the given splits or all; StoreError on unknown ones."""
        known = set(self.manifest["split"].unique())
        if splits is not None and set(splits) - known:
            raise StoreError(f"{self.path}: no split {sorted(set(splits) - known)}; it has {sorted(known)}")
        wanted = (pl.col("status") == "good") & ~pl.Series(self.excluded.marks_N(self.manifest))
        if splits is not None:
            wanted &= pl.col("split").is_in(list(splits))
        return self.manifest.select(wanted).to_series().arg_true().to_numpy().astype(np.int64)

    def shards_of(self, rows_N: np.ndarray) -> np.ndarray:
        """The shard that each row lies in."""
        return rows_N // self.header.layout.shard_clips

    @cached_property
    def excluded(self) -> Exclusions:
        """What exclude lists are recorded; StoreError where they are damaged."""
        return Exclusions.recorded(self.path, read_table)

    @cached_property
    def _labels(self) -> pl.DataFrame:
        return read_table(self.path / "labels.parquet")[0]

    @property
    def label_sets(self) -> tuple[str, ...]:
        """`raw` and the rules by which labels have been propagated."""
        return tuple(name for name in self._labels.columns if name != "outside")

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
            hint = f"ajepa-data propagate-labels {self.path} --rule {label_set}"
            raise StoreError(f"{self.path}: no label set {label_set!r}, it has {have}; add it with: {hint}")
        flat = self.__dict__.setdefault("_flat", {})
        if label_set not in flat:
            lists = self._labels[label_set]
            offsets_N = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy(), dtype=np.int64)])
            flat[label_set] = lists.explode(empty_as_null=False).to_numpy(), offsets_N
        return flat[label_set]

    def read(
        self,
        rows_B: np.ndarray,
        *,
        out: np.ndarray | None = None,
        starts_B: np.ndarray | None = None,
        frames: int | None = None,
    ) -> np.ndarray:
        """The stored values of rows as `[B, T, F]`, with `frames` only those in [start, start + frames) of each.

        Reads just these bytes, into `out` (C-contiguous, stored dtype) if given. Raises StoreError for a row that
        is not good and a shard that is damaged; a crop beyond the stored frames is a ValueError.
        """
        frames = self.frames if frames is None else frames
        starts_B = np.zeros(len(rows_B), np.int64) if starts_B is None else starts_B
        if len(rows_B) and (starts_B.min() < 0 or starts_B.max() + frames > self.frames):
            raise ValueError(f"crops of {frames} frames from {starts_B} leave the stored 0..{self.frames}")
        mel_BTF = np.empty((len(rows_B), frames, self.bands), self.dtype) if out is None else out
        reader = self._reader()
        for clip_TF, row, start in zip(mel_BTF, rows_B, starts_B, strict=True):
            reader.read_into(int(row), clip_TF, start_frame=int(start))
        return mel_BTF

    def _reader(self) -> ShardReader:
        if not hasattr(self._local, "reader"):
            self._local.reader = ShardReader(self.path, self.header.layout)
        return self._local.reader
