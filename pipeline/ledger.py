"""The ledger: one record a shard, the commit point; how a shard and its record are put in place."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.files import fsync
from pipeline.header import Header
from pipeline.manifest import RESULT_SCHEMA
from pipeline.shards import ShardWriter, shard_path
from pipeline.tables import digest_of, read_table, write_table

NEXT = ".next"  # suffix of a record whose shard is about to be placed


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What the ledger says of one shard beside the results of its rows."""

    shard: int
    spec_id: str
    plan_id: str
    size_bytes: int  # 0: no clip of the shard is good, and Zarr keeps no object
    sha256: str
    policy: dict[str, Any]  # `AudioPolicy` of the clips: the loosest of those with which its rows were built
    moments: dict[str, dict[str, Any]]  # per split: frames, sum_F, square_F over valid frames of good clips


class Moments:
    """Per split: how many valid frames, and the sums and sums of squares of their stored log-mel per band."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, Any, Any]] = {}

    def add(self, split: str, values_TF: Tensor) -> None:
        frames, sum_F, square_F = self._sums.get(split, (0, 0.0, 0.0))
        values_TF = values_TF.double()
        self._sums[split] = (
            frames + len(values_TF),
            sum_F + values_TF.sum(0).numpy(),
            square_F + values_TF.square_().sum(0).numpy(),
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {
            split: {"frames": frames, "sum_F": sum_F.tolist(), "square_F": square_F.tolist()}
            for split, (frames, sum_F, square_F) in self._sums.items()
        }


def ledger_path(store: Path, shard: int) -> Path:
    return store / "ledger" / f"{shard:06d}.parquet"


def stray_shards(store: Path) -> list[Path]:
    """Objects below `mel/c` that no record of the ledger tells of."""
    known = {shard_path(store, int(path.stem)) for path in store.glob("ledger/[0-9]*.parquet")}
    return sorted(set(store.glob("mel/c/*/0/0")) - known)


def write_commit(path: Path, commit: Commit, results: pl.DataFrame) -> None:
    """Write what the ledger says of a shard."""
    results, values = results.select(*RESULT_SCHEMA), asdict(commit)
    write_table(path, results, {"commit": values, "digest": _digest(results, values)})


def read_commit(store: Path, shard: int) -> tuple[Commit, pl.DataFrame] | None:
    """A shard's commit and the results of its rows, or None where it is not committed."""
    path = ledger_path(store, shard)
    if not path.exists():
        return None
    commit, results = commit_at(path)
    if commit.shard != shard:
        raise StoreError(f"{path}: is the record of shard {commit.shard}; delete it and build again")
    return commit, results


def commit_at(path: Path) -> tuple[Commit, pl.DataFrame]:
    """The record in one file of the ledger; raises StoreError, also where it does not match its own digest."""
    frame, metadata = read_table(path)
    values = metadata.get("commit")
    if (
        values is None
        or frame.columns != list(RESULT_SCHEMA)
        or metadata.get("digest") != _digest(frame, values)
    ):
        raise StoreError(f"{path}: does not match its digest; run: ajepa-data verify --repair")
    return Commit(**values), frame


def _digest(results: pl.DataFrame, values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True) + digest_of(results)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def store_id(header: Header, commits: Sequence[Commit]) -> str:
    """12 hex digits of plan, spec, and every shard's digest."""
    text = " ".join([header.plan_id, header.spec.spec_id, *(commit.sha256 for commit in commits)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def place(store: Path, commit: Commit, results: pl.DataFrame, writer: ShardWriter | None) -> None:
    """Put a shard and its record in place so that at every instant the old pair or the new one can be had.

    The new record waits as `.next` while the shard is renamed; `settle` decides by the shard's digest.
    """
    record = ledger_path(store, commit.shard)
    waiting = record.with_name(record.name + NEXT)
    write_commit(waiting, commit, results)
    if writer is not None:
        writer.place()
    adopt(waiting)


def adopt(waiting: Path) -> None:
    """Let the record count whose shard is in place."""
    waiting.replace(waiting.with_suffix(""))
    fsync(waiting.parent)


def settle(store: Path, waiting: Path) -> None:
    """Adopt a waiting record if the shard it tells of is in place, else drop it: the old record holds."""
    if matches(store, commit_at(waiting)[0]):
        adopt(waiting)
    else:
        waiting.unlink()


def matches(store: Path, commit: Commit) -> bool:
    """Whether the shard on disk is the one that was committed, byte for byte."""
    path = shard_path(store, commit.shard)
    return is_committed(path, commit) if commit.size_bytes else not path.exists()


def is_committed(path: Path, commit: Commit) -> bool:
    """Whether a file is the shard that was committed, byte for byte."""
    if not path.is_file() or path.stat().st_size != commit.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == commit.sha256
