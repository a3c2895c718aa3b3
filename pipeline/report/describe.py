"""A store, or some rows of it, described in lines of text; and a picture of these rows."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import StoreError
from pipeline.labels.ontology import UNLABELLED_CLASSES, name_with_id
from pipeline.report.durations import format_duration, good_seconds_by_split
from pipeline.store import summary
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import FAILURE_REASONS, nearest_texts
from pipeline.store.shards import ABSENT_OFFSET, read_shard_index, shard_path

MAX_PICTURED_ROWS = 12


def describe_store(store: FeatureStore) -> str:
    """Describe a store, one line per fact: identity, layout, good clips of each split, labels."""
    spec = store.spec
    layout = store.header.layout
    coverage = summary.ClipCoverage.from_store(store)
    labels, label_sources = summary.read_label_table(store)

    # Identity and layout.
    numbers = ", ".join(f"{key} {value}" for key, value in spec.to_json().items() if key != "name")
    stored_bytes = summary.format_bytes(summary.stored_mel_bytes(store))
    facts = [
        ("store", f"{store.store_id} (plan {store.header.plan_id})"),
        ("mel spec", f"{spec.name} ({spec.spec_id}): {numbers}"),
        ("mel", f"{layout.clips:,} clips of {layout.frames} frames of {layout.bands} bands, {layout.dtype}"),
        ("value", f"{store.offset:g} + {store.scale:g} x stored, nat"),
        ("stored", f"{stored_bytes} in {layout.shard_count:,} shards of {layout.shard_clips} clips"),
    ]

    # Which of its clips are good, by split, how long they are, and which are excluded.
    seconds = good_seconds_by_split(store)
    duration = format_duration(sum(seconds.values()))
    facts.append(("good", f"{sum(coverage.good_counts):,} of {sum(coverage.listed_counts):,}, {duration}"))
    counts = zip(coverage.splits, coverage.good_counts, coverage.listed_counts, strict=True)
    facts += [
        (f"  {split}", f"{good:,} of {listed:,}, {format_duration(seconds.get(split, 0.0))}")
        for split, good, listed in counts
    ]
    if any(coverage.failed_counts):
        reasons = ", ".join(f"{reason} {sum(counts):,}" for reason, counts in coverage.reason_counts.items())
        facts.append(("failed", f"{sum(coverage.failed_counts):,} ({reasons}); --failed lists them"))
    for name, sha256, clips in store.exclusions.summarise_lists():
        facts.append(("excluded", f"{clips:,} clips by {name} (sha256 {sha256[:12]})"))

    # Classes and label sets.
    facts.append(("classes", f"{len(store.classes)}" if store.classes != UNLABELLED_CLASSES else "none"))
    for name, source in label_sources.items():
        labels_per_row = labels[name].list.len().sum() / max(labels.height, 1)
        facts.append((f"labels {name}", f"{labels_per_row:.3f} a row; {source}"))
    return _align_facts(facts)


def find_clip_rows(store: FeatureStore, clip_id: str) -> list[int]:
    """Every row of a clip id, or else of the clips of a file or of the pieces of a clip.

    StoreError with the nearest ids if there is none.
    """
    clips = store.manifest_columns("clip_id", "source")
    ids = clips["clip_id"]
    rows = (ids == clip_id).arg_true().to_list()
    if not rows:
        # The pieces of a clip have its id, @ and their start in milliseconds.
        is_piece = ids.str.starts_with(f"{clip_id}@") & ids.str.contains(r"@[0-9]+$")
        rows = (is_piece | (clips["source"] == clip_id).fill_null(False)).arg_true().to_list()
    if not rows:
        nearest = nearest_texts(ids, clip_id)
        hint = "its manifest.parquet lists all ids"
        if nearest:
            hint = f"did you mean {' or '.join(map(repr, nearest))}?"
        raise StoreError(f"{store.location}: no clip {clip_id!r}; {hint}")
    return rows


def failed_clips(store: FeatureStore) -> pl.DataFrame:
    """The failed clips in the order of the store: row, clip_id, split, source, reason, detail."""
    columns = ("clip_id", "split", "source", "reason", "detail")
    clips = store.manifest_columns("status", *columns).with_row_index("row")
    return clips.filter(pl.col("status") == "failed").select("row", *columns)


def failed_clip_lines(failed: pl.DataFrame) -> Iterator[str]:
    """Yield a line for each of the clips that `failed_clips` returns, with its reason and, if known, the detail."""
    for clip_id, reason, detail in failed.select("clip_id", "reason", "detail").iter_rows():
        yield f"{clip_id}: {reason}" + (f", {detail}" if detail else "")


def select_clip_rows(store: FeatureStore, clip_id: str | None, row: int | None) -> list[int]:
    """All rows of a clip id, or only `row` among them; without a clip id, `row` of the store, or all its rows.

    StoreError if there is no such row.
    """
    rows = range(store.header.layout.clips) if clip_id is None else find_clip_rows(store, clip_id)
    if row is None:
        return list(rows)

    # One row: it must be among them.
    if row in rows:
        return [row]

    if clip_id is None:
        raise StoreError(f"{store.location}: no row {row}; it has 0 to {len(rows) - 1}")
    first_rows = ", ".join(map(str, rows[:MAX_PICTURED_ROWS]))
    raise StoreError(f"{store.location}: no row {row} of clip {clip_id!r}; it has {first_rows}")


def describe_rows(store: FeatureStore, rows: Sequence[int]) -> str:
    """Describe some rows with all facts that the store has; one block per row, with blank lines between blocks."""
    labels = summary.read_label_table(store)[0]
    clips = store.manifest_rows(rows)
    blocks = (_row_facts(store, labels, row, clips[index]) for index, row in enumerate(rows))
    return "\n\n".join(map(_align_facts, blocks))


def _row_facts(
    store: FeatureStore, labels: pl.DataFrame, row: int, manifest_row: pl.DataFrame
) -> Iterator[tuple[str, str]]:
    # The clip.
    clip = manifest_row.row(0, named=True)
    yield "clip", clip["clip_id"]
    yield "row", f"{row:,}"
    yield "split", clip["split"]
    yield "segment", f"{_format_seconds(clip['start_seconds'])} to {_format_seconds(clip['end_seconds'])} s"
    yield "source", clip["source"] or "none"
    yield "status", clip["status"]

    # Its sound, or the reason of its failure.
    if clip["status"] == "good":
        yield "flags", ", ".join(clip["flags"]) or "none"
        yield "sound", _describe_sound(clip)
        yield "level", f"peak {clip['peak_dbfs']:.1f} dBFS, rms {clip['rms_dbfs']:.1f} dBFS"
        yield "frames", f"{clip['n_frames']} valid of {store.frames}"
        yield "stored error", f"{clip['error_rms_nat']:.2g} nat rms, {clip['error_max_nat']:.2g} at most"
        yield "digest", clip["digest"]
    else:
        meaning = FAILURE_REASONS.get(clip["reason"], "not known to this version")
        yield "reason", f"{clip['reason']}: {meaning}"
        yield "detail", clip["detail"] or "none"

    # Its exclusions, its place on disk and its labels.
    if excluding_lists := store.exclusions.lists_excluding(manifest_row):
        yield "excluded", f"by {', '.join(excluding_lists)}"
    yield "stored", describe_location(store, row)
    yield from _label_facts(store, labels, row)


def _describe_sound(clip: dict[str, Any]) -> str:
    channels = "1 channel" if clip["channels"] == 1 else f"{clip['channels']} channels"
    return f"{clip['codec']}, {clip['rate_hz']:,} Hz, {channels}, {clip['seconds']:.3f} s"


def _label_facts(store: FeatureStore, labels: pl.DataFrame, row: int) -> Iterator[tuple[str, str]]:
    """Yield the names of a row's labels in every label set; `+` marks labels that the raw set does not have."""
    raw = labels["raw"][row].to_list()
    for label_set in summary.label_set_names(labels):
        names = [
            store.classes.names[index] if index in raw else f"+ {store.classes.names[index]}"
            for index in labels[label_set][row].to_list()
        ]
        yield f"labels {label_set}", "; ".join(names) or "none"
    if outside := labels["outside"][row].to_list():
        yield "labels outside the class list", "; ".join(map(name_with_id, outside))


