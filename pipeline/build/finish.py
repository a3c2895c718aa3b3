"""The ledger -> manifest, statistics, identity: what makes a store finished."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.build.remote_store import Mirror
from pipeline.files import gate, replacing
from pipeline.store.header import Header
from pipeline.store.manifest import PLAN_SCHEMA
from pipeline.store.shards import Commit, read_commit, store_id
from pipeline.store.tables import read_table, write_table


def finalise(
    out: Path, header: Header, told: dict[str, Any] | None = None, mirror: Mirror | None = None
) -> pl.DataFrame | None:
    """Write the manifest and the statistics that the ledger gives; returns the manifest, None while shards are open.

    `told` goes into build.json. A store that lies elsewhere is finished there, with what other machines
    have built of it. Raises StoreError for a damaged record.
    """
    with gate(out):
        if mirror is not None:
            mirror.pull(lambda _: False)
        if open_shards(out, header):
            _tell(out, told)
            return None
        records = [read_commit(out, shard) for shard in range(header.layout.shards)]
        done = [record for record in records if record is not None]
        commits, results = [commit for commit, _ in done], pl.concat([results for _, results in done])
        table = out / "manifest.parquet"
        plan, before = read_table(table, list(PLAN_SCHEMA))
        identity = {"store_id": store_id(header, commits)}
        if before != identity or _asked(out) != (told or {}).get("asked"):
            _tell(out, told)  # a run that changed nothing leaves what the one said that built it
        manifest = pl.concat([plan, results], how="horizontal")
        with replacing(out / "stats.json") as scratch:
            scratch.write_text(json.dumps(statistics(commits, results), indent=1) + "\n")
        write_table(table, manifest, identity)
        if mirror is not None:  # not while shards are open: whoever ends last may have pushed them already
            mirror.push_tables()
        return manifest


def _tell(out: Path, told: dict[str, Any] | None) -> None:
    if told is not None:
        with replacing(out / "build.json") as scratch:
            scratch.write_text(json.dumps(told, indent=1) + "\n")


def _asked(out: Path) -> object:
    """What build.json says was asked; None where it says nothing."""
    try:
        return json.loads((out / "build.json").read_text())["asked"]
    except (OSError, ValueError, KeyError):
        return None


def open_shards(out: Path, header: Header) -> list[int]:
    """The shards that no record tells of."""
    known = {int(path.stem) for path in out.glob("ledger/[0-9]*.parquet")}
    return sorted(set(range(header.layout.shards)) - known)


def statistics(commits: Sequence[Commit], results: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """`all` and each split: frames, mean, std, mean_F, std_F from the moments of all shards; what storing cost."""
    splits = sorted({split for commit in commits for split in commit.moments})
    parts = {split: [c.moments[split] for c in commits if split in c.moments] for split in splits}
    return {"all": _merged([m for part in parts.values() for m in part]) | _quantisation(results)} | {
        split: _merged(part) for split, part in parts.items()
    }


def _merged(moments: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


def _quantisation(results: pl.DataFrame) -> dict[str, float]:
    """Stored against computed log-mel, over valid frames of good clips, in nats."""
    good = results.filter(pl.col("status") == "good")
    if good.is_empty():
        return {}
    frames_N, rms_N = good["n_frames"].to_numpy(), good["error_rms_nat"].to_numpy()
    return {
        "quantisation_rms_nat": math.sqrt(np.average(np.square(rms_N), weights=frames_N)),
        "quantisation_max_nat": float(good["error_max_nat"].to_numpy().max()),
    }
