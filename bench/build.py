"""Sound files to log-mel on disk: the build beside the bare cost of its parts, and beside other tools.

    just bench build [--clips 320] [--rounds 3] [--containers wav,flac,mp3,ogg,opus,m4a]

Every container holds the same 10 s stereo clips (44.1 kHz, opus 48 kHz), 32 distinct ones and hard links to them, in
the page cache. The bound is the speed of two processes at once that only decode (to mono), resample, transform and
write (float16, checksums, fsync). All sides run in turns, round by round; the table has medians.

All sides are timed by the wall clock, with two processes that have imported and worked before. The clock of our build
starts when the fourth block is begun, so that both workers have made a shard, and stops at its end, statistics and
manifest included; it counts the clips that are then left. The column `whole` times all of the build.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import soxr
import torch

from bench.build_peers import PEERS, RunningPeer, librosa_mel
from bench.machine import machine
from pipeline.audio.containers import recognise_container
from pipeline.audio.decode import VideoSegment, decode_segment
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput, plan_store
from pipeline.build.shard_builder import quantise_mel
from pipeline.datasets.audioset import audioset_corpus
from pipeline.datasets.corpus import Corpus
from pipeline.datasets.demo.clips import DEMO_CLIP_SECONDS
from pipeline.store.header import StoreHeader
from pipeline.store.shards import ShardWriter

SPEC = preset_mel_spec("a-jepa")

WORKERS = 2

DISTINCT = 32  # clips; the other clips are hard links to these files

WRITERS = {"wav": "wav-16", "flac": "flac", "mp3": "mp3", "ogg": "vorbis", "opus": "opus", "m4a": "m4a"}

LIST = "balanced_train_segments.csv"

WARM_CLIPS = 8  # with which the bound and other tools work before they are timed

WARM_BLOCKS = 2 * WORKERS  # with which the build works before it is timed

SMALLEST_BLOCK = 16  # clips that one worker takes at a time

PARTS = ("decode", "resample", "log-mel", "write")


def clip_id(number: int) -> str:
    return f"bench_{number:05d}"


def make_files(folder: Path, containers: Sequence[str], clips: int) -> None:
    """Write `folder/wav/bench_00000.wav` and so on, the same sounds in every container, and a list of the clips."""
    from pipeline.datasets.demo.audio_files import CONTAINERS_BY_NAME, write_audio_file
    from pipeline.datasets.demo.clips import plan_demo_clips, render_clip
    from pipeline.datasets.demo.corpus import formula_split_sounds

    # Plan the distinct clips.
    palette = formula_split_sounds()
    distinct = min(clips, DISTINCT)
    planned = plan_demo_clips(
        np.random.default_rng(0), palette, split="balanced_train", numbers=range(distinct), used_ids=set()
    )
    sounds = {sound.name: sound for sound in palette.sounds_by_split["balanced_train"]}
    for name in containers:
        (folder / name).mkdir()

    # Render each once, write it in every container, and link the others to it.
    for number, clip in enumerate(planned):
        whole_clip = replace(clip, seconds=DEMO_CLIP_SECONDS, channels=2)
        wave_SN = render_clip(whole_clip, [sounds[part] for part in clip.parts], seed=0)
        for name in containers:
            first = folder / name / f"{clip_id(number)}.{name}"
            write_audio_file(
                first,
                wave_SN,
                CONTAINERS_BY_NAME[WRITERS[name]],
                rate_hz=48_000 if name == "opus" else 44_100,
            )
            for linked_number in range(number + distinct, clips, distinct):
                os.link(first, first.with_stem(clip_id(linked_number)))

    rows = "".join(
        f'{clip_id(number)}, 0.000, {DEMO_CLIP_SECONDS:.3f}, "/m/09x0r"\n' for number in range(clips)
    )
    (folder / LIST).write_text(rows)


def part_seconds(paths: Sequence[Path], header: StoreHeader, scratch: Path) -> dict[str, float]:
    """Wall time per clip of the bare parts, clip by clip, into one shard that is forced to the disk."""
    torch.set_num_threads(1)
    seconds = dict.fromkeys(PARTS, 0.0)
    writer = ShardWriter(scratch, replace(header.layout, shard_clips=len(paths), clips=len(paths)), 0)
    # A mark after every part of every clip.
    for row, path in enumerate(paths):
        marks = [time.perf_counter()]
        segment = decode_segment(
            path, recognise_container(path), VideoSegment(0.0, DEMO_CLIP_SECONDS), max_seconds=60.0
        )
        marks.append(time.perf_counter())
        wave_S = soxr.resample(segment.wave_S, segment.facts.rate_hz, SPEC.sample_rate_hz, quality="HQ")
        marks.append(time.perf_counter())
        mel_TF = log_mel(torch.from_numpy(wave_S[: SPEC.clip_samples])[None], SPEC)[0]
        marks.append(time.perf_counter())
        writer.append_clip(row, quantise_mel(mel_TF, header).numpy())
        marks.append(time.perf_counter())
        for part, began, ended in zip(PARTS, marks, marks[1:], strict=False):
            seconds[part] += ended - began

    # Finishing the file is writing too.
    began = time.perf_counter()
    writer.finish_file()
    writer.place()
    seconds["write"] += time.perf_counter() - began
    return {part: total / len(paths) for part, total in seconds.items()}


def bound_seconds(
    pool: ProcessPoolExecutor, paths: Sequence[Path], header: StoreHeader, scratch: Path
) -> dict[str, float]:
    """The `part_seconds` of processes that work at once, the mean of them: two cores are slower than twice one."""
    runs = [
        pool.submit(part_seconds, paths, header, scratch / f"bound-{number}") for number in range(WORKERS)
    ]
    results = [run.result() for run in runs]
    return {part: statistics.fmean(result[part] for result in results) for part in PARTS}


def build_speeds(corpus: Corpus, out: Path) -> tuple[float, float]:
    """Clips/s of a build, once both workers have made a shard, and from its call on."""
    output = StoreOutput(path=out, spec=SPEC)
    shard_clips = plan_store(corpus, output).layout.shard_clips
    blocks = set[int]()
    warm_clips = 0
    warm_since = 0.0

    def note_warm_up(_: int, rows: Iterator[int]) -> Iterator[int]:
        nonlocal warm_clips, warm_since
        for row in rows:
            blocks.add(row // shard_clips)
            if not warm_since and len(blocks) == WARM_BLOCKS:
                warm_since = time.perf_counter()
            warm_clips += not warm_since
            yield row

    # Time the build, and refuse a figure of clips that failed.
    began = time.perf_counter()
    manifest = build_store(corpus, output, BuildOptions(workers=WORKERS), progress=note_warm_up)
    ended = time.perf_counter()
    good = manifest.filter(pl.col("status") == "good").height
    if good != corpus.plan.height:
        raise RuntimeError(f"{out}: {good} of {corpus.plan.height} clips are good")
    return (good - warm_clips) / (ended - warm_since), good / (ended - began)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder and remove it afterwards, so that no side finds the files of another."""
    path.mkdir()
    yield path
    shutil.rmtree(path)


