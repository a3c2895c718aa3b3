"""A build foretold: how many clips, how large, how long; nothing is written."""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from pipeline.audio.decode import load_clip_audio
from pipeline.build.plan import BuildOptions, StoreOutput, plan_store
from pipeline.build.shard_builder import compute_stored_row
from pipeline.datasets.corpus import Corpus
from pipeline.errors import AudioError
from pipeline.store.header import StoreHeader

TIMED_CLIPS = 48  # clips timed

UNMATCHED_EXAMPLES = 5


def describe_dry_run(
    corpus: Corpus, outputs: Sequence[StoreOutput], options: BuildOptions, *, seed: int = 0
) -> str:
    """What `build_stores` would do with the same arguments, as text; some clips are decoded to time it."""
    headers = [plan_store(corpus, output) for output in outputs]
    there = corpus.sources.frame["kind"].is_not_null()
    lines = [*_split_count_lines(corpus, there), *corpus.notes, ""]
    clips = int((there & corpus.plan["duplicate"].is_null()).sum())
    for output, header in zip(outputs, headers, strict=True):
        size = clips * header.layout.clip_bytes
        state = "continues" if output.path.exists() else "new"
        lines.append(
            f"{output.location} ({state}): {header.spec.name} {output.dtype}, {header.layout.shard_count:,} shards, "
            f"up to {_describe_size(size)}; {_describe_size(_free_disk_bytes(output.path))} free"
        )
    return "\n".join([*lines, *_timing_lines(corpus, headers, options, clips, seed)])


def _split_count_lines(corpus: Corpus, has_sound: pl.Series) -> list[str]:
    frame = corpus.plan.select("split", "duplicate").with_columns(there=has_sound)
    lines = [f"{'split':<24}{'listed':>12}{'with sound':>12}{'duplicate':>12}"]
    for (split,), part in frame.group_by("split", maintain_order=True):
        duplicate = part["duplicate"].is_not_null()
        found = int((part["there"] & ~duplicate).sum())
        lines.append(f"{split!s:<24}{part.height:>12,}{found:>12,}{int(duplicate.sum()):>12,}")
    unmatched = corpus.sources.unmatched_sources
    if unmatched:
        some = ", ".join(unmatched[:UNMATCHED_EXAMPLES])
        lines.append(
            f"{len(unmatched):,} of {corpus.sources.sound_count:,} sounds match no row, such as {some}"
        )
    if other := corpus.sources.other_segment_sources:
        some = ", ".join(other[:UNMATCHED_EXAMPLES])
        lines.append(f"{len(other):,} are of a listed video but of another segment, such as {some}")
    return lines


def _timing_lines(
    corpus: Corpus, headers: Sequence[StoreHeader], options: BuildOptions, clips: int, seed: int
) -> list[str]:
    """Decode a few clips on this core, as the build would, and count."""
    rows_N = np.flatnonzero(
        (corpus.sources.frame["kind"].is_not_null() & corpus.plan["duplicate"].is_null()).to_numpy()
    )
    if not len(rows_N):
        return ["nothing to decode"]
    drawn_N = np.sort(np.random.default_rng(seed).permutation(rows_N)[:TIMED_CLIPS])
    torch.set_num_threads(1)  # as a worker has it
    reasons: Counter[str] = Counter()
    seconds_N = [_time_row_seconds(corpus, headers, options, int(row), reasons) for row in drawn_N]
    mean_seconds = float(np.mean(seconds_N[1:] or seconds_N))  # the first one also builds the filters
    total_seconds = clips * mean_seconds / max(1, options.workers)
    said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none failed"
    return [
        f"{len(drawn_N)} clips tried: {1000 * mean_seconds:.1f} ms a clip on one core; {said}",
        f"{clips:,} clips on {options.workers} workers: about {_describe_duration(total_seconds)}, if there are as many cores",
    ]


def _time_row_seconds(
    corpus: Corpus, headers: Sequence[StoreHeader], options: BuildOptions, row: int, reasons: Counter[str]
) -> float:
    fact = corpus.plan.row(row, named=True)
    (locator,) = corpus.sources.locators_of_rows(range(row, row + 1))
    assert locator is not None
    began = time.perf_counter()
    try:
        audio = load_clip_audio(
            locator,
            start_seconds=fact["start_seconds"],
            end_seconds=fact["end_seconds"],
            policy=options.policy,
        )
        for header in headers:
            compute_stored_row(audio, header)
    except AudioError as error:
        reasons[error.reason] += 1
    return time.perf_counter() - began


def _free_disk_bytes(path: Path) -> int:
    absolute = path.absolute()
    folder = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    return shutil.disk_usage(folder).free


def _describe_size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _describe_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3600:.1f} h"
