"""A build foretold: how many clips, how large, how long; nothing is written."""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from pipeline.audio.decode import load
from pipeline.build.plan import Build, Output, plan_store
from pipeline.build.shard_builder import spectrogram
from pipeline.datasets.corpus import Corpus
from pipeline.errors import AudioError
from pipeline.store.header import Header

SAMPLE = 48  # clips timed

UNMATCHED_SHOWN = 5


def forecast(corpus: Corpus, outputs: Sequence[Output], build: Build, *, seed: int = 0) -> str:
    """What `build_stores` would do with the same arguments, as text; some clips are decoded to time it."""
    headers = [plan_store(corpus, output) for output in outputs]
    there = corpus.sources.frame["kind"].is_not_null()
    lines = [*_counts(corpus, there), *corpus.notes, ""]
    clips = int((there & corpus.plan["duplicate"].is_null()).sum())
    for output, header in zip(outputs, headers, strict=True):
        size = clips * header.layout.clip_bytes
        state = "continues" if output.path.exists() else "new"
        lines.append(
            f"{output.place} ({state}): {header.spec.name} {output.dtype}, {header.layout.shards:,} shards, "
            f"up to {_bytes(size)}; {_bytes(_free(output.path))} free"
        )
    return "\n".join([*lines, *_time(corpus, headers, build, clips, seed)])


def _counts(corpus: Corpus, there: pl.Series) -> list[str]:
    frame = corpus.plan.select("split", "duplicate").with_columns(there=there)
    lines = [f"{'split':<24}{'listed':>12}{'with sound':>12}{'duplicate':>12}"]
    for (split,), part in frame.group_by("split", maintain_order=True):
        duplicate = part["duplicate"].is_not_null()
        found = int((part["there"] & ~duplicate).sum())
        lines.append(f"{split!s:<24}{part.height:>12,}{found:>12,}{int(duplicate.sum()):>12,}")
    unmatched = corpus.sources.unmatched
    if unmatched:
        some = ", ".join(unmatched[:UNMATCHED_SHOWN])
        lines.append(f"{len(unmatched):,} of {corpus.sources.files:,} sounds match no row, such as {some}")
    if other := corpus.sources.other_start:
        some = ", ".join(other[:UNMATCHED_SHOWN])
        lines.append(f"{len(other):,} are of a listed video but of another segment, such as {some}")
    return lines


def _time(corpus: Corpus, headers: Sequence[Header], build: Build, clips: int, seed: int) -> list[str]:
    """Decode a few clips on this core, as the build would, and count."""
    rows_N = np.flatnonzero(
        (corpus.sources.frame["kind"].is_not_null() & corpus.plan["duplicate"].is_null()).to_numpy()
    )
    if not len(rows_N):
        return ["nothing to decode"]
    drawn_N = np.sort(np.random.default_rng(seed).permutation(rows_N)[:SAMPLE])
    torch.set_num_threads(1)  # as a worker has it
    reasons: Counter[str] = Counter()
    seconds_N = [_seconds(corpus, headers, build, int(row), reasons) for row in drawn_N]
    mean_seconds = float(np.mean(seconds_N[1:] or seconds_N))  # the first one also builds the filters
    total_seconds = clips * mean_seconds / max(1, build.workers)
    said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none failed"
    return [
        f"{len(drawn_N)} clips tried: {1000 * mean_seconds:.1f} ms a clip on one core; {said}",
        f"{clips:,} clips on {build.workers} workers: about {_duration(total_seconds)}, if there are as many cores",
    ]


def _seconds(
    corpus: Corpus, headers: Sequence[Header], build: Build, row: int, reasons: Counter[str]
) -> float:
    fact = corpus.plan.row(row, named=True)
    (locator,) = corpus.sources.locators(range(row, row + 1))
    assert locator is not None
    began = time.perf_counter()
    try:
        audio = load(
            locator,
            start_seconds=fact["start_seconds"],
            end_seconds=fact["end_seconds"],
            policy=build.policy,
        )
        for header in headers:
            spectrogram(audio, header)
    except AudioError as error:
        reasons[error.reason] += 1
    return time.perf_counter() - began


def _free(path: Path) -> int:
    absolute = path.absolute()
    folder = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    return shutil.disk_usage(folder).free


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3600:.1f} h"
