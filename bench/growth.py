"""What grows with a set, and what must not: building 1,000, 4,000 and 16,000 clips, planning all of AudioSet.

    just bench growth [--clips 1000,4000,16000] [--rows 2084320] [--workers 2]

Built are 2 s clips of noise (mono wav at 32 kHz, 200 distinct files, hard links of these under AudioSet-like names)
with `a-jepa` shortened to 2 s, so that what is not decoding shows. Planned are lists of AudioSet's three sizes, of
random ids, against as many names of files: the walk through the folders is made up, for two million files are not
made to be looked at once. Each line is a process of its own. Peaks of memory are the kernel's VmHWM, which counts the
libraries' files that are mapped (most of it torch); `own` is the worker's anonymous memory.
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
from pipeline.datasets import audioset
from pipeline.datasets.corpus import Corpus
from pipeline.files import WHOLE_BUILD
from pipeline.labels.ontology import load_class_list
from pipeline.labels.segment_lists import plan_segment_lists

T = TypeVar("T")

CLIP_SECONDS = 2.0

SPEC = replace(preset_mel_spec("a-jepa"), name="a-jepa, 2 s", clip_seconds=CLIP_SECONDS)

DISTINCT = 200

ROWS_BETWEEN_LOOKS = 200  # at the memory of the workers

LISTS = {"unbalanced_train": 2_041_789, "balanced_train": 22_160, "eval": 20_371}  # AudioSet's own

TARGET_SECONDS, TARGET_MB = 60, 2_000

ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", "S1")


def random_ids(clips: int) -> np.ndarray:
    """Different names like YouTube's, as bytes."""
    ids = np.random.default_rng(0).choice(ALPHABET, (clips + clips // 100 + 1, 11)).view("S11").ravel()
    return np.random.default_rng(1).permutation(np.unique(ids))[:clips]


def write_list(path: Path, ids: np.ndarray, end_seconds: float) -> None:
    """A segments list as AudioSet has them, two labels a clip."""
    head = "# Segments csv created for a benchmark\n# num_ytids=...\n# YTID, start_seconds, ...\n"
    rows = (f'{name}, 0.000, {end_seconds:.3f}, "/m/09x0r,/m/04rlf"\n' for name in ids.astype(str))
    path.write_text(head + "".join(rows))


def make_corpus(folder: Path, clips: int) -> Path:
    """Sounds and their list."""
    audio, rng = folder / "audio", np.random.default_rng(0)
    audio.mkdir()
    ids = random_ids(clips)
    for number in range(min(DISTINCT, clips)):
        first = audio / f"{ids[number].decode()}.wav"
        wave_S = 0.1 * rng.standard_normal(round(CLIP_SECONDS * SPEC.sample_rate_hz), dtype=np.float32)
        soundfile.write(first, wave_S, SPEC.sample_rate_hz, subtype="PCM_16")
        for other in ids[number + DISTINCT :: DISTINCT]:
            os.link(first, audio / f"{other.decode()}.wav")
    write_list(folder / "balanced_train_segments.csv", ids, CLIP_SECONDS)
    return audio


def build_line(clips: int, workers: int) -> str:
    """Build so many clips; what it took."""
    peaks, own, marks = [0.0], [0.0], list[float]()

    def watched(_: int, rows: Iterator[int]) -> Iterator[int]:
        for number, row in enumerate(rows):
            if not marks:
                marks.append(time.perf_counter())
            if number % ROWS_BETWEEN_LOOKS == 0 or number == clips - 1:
                pids = [process.pid for process in mp.active_children() if process.pid]
                peaks.extend(memory_mb(pid) for pid in pids)
                own.extend(memory_mb(pid, "RssAnon") for pid in pids)
            yield row
        marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="bench-growth-") as scratch:
        folder = Path(scratch)
        corpus = audioset.audioset_corpus(
            [make_corpus(folder, clips)], [folder / "balanced_train_segments.csv"]
        )
        output = StoreOutput(path=folder / "out.zarr", spec=SPEC)
        layout = plan_store(corpus, output).layout
        began = time.perf_counter()
        manifest = build_store(corpus, output, BuildOptions(workers=workers), progress=watched)
        ended = time.perf_counter()
    good = int((manifest["status"] == "good").sum())
    return (
        f"{good:>9,}{f'{layout.shard_count} x {layout.shard_clips}':>12}"
        f"{1000 * (marks[1] - marks[0]) / clips:>12.2f}{ended - marks[1]:>12.2f}{ended - began:>10.1f}"
        f"{memory_mb():>9.0f}{max(peaks):>9.0f}{max(own):>9.0f}"
    )


class Stages:
    """Prints what each stage of planning took, and the peak of memory after it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seconds = 0.0

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        began, began_processor = time.perf_counter(), time.process_time()
        result = work()
        took, processor = time.perf_counter() - began, time.process_time() - began_processor
        self.seconds += took
        self.lines.append(f"  {name:<40}{took:8.1f} s{processor:9.1f} s{memory_mb():11,.0f} MB")
        return result


@contextmanager
def made_up_walk(names: Iterator[str]) -> Iterator[None]:
    """Pretend that a folder holds these files."""
    with mock.patch.object(sources, "walk", return_value=names):
        yield


def planning_lines(rows: int) -> list[str]:
    """Plan so many rows for a build that then could start; nothing is decoded."""
    stages = Stages()
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as scratch:
        folder, ids, paths, first = Path(scratch), random_ids(rows), [], 0
        for name, share in LISTS.items():
            last = rows if name == "eval" else first + round(share * rows / sum(LISTS.values()))
            paths.append(folder / f"{name}_segments.csv")
            write_list(paths[-1], ids[first:last], 10.0)
            first = last
        names = (f"{name[:2].decode()}/Y{name.decode()}.wav" for name in ids)
        stages.lines.append(f"  {'made up: the lists; libraries':<40}{'':21}{memory_mb():11,.0f} MB")
        plan, _ = stages("lists read", lambda: plan_segment_lists(paths))
        with made_up_walk(names):
            sources = stages(
                "files matched (without the walk)", lambda: audioset.match_sounds_to_plan(plan, [folder])
            )
        corpus = Corpus(plan=plan, sources=sources, classes=load_class_list(), dataset_settings={})
        output = StoreOutput(path=folder / "out.zarr", spec=preset_mel_spec("a-jepa"))
        header = stages("header and plan id", lambda: plan_store(corpus, output))
        stages("empty store created", lambda: create_store(output.path, header, plan))
        stores, blocks = [(output.path, header)], BuildBlocks.of_part([header], WHOLE_BUILD)
        work = stages("open rows", lambda: count_open_rows(stores, corpus, blocks, None))
        stages("marked open", lambda: mark_unfinished(output.path, header, plan, work, blocks))
        stages("first task", lambda: next(block_tasks(corpus, work, blocks)))
    return [
        *stages.lines,
        f"  {rows:,} rows planned: {stages.seconds:.1f} s (under {TARGET_SECONDS} wanted), "
        f"{memory_mb():,.0f} MB ({TARGET_MB:,} wanted)",
    ]


def alone(work: Callable[..., T], *arguments: object) -> T:
    """In a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", default="1000,4000,16000")
    parser.add_argument("--rows", type=int, default=sum(LISTS.values()))
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    print(machine("ajepa", "numpy", "polars", "pyarrow", "zarr", "torch"))
    print(
        f"builds of {CLIP_SECONDS:g} s clips, {asked.workers} workers; `ms a clip` from the first in a worker's hand on"
    )
    print(f"{'':21}{'':34}{'peak of memory, MB':^27}")
    heads = ("ms a clip", "finish, s"), ("parent", "worker", "own")
    columns = "".join(f"{head:>12}" for head in heads[0]) + f"{'whole, s':>10}"
    print(f"{'clips':>9}{'shards':>12}{columns}" + "".join(f"{head:>9}" for head in heads[1]))
    for clips in map(int, asked.clips.split(",")):
        print(alone(build_line, clips, asked.workers), flush=True)
    print("planning: wall time, processor time, the peak of memory so far")
    print("\n".join(alone(planning_lines, asked.rows)))


if __name__ == "__main__":
    main()
