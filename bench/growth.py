"""Time and memory as a set grows: building 1,000, 4,000 and 16,000 clips, and planning all of AudioSet.

    just bench growth [--clips 1000,4000,16000] [--rows 2084320] [--workers 2]

The builds are of 2 s clips of noise (mono wav at 32 kHz, 200 distinct files and hard links to them under AudioSet-like
names) with `a-jepa` shortened to 2 s, so that costs beside decoding show. The plan is of lists of AudioSet's three
sizes, of random ids, against as many names of files; the files do not exist, their names are put in the place of the
walk through the folders. Each line is a process of its own. Peaks of memory are the kernel's VmHWM, which counts the
mapped files of libraries (most of it torch); `own` is the worker's anonymous memory.
"""

import argparse
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import soundfile

from bench.machine import machine, memory_mb
from pipeline.audio import sources
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import (
    BuildBlocks,
    BuildOptions,
    StoreOutput,
    block_tasks,
    count_open_rows,
    plan_store,
)
from pipeline.build.prepare import create_store, mark_unfinished
from pipeline.build.shard_builder import StoreTarget
from pipeline.datasets import audioset
from pipeline.datasets.corpus import Corpus
from pipeline.files import WHOLE_BUILD
from pipeline.labels.ontology import load_class_list
from pipeline.labels.segment_lists import plan_segment_lists

T = TypeVar("T")

CLIP_SECONDS = 2.0

SPEC = replace(preset_mel_spec("a-jepa"), name="a-jepa, 2 s", clip_seconds=CLIP_SECONDS)

DISTINCT = 200

ROWS_BETWEEN_SAMPLES = 200  # of the workers' memory

LISTS = {"unbalanced_train": 2_041_789, "balanced_train": 22_160, "eval": 20_371}  # AudioSet's own

TARGET_SECONDS = 60  # for planning

TARGET_MB = 2_000

ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", "S1")