def measure_container(
    folder: Path, name: str, pool: ProcessPoolExecutor, peers: Sequence[RunningPeer], rounds: int
) -> dict[str, float]:
    """Medians over rounds: seconds per clip of the parts, clips/s of builds and peers; 0: the peer cannot read it."""
    corpus = audioset_corpus([folder / name], [folder / LIST])
    paths = sorted((folder / name).iterdir())
    header = plan_store(corpus, StoreOutput(path=folder / "out.zarr", spec=SPEC))
    values: dict[str, list[float]] = {}

    # Tables and filters are made once.
    with new_folder(folder / "scratch") as scratch:
        bound_seconds(pool, paths[:WARM_CLIPS], header, scratch)

    # Every side has its turn in every round; a peer that could not read the container is left out.
    for _ in range(rounds):
        with new_folder(folder / "scratch") as scratch:
            figures = bound_seconds(pool, paths[:DISTINCT], header, scratch)
        with new_folder(folder / "scratch") as scratch:
            figures["build"], figures["whole"] = build_speeds(corpus, scratch / "out.zarr")
        for peer in peers:
            if values.get(peer.name, [1.0])[0]:
                with new_folder(folder / "scratch") as scratch:
                    figures[peer.name] = peer.speed(paths, scratch / "features")
        for figure, value in figures.items():
            values.setdefault(figure, []).append(value)
    return {figure: statistics.median(round_values) for figure, round_values in values.items()}


