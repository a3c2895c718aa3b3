"""A dry run: how many clips a build would decode, how large its stores and how long it would take; writes nothing."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.audio.decode import load_clip_audio
from pipeline.build.plan import BuildOptions, StoreOutput, note_rows_beyond_clips, plan_store
from pipeline.build.shard_builder import PlannedClip, compute_stored_row
from pipeline.datasets.corpus import Corpus
from pipeline.errors import AudioError
from pipeline.store.header import StoreHeader

TIMED_CLIPS = 48

MAX_EXAMPLES = 5  # shown sounds that match no row


def describe_dry_run(
    corpus: Corpus, outputs: Sequence[StoreOutput], options: BuildOptions, *, seed: int = 0
) -> str:
    """Describe as text what `build_stores` would do with these arguments; `seed` draws the clips that are timed."""
    return prepare_dry_run(corpus, outputs, options, seed=seed)()


def prepare_dry_run(
    corpus: Corpus, outputs: Sequence[StoreOutput], options: BuildOptions, *, seed: int = 0
) -> Callable[[], str]:
    """Return a function that does the rest of `describe_dry_run`: decoding, which needs PyTorch but not the corpus."""
    # Clips.
    has_sound = corpus.sources.frame["kind"].is_not_null()
    notes = [*corpus.notes, *note_rows_beyond_clips(corpus, outputs)]
    lines = [*_split_count_lines(corpus, has_sound), *notes, ""]
    rows_N = np.flatnonzero((has_sound & corpus.plan["duplicate"].is_null()).to_numpy())

    # Bytes.
    headers = [plan_store(corpus, output) for output in outputs]
    for output, header in zip(outputs, headers, strict=True):
        size = len(rows_N) * header.layout.clip_bytes
        state = "continues" if output.path.exists() else "new"
        lines.append(
            f"{output.location} ({state}): {header.spec.name} {output.dtype}, {header.layout.shard_count:,} shards, "
            f"up to {_describe_size(size)}; {_describe_size(_free_disk_bytes(output.path))} free"
        )

    # Time.
    drawn_N = draw_timed_rows(corpus.sources.frame, rows_N, seed) if len(rows_N) else rows_N
    clips = [_timed_clip(corpus, row) for row in drawn_N.tolist()]
    return lambda: "\n".join([*lines, *_timing_lines(clips, len(rows_N), headers, options)])


def _split_count_lines(corpus: Corpus, has_sound: pl.Series) -> list[str]:
    """Return a table of the clips of each split, then the sounds that match no row."""
    frame = corpus.plan.select("split", "duplicate").with_columns(has_sound=has_sound)
    lines = [f"{'split':<24}{'listed':>12}{'with sound':>12}{'duplicate':>12}"]
    for (split,), clips in frame.group_by("split", maintain_order=True):
        is_duplicate = clips["duplicate"].is_not_null()
        with_sound = int((clips["has_sound"] & ~is_duplicate).sum())
        lines.append(f"{split!s:<24}{clips.height:>12,}{with_sound:>12,}{int(is_duplicate.sum()):>12,}")

    # Sounds that match no row are often a sign of a wrong folder or list.
    counts = corpus.sound_counts
    if unmatched := counts["unmatched_files"]:
        examples = ", ".join(counts["unmatched_examples"][:MAX_EXAMPLES])
        lines.append(f"{unmatched:,} of {counts['audio_files']:,} sounds match no row, such as {examples}")
    if other_segments := counts["other_start_files"]:
        examples = ", ".join(counts["other_start_examples"][:MAX_EXAMPLES])
        lines.append(f"{other_segments:,} are of a listed video but of another segment, such as {examples}")
    return lines


def _timed_clip(corpus: Corpus, row: int) -> PlannedClip:
    """Return the clip of a row that has a sound."""
    times = corpus.plan.select("split", "start_seconds", "end_seconds").row(row, named=True)
    (locator,) = corpus.sources.locators_of_rows(range(row, row + 1))
    return PlannedClip(row=row, locator=locator, duplicate=None, **times)


def _timing_lines(
    clips: Sequence[PlannedClip], clip_count: int, headers: Sequence[StoreHeader], options: BuildOptions
) -> list[str]:
    """Decode clips on one core, as a worker would; returns their mean time and the time of all `clip_count`."""
    if not clips:
        return ["nothing to decode"]

    # Time a sample. The first clip also builds the mel filters, so it is left out of the mean.
    import torch

    torch.set_num_threads(1)
    failures: Counter[str] = Counter()
    seconds_N = [_time_clip_seconds(clip, headers, options, failures) for clip in clips]
    mean_seconds = float(np.mean(seconds_N[1:] or seconds_N))

    # Extrapolate.
    total_seconds = clip_count * mean_seconds / max(1, options.workers)
    failure_counts = ", ".join(f"{count} {reason}" for reason, count in sorted(failures.items()))
    return [
        f"{len(clips)} clips tried: {1000 * mean_seconds:.1f} ms a clip on one core; "
        f"{failure_counts or 'none failed'}",
        f"{clip_count:,} clips on {options.workers} workers: about {_describe_duration(total_seconds)}, "
        "if there are as many cores",
    ]


def draw_timed_rows(sources: pl.DataFrame, rows_N: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows to time, at most TIMED_CLIPS of `rows_N`: any rows, but of Parquet files rows in a run.

    A build reads the rows of a Parquet file in their order, each row group once. A row that is drawn alone would read
    its row group again.
    """
    # How many of the rows are in Parquet files.
    drawn_N = np.random.default_rng(seed).permutation(rows_N)[:TIMED_CLIPS]
    in_parquet_N = (sources["kind"][drawn_N] == "parquet").to_numpy()
    if not in_parquet_N.any():
        return np.sort(drawn_N)

    # As many in the order of the files, from the first one that was drawn on; at the end, those before it.
    places = sources.select("kind", "path", "group", "row", number=pl.int_range(pl.len()))[rows_N]
    ordered = places.filter(pl.col("kind") == "parquet").sort("path", "group", "row")["number"].to_numpy()
    first = int(np.flatnonzero(ordered == drawn_N[in_parquet_N][0])[0])
    count = int(in_parquet_N.sum())
    first = max(0, min(first, len(ordered) - count))
    return np.concatenate([ordered[first : first + count], np.sort(drawn_N[~in_parquet_N])])


def _time_clip_seconds(
    clip: PlannedClip, headers: Sequence[StoreHeader], options: BuildOptions, failures: Counter[str]
) -> float:
    """Return the seconds that it takes to decode a clip and transform it for every store; counts the failure reason."""
    assert clip.locator is not None
    began = time.perf_counter()
    try:
        audio = load_clip_audio(
            clip.locator,
            start_seconds=clip.start_seconds,
            end_seconds=clip.end_seconds,
            policy=options.policy,
        )
        for header in headers:
            compute_stored_row(audio, header)
    except AudioError as error:
        failures[error.reason] += 1
    return time.perf_counter() - began


def _free_disk_bytes(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist yet."""
    absolute = path.absolute()
    folder = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    return shutil.disk_usage(folder).free


def _describe_size(size: int) -> str:
    if size < 2**30:
        return f"{size / 2**20:,.1f} MiB"
    return f"{size / 2**30:,.1f} GiB"


def _describe_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
