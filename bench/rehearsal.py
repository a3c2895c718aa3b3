"""A rehearsal of AudioSet's size: every command on 2,084,320 rows, of which few have a sound; time and memory.

    just bench rehearsal [--lists FOLDER] [--audio FOLDER] [--rows 2084320] [--sounds 900] [--parts 0] [--workers 2]

`--lists` is a folder of segments lists, such as the official ones; without it, lists of AudioSet's three sizes are
written, of random ids. `--rows` takes the first rows of every list, in proportion. The sounds are tones of 1 s under
ids of all lists, a third each; with `--audio`, they are hard links to the files below a folder. With `--parts`, another
store is built in as many parts, one after the other.

Every command is a process of its own. `CPU` includes its workers. `largest` is the peak of its largest process, as the
kernel counts it (mapped files of libraries included); `all` is the peak of all its processes together, a page that
several of them share counted once (PSS, 2 samples a second). A line with `+` is a process that has imported the
libraries, and has the memory that came on top of them.
"""

import argparse
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from bench.growth import LISTS, random_ids, write_list
from bench.machine import machine, memory_mb

SAMPLE_SECONDS = 0.5

TONE_HZ = 16_000

TONE_SECONDS = 1.0

BATCH_CLIPS = 64

PROGRAM = [sys.executable, "-c", "from pipeline.cli.app import main; main()"]


def write_random_lists(folder: Path) -> None:
    """Write segments lists of AudioSet's three sizes, of random ids."""
    ids = random_ids(sum(LISTS.values()))
    first = 0
    for name, rows in LISTS.items():
        write_list(folder / f"{name}_segments.csv", ids[first : first + rows], 10.0)
        first += rows


def shorten_lists(lists: Path, folder: Path, rows: int) -> list[Path]:
    """Copy the lists of a folder, each with its share of `rows`; returns their paths."""
    # Comments begin with `# `; an id may begin with `#` only in a damaged list.
    texts = {
        path: path.read_text().splitlines(keepends=True) for path in sorted(lists.glob("*_segments.csv"))
    }
    row_counts = {path: sum(not line.startswith("# ") for line in lines) for path, lines in texts.items()}
    share = min(1.0, rows / sum(row_counts.values()))
    paths = []
    for path, lines in texts.items():
        comments = len(lines) - row_counts[path]
        paths.append(folder / path.name)
        paths[-1].write_text("".join(lines[: comments + round(share * row_counts[path])]))
    return paths


def read_ids(path: Path) -> list[str]:
    """Return the ids of a list."""
    return [line[:11] for line in path.read_text().splitlines() if not line.startswith("# ")]


def write_sounds(folder: Path, segments: Sequence[Path], sounds: int, source: Path | None) -> None:
    """Write sounds under ids that are drawn from all lists, the same number from each."""
    rng = np.random.default_rng(0)
    files = [path for path in sorted(source.rglob("*")) if path.is_file()] if source is not None else []
    for path in segments:
        drawn = rng.permutation(read_ids(path))[: sounds // len(segments)]
        for number, clip_id in enumerate(drawn):
            if files:
                file = files[number % len(files)]
                os.link(file, folder / f"{clip_id}{file.suffix}")
                continue
            time_S = np.arange(round(TONE_SECONDS * TONE_HZ)) / TONE_HZ
            wave_S = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 7_000) * time_S)
            soundfile.write(folder / f"{clip_id}.wav", wave_S.astype(np.float32), TONE_HZ, subtype="PCM_16")