def describe_location(store: FeatureStore, row: int) -> str:
    """The file of a row's spectrogram, and its bytes in the file; StoreError if the shard is damaged."""
    layout = store.header.layout
    shard, place_in_shard = divmod(row, layout.shard_clips)

    # A shard without a good clip has no file.
    path = store.local_shard_path(shard)
    location = f"shard {shard}, clip {place_in_shard} of it"
    if not path.exists():
        return f"{location}: not there"

    # The shard's index has the offset and size of each clip.
    with path.open("rb") as file:
        try:
            index = read_shard_index(file.fileno(), layout.shard_clips)
        except ValueError as error:
            raise StoreError(f"{path}: {error}; run: ajepa-data verify {store.location}") from None
    offset, size = index[place_in_shard].tolist()
    if offset == ABSENT_OFFSET:
        return f"{location}: not there"
    return f"{location}: {size:,} bytes from {offset:,} on in {shard_path(Path(), shard)}"


def write_rows_picture(store: FeatureStore, rows: Sequence[int], path: Path) -> None:
    """Write a PNG of the good rows among `rows`; StoreError if no row is good, or more than MAX_PICTURED_ROWS are."""
    clips = store.manifest_columns("clip_id", "status", "reason")[list(rows)]
    good_rows = [row for row, status in zip(rows, clips["status"], strict=True) if status == "good"]
    if not good_rows:
        clip_id, _, reason = clips.row(0)
        failure = f"it is not good: {reason} ({FAILURE_REASONS.get(reason, '')})"
        raise StoreError(f"{store.location}: no picture of clip {clip_id!r}, {failure}")
    if len(good_rows) > MAX_PICTURED_ROWS:
        raise StoreError(
            f"{store.location}: {len(good_rows)} rows are too many for a picture of at most {MAX_PICTURED_ROWS}; "
            "choose one with --row"
        )

    # The picture needs torch and matplotlib, which take seconds to load; the text does not.
    from pipeline.report.spectrograms import draw_clip_rows

    draw_clip_rows(store, good_rows, path)


def _format_seconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:,.3f}"


def _align_facts(facts: Iterable[tuple[str, str]]) -> str:
    """A line for each name and value, with the values aligned in one column."""
    facts = list(facts)
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name.ljust(width)}{value}" for name, value in facts)
