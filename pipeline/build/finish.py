"""Finish a store: write its manifest, statistics and identity, all of which follow from its ledger."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.build.remote_store import RemoteStore
from pipeline.errors import StoreError
from pipeline.files import lock_shared_files, replacing_file
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA
from pipeline.store.shards import ShardCommit, compute_store_id, read_commit_facts, read_commits
from pipeline.tables import TableRows, read_table_schema, writing_table_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRecord:
    """The content of build.json.

    values    inputs and settings; `asked` are the dataset's
    versions  returns the versions of the software. It is called only if the record is written: it may import PyTorch
    """

    values: dict[str, Any]
    versions: Callable[[], dict[str, str]]

    @property
    def asked(self) -> object:
        """The dataset's settings."""
        return self.values["asked"]


def finish_store(
    out: Path,
    header: StoreHeader,
    build_record: BuildRecord | None = None,
    remote_store: RemoteStore | None = None,
    *,
    rewrite: bool = False,
) -> bool:
    """Write manifest and statistics from the ledger; returns False, and writes neither, while shards are missing.

    They stay as they are if they were written after the last record, unless `rewrite` says that they may be damaged.
    `build_record` becomes build.json. A remote store is finished at its URL too, with the shards that other machines
    have pushed. Raises StoreError if a record is damaged.
    """
    with lock_shared_files(out):
        if remote_store is not None:
            remote_store.sync_ledger(lambda _: False)
        if unbuilt_shards(out, header):
            _write_build_record(out, build_record)
            return False

        # The identity follows from the digests of all shards.
        shards = range(header.layout.shard_count)
        identity = {"store_id": compute_store_id(header, (read_commit_facts(out, shard) for shard in shards))}

        # If this build has changed nothing, keep the build.json of the earlier build, and the tables if they are newer
        # than all records.
        manifest_file = out / "manifest.parquet"
        if read_table_schema(manifest_file)[1] == identity:
            if build_record is not None and _recorded_settings(out) == build_record.asked:
                build_record = None
            if not rewrite and _has_tables_of_ledger(out):
                _write_build_record(out, build_record)
                if remote_store is not None:
                    remote_store.push_tables()
                return True

        # Manifest and statistics follow from the records of all shards. The manifest is moved into place last: its
        # store_id marks the store as finished.
        summary = LedgerSummary()
        rows_of_shards = _manifest_rows(out, header, summary)
        with writing_table_parts(manifest_file, rows_of_shards, identity):
            _write_build_record(out, build_record)
            with replacing_file(out / "stats.json") as scratch:
                scratch.write_text(json.dumps(summary.statistics(), indent=1) + "\n")

        # Push the tables only if the store is finished here: they must not replace those of a part that ended later.
        if remote_store is not None:
            remote_store.push_tables()
        return True


def _has_tables_of_ledger(out: Path) -> bool:
    """Return whether manifest and statistics were written after every record.

    A build that died while it tried failed rows again leaves the identity of the store as it was, and newer records.
    """
    if not (out / "stats.json").exists():
        return False
    newest_record_ns = max(path.stat().st_mtime_ns for path in out.glob("ledger/[0-9]*.parquet"))
    return newest_record_ns < (out / "manifest.parquet").stat().st_mtime_ns


def _manifest_rows(out: Path, header: StoreHeader, summary: "LedgerSummary") -> Iterator[pl.DataFrame]:
    """Yield the rows of each shard as the manifest has them; adds each record to the summary."""
    plan = TableRows(out / "manifest.parquet", tuple(PLAN_SCHEMA))
    for shard, record in read_commits(out, range(header.layout.shard_count)):
        if isinstance(record, StoreError):
            raise record
        assert record is not None  # checked above, under the same lock
        summary.add_record(*record)
        clips = plan.next_rows(len(header.layout.rows_of_shard(shard)))
        yield pl.concat([clips, record[1]], how="horizontal")


def _write_build_record(out: Path, build_record: BuildRecord | None) -> None:
    if build_record is not None:
        content = {**build_record.values, "versions": build_record.versions()}
        with replacing_file(out / "build.json") as scratch:
            scratch.write_text(json.dumps(content, indent=1) + "\n")


def _recorded_settings(out: Path) -> object:
    """Return the dataset's settings in build.json; None if it does not contain them."""
    try:
        return json.loads((out / "build.json").read_text())["asked"]
    except (OSError, ValueError, KeyError):
        return None


def unbuilt_shards(out: Path, header: StoreHeader) -> list[int]:
    """Return the shards without a record, in ascending order."""
    known = {int(path.stem) for path in out.glob("ledger/[0-9]*.parquet")}
    return sorted(set(range(header.layout.shard_count)) - known)


class LedgerSummary:
    """Sums up the records of all shards, in their order, as the content of stats.json; keeps few numbers of each."""

    def __init__(self) -> None:
        self._moments: dict[str, list[dict[str, Any]]] = {}  # by split, in the order of the shards
        self._good_clips: list[pl.DataFrame] = []

    def add_record(self, commit: ShardCommit, results: pl.DataFrame) -> None:
        """Add the record of the next shard."""
        for split, moments in commit.moments.items():
            self._moments.setdefault(split, []).append(moments)
        good = results.filter(pl.col("status") == "good")
        if good.height:
            self._good_clips.append(good.select("n_frames", "error_rms_nat", "error_max_nat"))

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Return frames, mean, std, mean_F and std_F of the log-mel, for `all` and each split.

        `all` also has the error of the stored dtype: `quantisation_rms_nat` and `quantisation_max_nat`.
        """
        by_split = {split: self._moments[split] for split in sorted(self._moments)}
        all_moments = [shard for shards in by_split.values() for shard in shards]
        error = _quantisation_error(pl.concat(self._good_clips)) if self._good_clips else {}
        statistics = {"all": _merge_moments(all_moments) | error}
        return statistics | {split: _merge_moments(shards) for split, shards in by_split.items()}


def _merge_moments(moments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over all frames, from the moments of the shards (see `SplitMoments`)."""
    frames = sum(m["frames"] for m in moments)
    if not frames:
        return {"frames": 0}
    mean_F = np.sum([m["sum_F"] for m in moments], axis=0) / frames
    square_F = np.sum([m["square_F"] for m in moments], axis=0) / frames
    mean = mean_F.mean()
    return {
        "frames": frames,
        "mean": mean,
        "std": float(np.sqrt(max(square_F.mean() - mean**2, 0))),
        "mean_F": mean_F.tolist(),
        "std_F": np.sqrt(np.maximum(square_F - mean_F**2, 0)).tolist(),
    }


def _quantisation_error(good: pl.DataFrame) -> dict[str, float]:
    """Return the difference of stored and computed log-mel over the valid frames of good clips, in nats."""
    frames_N, rms_N = good["n_frames"].to_numpy(), good["error_rms_nat"].to_numpy()
    return {
        "quantisation_rms_nat": math.sqrt(np.average(np.square(rms_N), weights=frames_N)),
        "quantisation_max_nat": float(good["error_max_nat"].to_numpy().max()),
    }
