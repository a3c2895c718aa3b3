"""Finish a store: write its manifest, statistics and identity, all of which follow from its ledger."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.build.remote_store import RemoteStore
from pipeline.files import lock_shared_files, replacing_file
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA
from pipeline.store.shards import ShardCommit, compute_store_id, read_commit
from pipeline.tables import read_table, write_table


def finish_store(
    out: Path,
    header: StoreHeader,
    build_record: dict[str, Any] | None = None,
    remote_store: RemoteStore | None = None,
) -> pl.DataFrame | None:
    """Write manifest and statistics from the ledger; returns the manifest, or None while shards are missing.

    `build_record` becomes build.json. A remote store is finished at its URL too, with the shards that other machines
    have pushed. Raises StoreError if a record is damaged.
    """
    with lock_shared_files(out):
        if remote_store is not None:
            remote_store.sync_ledger(lambda _: False)
        if unbuilt_shards(out, header):
            _write_build_record(out, build_record)
            return None

        # Manifest and statistics follow from the records of all shards.
        records = [read_commit(out, shard) for shard in range(header.layout.shard_count)]
        commits = [record[0] for record in records if record is not None]
        results = pl.concat([record[1] for record in records if record is not None])
        identity = {"store_id": compute_store_id(header, commits)}

        # If this build has changed nothing, keep the build.json of the earlier build.
        manifest_file = out / "manifest.parquet"
        plan, old_identity = read_table(manifest_file, list(PLAN_SCHEMA))
        if old_identity != identity or _recorded_settings(out) != (build_record or {}).get("asked"):
            _write_build_record(out, build_record)

        # The manifest is written last: its store_id marks the store as finished.
        with replacing_file(out / "stats.json") as scratch:
            scratch.write_text(json.dumps(store_statistics(commits, results), indent=1) + "\n")
        manifest = pl.concat([plan, results], how="horizontal")
        write_table(manifest_file, manifest, identity)

        # Push the tables only if the store is finished here: they must not replace those of a part that ended later.
        if remote_store is not None:
            remote_store.push_tables()
        return manifest


def _write_build_record(out: Path, build_record: dict[str, Any] | None) -> None:
    if build_record is not None:
        with replacing_file(out / "build.json") as scratch:
            scratch.write_text(json.dumps(build_record, indent=1) + "\n")


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


def store_statistics(commits: Sequence[ShardCommit], results: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the content of stats.json: frames, mean, std, mean_F and std_F of the log-mel, for `all` and each split.

    `all` also has the error of the stored dtype: `quantisation_rms_nat` and `quantisation_max_nat`.
    """
    splits = sorted({split for commit in commits for split in commit.moments})
    moments = {
        split: [commit.moments[split] for commit in commits if split in commit.moments] for split in splits
    }
    all_moments = [shard for shards in moments.values() for shard in shards]
    statistics = {"all": _merge_moments(all_moments) | _quantisation_error(results)}
    return statistics | {split: _merge_moments(shards) for split, shards in moments.items()}


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


def _quantisation_error(results: pl.DataFrame) -> dict[str, float]:
    """Return the difference of stored and computed log-mel over the valid frames of good clips, in nats."""
    good = results.filter(pl.col("status") == "good")
    if good.is_empty():
        return {}
    frames_N, rms_N = good["n_frames"].to_numpy(), good["error_rms_nat"].to_numpy()
    return {
        "quantisation_rms_nat": math.sqrt(np.average(np.square(rms_N), weights=frames_N)),
        "quantisation_max_nat": float(good["error_max_nat"].to_numpy().max()),
    }
