"""The ledger -> manifest, statistics, identity: what makes a store finished."""

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
    """Write the manifest and the statistics that the ledger gives; returns the manifest, None while shards are open.

    `told` goes into build.json. A store that lies elsewhere is finished there, with what other machines
    have built of it. Raises StoreError for a damaged record.
    """
    with lock_shared_files(out):
        if remote_store is not None:
            remote_store.sync_ledger(lambda _: False)
        if unbuilt_shards(out, header):
            _write_build_record(out, build_record)
            return None
        records = [read_commit(out, shard) for shard in range(header.layout.shard_count)]
        done = [record for record in records if record is not None]
        commits, results = [commit for commit, _ in done], pl.concat([results for _, results in done])
        table = out / "manifest.parquet"
        plan, before = read_table(table, list(PLAN_SCHEMA))
        identity = {"store_id": compute_store_id(header, commits)}
        if before != identity or _recorded_request(out) != (build_record or {}).get("asked"):
            _write_build_record(
                out, build_record
            )  # a run that changed nothing leaves what the one said that built it
        manifest = pl.concat([plan, results], how="horizontal")
        with replacing_file(out / "stats.json") as scratch:
            scratch.write_text(json.dumps(store_statistics(commits, results), indent=1) + "\n")
        write_table(table, manifest, identity)
        if (
            remote_store is not None
        ):  # not while shards are open: whoever ends last may have pushed them already
            remote_store.push_tables()
        return manifest


def _write_build_record(out: Path, build_record: dict[str, Any] | None) -> None:
    if build_record is not None:
        with replacing_file(out / "build.json") as scratch:
            scratch.write_text(json.dumps(build_record, indent=1) + "\n")


def _recorded_request(out: Path) -> object:
    """What build.json says was asked; None where it says nothing."""
    try:
        return json.loads((out / "build.json").read_text())["asked"]
    except (OSError, ValueError, KeyError):
        return None


def unbuilt_shards(out: Path, header: StoreHeader) -> list[int]:
    """The shards that no record tells of."""
    known = {int(path.stem) for path in out.glob("ledger/[0-9]*.parquet")}
    return sorted(set(range(header.layout.shard_count)) - known)


def store_statistics(commits: Sequence[ShardCommit], results: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """`all` and each split: frames, mean, std, mean_F, std_F from the moments of all shards; what storing cost."""
    splits = sorted({split for commit in commits for split in commit.moments})
    parts = {split: [c.moments[split] for c in commits if split in c.moments] for split in splits}
    return {
        "all": _merge_moments([m for part in parts.values() for m in part]) | _quantisation_error(results)
    } | {split: _merge_moments(part) for split, part in parts.items()}


def _merge_moments(moments: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
    """Stored against computed log-mel, over valid frames of good clips, in nats."""
    good = results.filter(pl.col("status") == "good")
    if good.is_empty():
        return {}
    frames_N, rms_N = good["n_frames"].to_numpy(), good["error_rms_nat"].to_numpy()
    return {
        "quantisation_rms_nat": math.sqrt(np.average(np.square(rms_N), weights=frames_N)),
        "quantisation_max_nat": float(good["error_max_nat"].to_numpy().max()),
    }