def random_ids(clips: int) -> np.ndarray:
    """Distinct ids like YouTube's, as bytes."""
    ids = np.random.default_rng(0).choice(ALPHABET, (clips + clips // 100 + 1, 11)).view("S11").ravel()
    return np.random.default_rng(1).permutation(np.unique(ids))[:clips]


def write_list(path: Path, ids: np.ndarray, end_seconds: float) -> None:
    """Write a segments list like AudioSet's, with two labels a clip."""
    head = "# Segments csv created for a benchmark\n# num_ytids=...\n# YTID, start_seconds, ...\n"
    rows = (f'{name}, 0.000, {end_seconds:.3f}, "/m/09x0r,/m/04rlf"\n' for name in ids.astype(str))
    path.write_text(head + "".join(rows))


def make_corpus(folder: Path, clips: int) -> Path:
    """Write sounds and their list; returns the folder of the sounds."""
    audio = folder / "audio"
    audio.mkdir()
    rng = np.random.default_rng(0)
    ids = random_ids(clips)
    for number in range(min(DISTINCT, clips)):
        first = audio / f"{ids[number].decode()}.wav"
        wave_S = 0.1 * rng.standard_normal(round(CLIP_SECONDS * SPEC.sample_rate_hz), dtype=np.float32)
        soundfile.write(first, wave_S, SPEC.sample_rate_hz, subtype="PCM_16")
        for linked_id in ids[number + DISTINCT :: DISTINCT]:
            os.link(first, audio / f"{linked_id.decode()}.wav")
    write_list(folder / "balanced_train_segments.csv", ids, CLIP_SECONDS)
    return audio


def build_line(clips: int, workers: int) -> str:
    """Build `clips` clips; returns a line of the table."""
    peaks_mb = [0.0]
    own_mb = [0.0]
    first_and_last = list[float]()  # times of the first row and the last

    def sample_memory(_: int, rows: Iterator[int]) -> Iterator[int]:
        for number, row in enumerate(rows):
            if not first_and_last:
                first_and_last.append(time.perf_counter())
            if number % ROWS_BETWEEN_SAMPLES == 0 or number == clips - 1:
                pids = [process.pid for process in mp.active_children() if process.pid]
                peaks_mb.extend(memory_mb(pid) for pid in pids)
                own_mb.extend(memory_mb(pid, "RssAnon") for pid in pids)
            yield row
        first_and_last.append(time.perf_counter())

    # Build.
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as scratch:
        folder = Path(scratch)
        corpus = audioset.audioset_corpus(
            [make_corpus(folder, clips)], [folder / "balanced_train_segments.csv"]
        )
        output = StoreOutput(path=folder / "out.zarr", spec=SPEC)
        layout = plan_store(corpus, output).layout
        began = time.perf_counter()
        manifest = build_store(corpus, output, BuildOptions(workers=workers), progress=sample_memory)
        ended = time.perf_counter()

    # The line.
    good = int((manifest["status"] == "good").sum())
    first, last = first_and_last
    return (
        f"{good:>9,}{f'{layout.shard_count} x {layout.shard_clips}':>12}"
        f"{1000 * (last - first) / clips:>12.2f}{ended - last:>12.2f}{ended - began:>10.1f}"
        f"{memory_mb():>9.0f}{max(peaks_mb):>9.0f}{max(own_mb):>9.0f}"
    )


class TimedStages:
    """Runs the stages of planning; `lines` has the times of each and the peak of memory after it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seconds = 0.0

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        """Run one stage; returns its result."""
        began = time.perf_counter()
        processor_began = time.process_time()
        result = work()
        seconds = time.perf_counter() - began
        processor_seconds = time.process_time() - processor_began
        self.seconds += seconds
        self.lines.append(f"  {name:<40}{seconds:8.1f} s{processor_seconds:9.1f} s{memory_mb():11,.0f} MB")
        return result


@contextmanager
def pretended_files(names: Iterator[str]) -> Iterator[None]:
    """Pretend that a folder holds these files."""
    with mock.patch.object(sources, "walk_sounds_and_archives", return_value=names):
        yield


def planning_lines(rows: int) -> list[str]:
    """Do all that a build of `rows` rows does before its first clip is decoded; returns the lines of the table."""
    stages = TimedStages()
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as scratch:
        # Lists of AudioSet's proportions.
        folder = Path(scratch)
        ids = random_ids(rows)
        paths = []
        first = 0
        for name, share in LISTS.items():
            last = rows if name == "eval" else first + round(share * rows / sum(LISTS.values()))
            paths.append(folder / f"{name}_segments.csv")
            write_list(paths[-1], ids[first:last], 10.0)
            first = last
        names = (f"{name[:2].decode()}/Y{name.decode()}.wav" for name in ids)
        stages.lines.append(f"  {'lists written, libraries imported':<40}{'':21}{memory_mb():11,.0f} MB")

        # Lists and files -> corpus -> header.
        plan, _ = stages("lists read", lambda: plan_segment_lists(paths))
        with pretended_files(names):
            matched = stages(
                "files matched (without the walk)", lambda: audioset.match_sounds_to_plan(plan, [folder])
            )
        settings = audioset.audioset_settings([folder], paths)
        corpus = Corpus(plan=plan, sources=matched, classes=load_class_list(), dataset_settings=settings)
        output = StoreOutput(path=folder / "out.zarr", spec=preset_mel_spec("a-jepa"))
        header = stages("header and plan id", lambda: plan_store(corpus, output))

        # Store and tasks.
        stages("empty store created", lambda: create_store(output.path, header, corpus))
        stores = [StoreTarget(path=output.path, header=header)]
        blocks = BuildBlocks.of_part([header], WHOLE_BUILD)
        counts = stages("open rows", lambda: count_open_rows(stores, corpus, blocks, None))
        stages("marked open", lambda: mark_unfinished(output.path, header, plan, counts, blocks))
        stages("first task", lambda: next(block_tasks(corpus, counts, blocks)))
    return [
        *stages.lines,
        f"  {rows:,} rows planned: {stages.seconds:.1f} s (under {TARGET_SECONDS} wanted), "
        f"{memory_mb():,.0f} MB ({TARGET_MB:,} wanted)",
    ]


def run_alone(work: Callable[..., T], *arguments: object) -> T:
    """The result of `work` in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", default="1000,4000,16000", help="sizes of the builds (1000,4000,16000)")
    parser.add_argument("--rows", type=int, default=sum(LISTS.values()), help="rows to plan (2084320)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (2)")
    options = parser.parse_args()
    print(machine("ajepa", "numpy", "polars", "pyarrow", "zarr", "torch"))

    # Builds.
    print(
        f"builds of {CLIP_SECONDS:g} s clips, {options.workers} workers; `ms a clip` from the first clip's trial on"
    )
    print(f"{'':21}{'':34}{'peak of memory, MB':^27}")
    time_heads = f"{'ms a clip':>12}{'finish, s':>12}{'whole, s':>10}"
    memory_heads = f"{'parent':>9}{'worker':>9}{'own':>9}"
    print(f"{'clips':>9}{'shards':>12}{time_heads}{memory_heads}")
    for clips in map(int, options.clips.split(",")):
        print(run_alone(build_line, clips, options.workers), flush=True)

    # Planning.
    print("planning: wall time, processor time, the peak of memory so far")
    print("\n".join(run_alone(planning_lines, options.rows)))


if __name__ == "__main__":
    main()
