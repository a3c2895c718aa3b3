"""A store, or one clip of it, told in lines of text."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import StoreError
from pipeline.labels.ontology import name_with_id
from pipeline.report.spectrograms import draw_clip_rows
from pipeline.store import summary
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import FAILURE_REASONS, nearest_clip_ids
from pipeline.store.shards import ABSENT_OFFSET, read_shard_index, shard_path

MAX_PICTURED_ROWS = 12  # rows that one picture can hold


def describe_store(store: FeatureStore) -> str:
    """What a store is and how much of it is good."""
    spec, layout, seen = store.spec, store.header.layout, summary.ClipCoverage.from_manifest(store.manifest)
    labels, sources = summary.read_label_table(store)
    numbers = ", ".join(f"{key} {value}" for key, value in spec.to_json().items() if key != "name")
    stored = summary.format_bytes(summary.stored_mel_bytes(store))
    facts = [
        ("store", f"{store.store_id} (plan {store.header.plan_id})"),
        ("mel spec", f"{spec.name} ({spec.spec_id}): {numbers}"),
        ("mel", f"{layout.clips:,} clips of {layout.frames} frames of {layout.bands} bands, {layout.dtype}"),
        ("value", f"{store.offset:g} + {store.scale:g} x stored, nat"),
        ("stored", f"{stored} in {layout.shard_count:,} shards of {layout.shard_clips} clips"),
        ("good", f"{sum(seen.good_counts):,} of {sum(seen.listed_counts):,}"),
    ]
    per_split = zip(seen.splits, seen.good_counts, seen.listed_counts, strict=True)
    facts += [(f"  {split}", f"{good:,} of {listed:,}") for split, good, listed in per_split]
    facts += [
        ("excluded", f"{clips:,} clips by {name} (sha256 {sha256[:12]})")
        for name, sha256, clips in store.exclusions.summarise_lists()
    ]
    facts += [("classes", f"{len(store.classes)}")]
    for name, source in sources.items():
        mean = labels[name].list.len().sum() / max(labels.height, 1)
        facts += [(f"labels {name}", f"{mean:.3f} a row; {source}")]
    return _align_facts(facts)


def find_clip_rows(store: FeatureStore, clip_id: str) -> list[int]:
    """Every row of an id; raises StoreError with the nearest ids where there is none."""
    rows = store.manifest.select(pl.col("clip_id") == clip_id).to_series().arg_true().to_list()
    if rows:
        return rows
    near = nearest_clip_ids(store.manifest["clip_id"], clip_id)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "ids stand in its manifest.parquet"
    raise StoreError(f"{store.location}: no clip {clip_id!r}; {hint}")


def select_clip_rows(store: FeatureStore, clip_id: str | None, row: int | None) -> list[int]:
    """The rows of an id, or that one of them, or the row of any; raises StoreError where there is none."""
    rows = range(store.manifest.height) if clip_id is None else find_clip_rows(store, clip_id)
    if row is None:
        return list(rows)
    if row not in rows:
        there = (
            f"0 to {len(rows) - 1}" if clip_id is None else f"{', '.join(map(str, rows[:MAX_PICTURED_ROWS]))}"
        )
        whose = "" if clip_id is None else f" of clip {clip_id!r}"
        raise StoreError(f"{store.location}: no row {row}{whose}; it has {there}")
    return [row]


def describe_rows(store: FeatureStore, rows: Sequence[int]) -> str:
    """Everything that is known of some rows, one block each."""
    labels = summary.read_label_table(store)[0]
    return "\n\n".join(_align_facts(_row_facts(store, labels, row)) for row in rows)


def _row_facts(store: FeatureStore, labels: pl.DataFrame, row: int) -> Iterator[tuple[str, str]]:
    clip = store.manifest.row(row, named=True)
    yield "clip", clip["clip_id"]
    yield "row", f"{row:,}"
    yield "split", clip["split"]
    yield "segment", f"{_format_seconds(clip['start_seconds'])} to {_format_seconds(clip['end_seconds'])} s"
    yield "source", clip["source"] or "none"
    yield "status", clip["status"]
    if clip["status"] == "good":
        yield "flags", ", ".join(clip["flags"]) or "none"
        yield "sound", _describe_sound(clip)
        yield "level", f"peak {clip['peak_dbfs']:.1f} dBFS, rms {clip['rms_dbfs']:.1f} dBFS"
        yield "frames", f"{clip['n_frames']} valid of {store.frames}"
        yield "stored error", f"{clip['error_rms_nat']:.2g} nat rms, {clip['error_max_nat']:.2g} at most"
        yield "digest", clip["digest"]
    else:
        yield (
            "reason",
            f"{clip['reason']}: {FAILURE_REASONS.get(clip['reason'], 'not known to this version')}",
        )
        yield "detail", clip["detail"] or "none"
    if by := store.exclusions.lists_excluding(store.manifest[row]):
        yield "excluded", f"by {', '.join(by)}"
    yield "stored", describe_location(store, row)
    yield from _label_facts(store, labels, row)


def _describe_sound(clip: dict[str, Any]) -> str:
    channels = "1 channel" if clip["channels"] == 1 else f"{clip['channels']} channels"
    return f"{clip['codec']}, {clip['rate_hz']:,} Hz, {channels}, {clip['seconds']:.3f} s"


def _label_facts(store: FeatureStore, labels: pl.DataFrame, row: int) -> Iterator[tuple[str, str]]:
    """The names in every label set; `+` marks what is added to the raw ones."""
    raw = labels["raw"][row].to_list()
    for name in summary.label_set_names(labels):
        listed = labels[name][row].to_list()
        words = [("" if index in raw else "+ ") + store.classes.names[index] for index in listed]
        yield f"labels {name}", "; ".join(words) or "none"
    if odd := labels["outside"][row].to_list():
        yield "labels outside the class list", "; ".join(map(name_with_id, odd))


def describe_location(store: FeatureStore, row: int) -> str:
    """The file and the bytes that hold a row's spectrogram; raises StoreError where its shard is damaged."""
    layout = store.header.layout
    shard, chunk = divmod(row, layout.shard_clips)
    path = store.local_shard_path(shard)
    where = f"shard {shard}, clip {chunk} of it"
    if not path.exists():
        return f"{where}: not there"
    with path.open("rb") as file:
        try:
            offset, size = read_shard_index(file.fileno(), layout.shard_clips)[chunk].tolist()
        except ValueError as error:
            raise StoreError(f"{path}: {error}; run: ajepa-data verify {store.location}") from None
    if offset == ABSENT_OFFSET:
        return f"{where}: not there"
    return f"{where}: {size:,} bytes from {offset:,} on in {shard_path(Path(), shard)}"


def write_rows_picture(store: FeatureStore, rows: Sequence[int], path: Path) -> None:
    """A PNG of the good ones of some rows; raises StoreError where none is good, or too many are."""
    failed = store.manifest.select("clip_id", "status", "reason")[list(rows)]
    good = [row for row, status in zip(rows, failed["status"], strict=True) if status == "good"]
    if not good:
        clip_id, _, reason = failed.row(0)
        raise StoreError(
            f"{store.location}: no picture of clip {clip_id!r}, it is not good: {reason} ({FAILURE_REASONS.get(reason, '')})"
        )
    if len(good) > MAX_PICTURED_ROWS:
        raise StoreError(
            f"{store.location}: {len(good)} rows are too many for a picture; choose one with --row"
        )
    draw_clip_rows(store, good, path)


def _format_seconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:,.3f}"


def _align_facts(facts: Iterable[tuple[str, str]]) -> str:
    """Names to the left, aligned."""
    facts = list(facts)
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name.ljust(width)}{value}" for name, value in facts)