def format_line(name: str, medians: dict[str, float], peers: Sequence[RunningPeer]) -> str:
    """One line of the table."""
    parts_ms = [1000 * medians[part] for part in PARTS]
    bound = WORKERS * 1000 / sum(parts_ms)
    build = medians["build"]
    line = f"{name:<5}" + "".join(f"{ms:9.2f}" for ms in [*parts_ms, sum(parts_ms)])
    line += f"{bound:9.1f}{build:8.1f}{build / bound:7.0%}{medians['whole']:9.1f}"
    for peer in peers:
        speed = medians[peer.name]
        if speed:
            line += f"{speed:9.1f} {f'({build / speed:.1f}x)':<8}"
        else:
            line += f"{'cannot':>9} {'':8}"
    return line


def log_mel_line() -> str:
    """Log-mel alone: processor time of one clip on one thread, in turns."""
    from bench.mel import ROUNDS, kaldi, seconds

    wave_BS = 0.1 * torch.randn(1, SPEC.clip_samples, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: log_mel(wave_BS, SPEC),
        "torchaudio kaldi.fbank": lambda: kaldi(wave_BS, SPEC),
        "librosa": lambda: librosa_mel(wave_BS[0].numpy()),
    }
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS // 2):
        for name, call in calls.items():
            times_ms[name].append(1000 * seconds(call))
    medians_ms = {name: statistics.median(times) for name, times in times_ms.items()}
    figures = [f"{name} {ms:.2f} ms ({ms / medians_ms['ours']:.1f}x)" for name, ms in medians_ms.items()]
    return "log-mel of 10 s at 32 kHz, one thread: " + ", ".join(figures)


def main() -> None:
    """Print the tables."""
    # Options.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=320, help="clips in every container (320)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median counts (3)")
    parser.add_argument("--containers", default=",".join(WRITERS), help="containers, by comma (all)")
    options = parser.parse_args()
    if options.clips < 2 * WARM_BLOCKS * SMALLEST_BLOCK:
        parser.error(
            f"--clips {options.clips}: expected {2 * WARM_BLOCKS * SMALLEST_BLOCK} at least, half of them to warm up"
        )
    torch.set_num_threads(1)
    containers = options.containers.split(",")

    # The machine, and the transform alone.
    print(machine("ajepa", "torch", "torchaudio", "soundfile", "av", "soxr", "numpy", "lhotse", "librosa"))
    print(log_mel_line(), flush=True)

    # Files; the peers' processes start, import and work once.
    peers = [RunningPeer(peer) for peer in PEERS]
    with (
        ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool,
        tempfile.TemporaryDirectory(prefix="bench-build-") as scratch,
    ):
        folder = Path(scratch)
        make_files(folder, containers, options.clips)
        for peer in peers:
            warm_paths = sorted((folder / containers[0]).iterdir())[:WARM_CLIPS]
            peer.speed(warm_paths, folder / f"warm-{peer.name}")

        # The table.
        starts = ", ".join(f"{peer.name} {peer.start_seconds:.1f} s" for peer in peers)
        print(f"{options.clips} clips of 10 s, {options.rounds} rounds; start of two processes: {starts}")
        group_heads = f"{'ms a clip, two processes at once':^45}{'ours, clips/s, two workers':^33}"
        print(f"{'':5}{group_heads}  theirs, clips/s, two processes")
        part_heads = "".join(f"{head:>9}" for head in [*PARTS, "sum", "bound"])
        peer_heads = "".join(f"{peer.name:>9}{'':9}" for peer in peers)
        print(f"{'':5}{part_heads}{'build':>8}{'share':>7}{'whole':>9}{peer_heads}", flush=True)
        for name in containers:
            medians = measure_container(folder, name, pool, peers, options.rounds)
            print(format_line(name, medians, peers), flush=True)
    for peer in peers:
        peer.close()


if __name__ == "__main__":
    # The processes that are started, ours and theirs, have one thread each.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = "1"
    main()