def process_tree(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    try:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text().split():
                yield from process_tree(int(child))
    except (FileNotFoundError, ProcessLookupError):
        return


def shared_memory_mb(pid: int) -> float:
    """Return the memory of a process, with its share of the pages that it has in common; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), 0.0)


def run_measured(name: str, arguments: Sequence[object]) -> str:
    """Run `ajepa-data` with these arguments; returns a line of the table, with its status if that is not 0."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    # Sample the memory of all its processes until it ends.
    peaks_mb = [0.0]
    largest_mb = [0.0]
    is_over = threading.Event()

    def sample_memory() -> None:
        while not is_over.wait(SAMPLE_SECONDS):
            processes = list(process_tree(process.pid))
            largest_mb.extend(map(memory_mb, processes))
            peaks_mb.append(sum(map(shared_memory_mb, processes)))

    sampler = threading.Thread(target=sample_memory)
    sampler.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    is_over.set()
    sampler.join()
    seconds = time.perf_counter() - began

    line = table_line(
        name,
        seconds,
        usage.ru_utime + usage.ru_stime,
        f"{max(largest_mb):>12,.0f}{max(peaks_mb):>12,.0f}",
    )
    if process.returncode:
        last_lines = " | ".join(output.splitlines()[-3:])
        line += f"  status {process.returncode}: {last_lines}"
    return line


def table_line(name: str, seconds: float, processor_seconds: float, memory: str) -> str:
    """Return a line of the table."""
    return f"{name:<34}{seconds:>10.2f}{processor_seconds:>10.2f}{memory}"


def measure_in_process(name: str, step: str, store: Path) -> str:
    """Import the libraries, then run a step of IN_PROCESS_STEPS; returns the line of the step alone."""
    import pipeline.loading.class_weights
    import pipeline.loading.loader  # noqa: F401  (both are imported before the clock starts)

    # The kernel's peak begins anew at the memory that is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before_mb = memory_mb(field="VmRSS")
    began = time.perf_counter()
    processor_began = time.process_time()
    IN_PROCESS_STEPS[step](store)
    seconds = time.perf_counter() - began
    processor_seconds = time.process_time() - processor_began
    added_mb = memory_mb() - before_mb
    return table_line(name, seconds, processor_seconds, f"{f'+{added_mb:,.0f}':>12}")


def open_for_training(store: Path) -> None:
    """Open a store and read what training needs before its first batch: splits, rows, frames, one label set."""
    from pipeline.store.feature_store import FeatureStore
    from pipeline.store.splits import describe_splits, train_splits

    opened = FeatureStore.open(store)
    describe_splits(opened)
    opened.good_rows(train_splits(opened))
    opened.n_frames_N.max()
    opened.flat_labels("unambiguous")


def first_batch(store: Path, sampling_name: str) -> None:
    """Open a store, order all its rows by a sampling as if all were good, and read one batch of good rows."""
    from pipeline.loading.class_weights import balanced_weights
    from pipeline.loading.loader import PlainLoader, View
    from pipeline.loading.sampling import BlockShuffle, FullShuffle, RowOrder, Sampling, WeightedSampling
    from pipeline.store.feature_store import FeatureStore

    # The order of all rows.
    opened = FeatureStore.open(store)
    rows_N = np.arange(opened.header.layout.clips)
    sampling: Sampling = FullShuffle()
    if sampling_name == "block":
        sampling = BlockShuffle(blocks_N=opened.shard_numbers(rows_N))
    elif sampling_name.startswith("weighted"):
        weights_N = balanced_weights(opened, rows_N, label_set="unambiguous").weights_N
        clips = min(200_000, len(rows_N) // 2)
        replacement = sampling_name == "weighted"
        sampling = WeightedSampling(weights_N=weights_N, clips_per_epoch=clips, replacement=replacement)
    RowOrder(rows_N=rows_N, clips=BATCH_CLIPS, seed=0, sampling=sampling).rows_at_step(0)

    # A batch.
    order = RowOrder(rows_N=opened.good_rows(), clips=BATCH_CLIPS, seed=0)
    view = View(frames=opened.frames, mean=0.0, std=1.0, label_set="unambiguous")
    PlainLoader(opened, order, view).make_batch(0)


IN_PROCESS_STEPS: dict[str, Callable[[Path], None]] = {
    "open": open_for_training,
    **{
        name: lambda store, name=name: first_batch(store, name)  # type: ignore[misc]
        for name in ("full", "block", "weighted", "weighted once")
    },
}


def run_alone(*arguments: object) -> str:
    """Return the result of `measure_in_process` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(measure_in_process, *arguments).result()  # type: ignore[arg-type]


def rehearsal_lines(folder: Path, segments: Sequence[Path], workers: int, parts: int) -> Iterator[str]:
    """Run every command; yields the lines of the table."""
    # The builds.
    store = folder / "rehearsal.zarr"
    inputs = ["--audio", folder / "audio", *(word for path in segments for word in ("--segments", path))]
    build = ["build-audioset", *inputs, "--workers", workers, "--out"]
    yield run_measured("dry run", [*build, store, "--dry-run"])
    yield run_measured("build", [*build, store])
    yield run_measured("the same again, nothing to do", [*build, store])

    # The commands that read a store.
    yield run_measured("propagate-labels", ["propagate-labels", store])
    yield run_measured("verify", ["verify", store])
    yield run_measured("report --html", ["report", store, "--html", folder / "report.html"])
    yield run_measured("inspect", ["inspect", store])
    yield run_measured("audit-labels", ["audit-labels", store])
    yield run_measured(
        "verify --against-audio --sample 50", ["verify", store, "--against-audio", "--sample", 50]
    )

    # Training.
    yield run_alone("opening for training", "open", store)
    for name in IN_PROCESS_STEPS:
        if name != "open":
            yield run_alone(f"first batch, {name}", name, store)

    # In parts.
    for part in range(parts):
        other = [*build, folder / "parts.zarr", "--part", f"{part}/{parts}"]
        yield run_measured(f"part {part + 1} of {parts}", other)


def main() -> None:
    """Make the inputs and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lists", type=Path, help="folder of *_segments.csv")
    parser.add_argument("--audio", type=Path, help="folder of sounds to link to, on the same disk")
    parser.add_argument("--rows", type=int, default=sum(LISTS.values()), help="rows of all lists (2084320)")
    parser.add_argument("--sounds", type=int, default=900, help="sounds, a third for each list (900)")
    parser.add_argument(
        "--parts", type=int, default=0, help="build another store in so many parts (0: do not)"
    )
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (2)")
    parser.add_argument(
        "--folder", type=Path, help="folder to keep everything in; by default a temporary one"
    )
    options = parser.parse_args()
    print(machine("ajepa", "numpy", "polars", "pyarrow", "zarr", "torch"))

    with tempfile.TemporaryDirectory(prefix="bench-rehearsal-") as scratch:
        # The lists and the sounds.
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        lists = options.lists
        if lists is None:
            lists = folder / "all_lists"
            lists.mkdir(exist_ok=True)
            write_random_lists(lists)
        segments = shorten_lists(lists, folder, options.rows)
        (folder / "audio").mkdir()
        write_sounds(folder / "audio", segments, options.sounds, options.audio)

        # The table.
        print(f"{options.rows:,} rows, {options.sounds} sounds, {options.workers} workers")
        print(f"{'':<34}{'wall, s':>10}{'CPU, s':>10}{'largest, MB':>12}{'all, MB':>12}")
        for line in rehearsal_lines(folder, segments, options.workers, options.parts):
            print(line, flush=True)


if __name__ == "__main__":
    main()
