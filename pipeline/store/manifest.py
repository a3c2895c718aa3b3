"""The manifest: a table with one row per clip, which has the plan for the clip and the result of building it."""

import difflib
import hashlib
from collections.abc import Iterable

import polars as pl

from pipeline.errors import ManifestError

# The reasons for which a clip cannot be used, each with its explanation for users.
FAILURE_REASONS: dict[str, str] = {
    "missing": "no file was found for the clip",
    "unreadable": "no decoder can read the file",
    "truncated": "under 95 % of the declared length could be decoded",
    "too_short": "under 0.1 s of sound",
    "silent": "peak under -90 dBFS, or a constant value alone",
    "non_finite": "contains NaN or infinite samples",
    "too_long": "longer than the longest clip allowed",
    "timed_out": "decoding took longer than --limit-seconds",
    "crashed": "the decoder crashed its process",
    "duplicate": "the lists name the id more than once; another row counts",
}

# The columns that are known before the build.
PLAN_SCHEMA: dict[str, pl.DataType] = {
    "clip_id": pl.String(),
    "split": pl.String(),
    "start_seconds": pl.Float64(),
    "end_seconds": pl.Float64(),
}

# The columns that a build fills in; the ledger has the same columns, shard by shard.
RESULT_SCHEMA: dict[str, pl.DataType] = {
    "source": pl.String(),  # the file of the sound, relative to its --audio folder
    "status": pl.String(),  # good or failed; pending until its shard is committed
    "reason": pl.String(),  # a key of FAILURE_REASONS if the clip failed
    "detail": pl.String(),  # one sentence about the failure
    "flags": pl.List(pl.String()),  # unusual properties of a good clip (`summary.FLAG_MEANINGS`)
    "n_frames": pl.Int32(),  # frames that are not padding; 0 if the clip is not good
    "codec": pl.String(),
    "rate_hz": pl.Int32(),
    "channels": pl.Int32(),
    "seconds": pl.Float64(),  # length of the decoded source
    "peak_dbfs": pl.Float64(),
    "rms_dbfs": pl.Float64(),
    "digest": pl.String(),  # digest of the mono waveform before resampling
    "error_rms_nat": pl.Float64(),  # error of the stored log-mel by rounding and clipping: root mean square
    "error_max_nat": pl.Float64(),  # and maximum
    "crc32c": pl.UInt32(),  # crc32c of the stored spectrogram, little-endian
}

MANIFEST_SCHEMA = PLAN_SCHEMA | RESULT_SCHEMA


def failure_result(reason: str, detail: str, source: str | None = None) -> dict[str, object]:
    """Return the result columns of a clip that could not be used; `reason` is a key of FAILURE_REASONS."""
    assert reason in FAILURE_REASONS, reason
    empty: dict[str, object] = dict.fromkeys(RESULT_SCHEMA)
    return empty | {
        "source": source,
        "status": "failed",
        "reason": reason,
        "detail": detail,
        "flags": [],
        "n_frames": 0,
    }


def pending_manifest(plan: pl.DataFrame) -> pl.DataFrame:
    """Return the manifest of a store in which nothing is built yet."""
    empty = [pl.lit(None, dtype=dtype).alias(name) for name, dtype in RESULT_SCHEMA.items()]
    return plan.select(*PLAN_SCHEMA, *empty).with_columns(
        status=pl.lit("pending"),
        n_frames=pl.lit(0, dtype=pl.Int32),
        flags=pl.lit([], dtype=pl.List(pl.String)),
    )


def compute_plan_id(plan: pl.DataFrame | Iterable[pl.DataFrame], *, shard_clips: int) -> str:
    """Return 12 hex digits of the plan: each row's clip with its split, times and labels, and each shard's rows.

    The plan may be given in parts.
    """
    # One line of text per clip; times in whole milliseconds, which every machine rounds alike.
    line = pl.concat_str(
        "clip_id",
        "split",
        *[(pl.col(name) * 1000).round().cast(pl.Int64) for name in ("start_seconds", "end_seconds")],
        pl.col("duplicate").is_not_null().cast(pl.Int8),
        pl.col("mids").list.join(","),
        separator="\t",
    )

    # Hashed in slices: the text of two million clips is never in memory at once.
    digest = hashlib.sha256(f"plan 1, {shard_clips} clips a shard\n".encode())
    for part in [plan] if isinstance(plan, pl.DataFrame) else plan:
        for rows in part.iter_slices(65_536):
            lines = rows.select(line + "\n").to_series()
            digest.update("".join(lines).encode())
    return digest.hexdigest()[:12]


def check_manifest_schema(schema: pl.Schema, where: object) -> None:
    """Raise ManifestError unless a table has exactly the columns of a manifest."""
    if dict(schema) != MANIFEST_SCHEMA:
        different_columns = sorted(set(schema.items()) ^ set(MANIFEST_SCHEMA.items()), key=str)
        raise ManifestError(
            f"{where}: not a manifest of this version; columns that differ: {different_columns[:4]}; "
            "build the store again"
        )


MAX_COMPARED_TEXTS = 1_000  # texts that are compared letter by letter with the unknown one


def nearest_texts(texts: pl.Series, wanted: str) -> list[str]:
    """Return up to three of the texts, such as ids or names of files, that resemble `wanted`, which is not among them.

    One typing error leaves two thirds of a text unchanged. So, of two million texts, only those that share most thirds
    with `wanted` are compared letter by letter.
    """
    # Count how many thirds of the wanted text each text contains.
    third = max(1, -(-len(wanted) // 3))
    parts = [wanted[begin : begin + third].lower() for begin in range(0, len(wanted), third)]
    lowercase = pl.col("text").str.to_lowercase()
    shared = pl.sum_horizontal([lowercase.str.contains(part, literal=True).cast(pl.Int32) for part in parts])
    similar = texts.unique().to_frame("text").with_columns(shared=shared).filter(pl.col("shared") > 0)

    # Compare the most similar ones in full.
    most_similar = similar.sort("shared", "text", descending=[True, False])["text"].head(MAX_COMPARED_TEXTS)
    return difflib.get_close_matches(wanted, most_similar.to_list(), n=3, cutoff=0.5)
