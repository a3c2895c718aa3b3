"""Sound files to log-mel on disk: the build beside the bare cost of its parts, and beside what others would use.

    just bench build [--clips 320] [--rounds 3] [--containers wav,flac,mp3,ogg,opus,m4a]

One set of 10 s stereo clips in every container (44.1 kHz, opus 48 kHz), 32 distinct ones under so many names, in the
page cache. The bound is what two cores reach that do nothing but decode (to mono), resample, transform and write
(float16, checksums, fsync). All in turns, round by round; medians.

Wall time of two processes that have imported and worked before, on all sides: our clock runs from the moment the fourth
block is begun, so that both workers have made a shard, over the clips that are then still to do, to the end of the
build, statistics and manifest included; the column `started` has the whole of it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
from pipeline.store.shards import ShardWriter

SPEC = preset_mel_spec("a-jepa")

WORKERS = 2

DISTINCT = 32  # clips; the others are further names of the same files

WRITERS = {"wav": "wav-16", "flac": "flac", "mp3": "mp3", "ogg": "vorbis", "opus": "opus", "m4a": "m4a"}

LIST = "balanced_train_segments.csv"

WARM_CLIPS = 8

WARM_BLOCKS = 2 * WORKERS

SMALLEST_BLOCK = 16  # clips that one worker takes at a time

PARTS = ("decode", "resample", "log-mel", "write")


def clip_id(number: int) -> str:
    return f"bench_{number:05d}"


def make_files(folder: Path, containers: Sequence[str], clips: int) -> None:
    """`folder/wav/bench_00000.wav` and so on: the same sounds in every container, and a list of the clips."""
    from pipeline.datasets.demo.audio_files import CONTAINERS_BY_NAME, write_audio_file
    from pipeline.datasets.demo.clips import plan_demo_clips, render_clip
    from pipeline.datasets.demo.corpus import formula_split_sounds

    palette, distinct = formula_split_sounds(), min(clips, DISTINCT)
    planned = plan_demo_clips(
        np.random.default_rng(0), palette, split="balanced_train", numbers=range(distinct), used_ids=set()
    )
    sounds = {sound.name: sound for sound in palette.sounds_by_split["balanced_train"]}
    for name in containers:
        (folder / name).mkdir()
    for number, clip in enumerate(planned):
        whole = replace(clip, seconds=DEMO_CLIP_SECONDS, channels=2)
        wave_SN = render_clip(whole, [sounds[part] for part in clip.parts], seed=0)
        for name in containers:
            first = folder / name / f"{clip_id(number)}.{name}"
            write_audio_file(
                first,
                wave_SN,
                CONTAINERS_BY_NAME[WRITERS[name]],
                rate_hz=48_000 if name == "opus" else 44_100,
            )
            for other in range(number + distinct, clips, distinct):
                os.link(first, first.with_stem(clip_id(other)))
    rows = "".join(
        f'{clip_id(number)}, 0.000, {DEMO_CLIP_SECONDS:.3f}, "/m/09x0r"\n' for number in range(clips)
    )
    (folder / LIST).write_text(rows)


def part_seconds(paths: Sequence[Path], header, scratch: Path) -> dict[str, float]:
    """Wall time per clip of the bare parts, on one core, clip by clip; one shard, forced to the disk."""
    took, layout = dict.fromkeys(PARTS, 0.0), header.layout
    writer = ShardWriter(scratch, replace(layout, shard_clips=len(paths), clips=len(paths)), 0)
    for row, path in enumerate(paths):
        marks = [time.perf_counter()]
        take = decode_segment(
            path, recognise_container(path), VideoSegment(0.0, DEMO_CLIP_SECONDS), max_seconds=60.0
        )
        marks.append(time.perf_counter())
        wave_S = soxr.resample(take.wave_S, take.rate_hz, SPEC.sample_rate_hz, quality="HQ")
        marks.append(time.perf_counter())
        mel_TF = log_mel(torch.from_numpy(wave_S[: SPEC.clip_samples])[None], SPEC)[0]
        marks.append(time.perf_counter())
        writer.append_clip(row, quantise_mel(mel_TF, header).numpy())
        marks.append(time.perf_counter())
        for part, began, ended in zip(PARTS, marks, marks[1:], strict=False):
            took[part] += ended - began
    began = time.perf_counter()
    writer.finish_file()
    writer.place()
    took["write"] += time.perf_counter() - began
    return {part: seconds / len(paths) for part, seconds in took.items()}


def build_speeds(corpus: Corpus, out: Path) -> tuple[float, float]:
    """Clips/s of a build: from the moment both workers have made a shard on, and from its call on."""
    shard_clips = plan_store(corpus, StoreOutput(path=out, spec=SPEC)).layout.shard_clips
    blocks, before, warm = set[int](), 0, 0.0

    def watched(_: int, rows: Iterator[int]) -> Iterator[int]:
        nonlocal before, warm
        for row in rows:
            blocks.add(row // shard_clips)
            if not warm and len(blocks) == WARM_BLOCKS:
                warm = time.perf_counter()
            before += not warm
            yield row

    began = time.perf_counter()
    build = BuildOptions(workers=WORKERS)
    manifest = build_store(corpus, StoreOutput(path=out, spec=SPEC), build, progress=watched)
    ended = time.perf_counter()
    good = manifest.filter(pl.col("status") == "good").height
    if good != corpus.plan.height:
        raise RuntimeError(f"{out}: {good} of {corpus.plan.height} clips are good")
    return (good - before) / (ended - warm), good / (ended - began)


@contextmanager
def emptied(path: Path) -> Iterator[Path]:
    """A folder that is new for every use, so that nobody pays for what another left."""
    path.mkdir()
    yield path
    shutil.rmtree(path)


def measure(folder: Path, name: str, peers: Sequence[RunningPeer], rounds: int) -> dict[str, float]:
    """Medians over rounds in turns: seconds per clip of the parts, clips/s of builds and peers; 0: cannot."""
    corpus = audioset_corpus([folder / name], [folder / LIST])
    paths = sorted((folder / name).iterdir())
    header = plan_store(corpus, StoreOutput(path=folder / "out.zarr", spec=SPEC))
    took: dict[str, list[float]] = {}
    with emptied(folder / "scratch") as scratch:
        part_seconds(paths[:1], header, scratch)  # tables and filters are made once
    for _ in range(rounds):
        with emptied(folder / "scratch") as scratch:
            told = part_seconds(paths[:DISTINCT], header, scratch)
        with emptied(folder / "scratch") as scratch:
            told["build"], told["started"] = build_speeds(corpus, scratch / "out.zarr")
        for peer in peers:
            if took.get(peer.name, [1.0])[0]:
                with emptied(folder / "scratch") as scratch:
                    told[peer.name] = peer.speed(paths, scratch / "features")
        for what, value in told.items():
            took.setdefault(what, []).append(value)
    return {what: statistics.median(values) for what, values in took.items()}


def line(name: str, took: dict[str, float], peers: Sequence[RunningPeer]) -> str:
    """One line of the table."""
    parts = [1000 * took[part] for part in PARTS]
    bound, build = WORKERS * 1000 / sum(parts), took["build"]
    told = f"{name:<5}" + "".join(f"{ms:9.2f}" for ms in [*parts, sum(parts)])
    told += f"{bound:9.1f}{build:8.1f}{build / bound:7.0%}{took['started']:9.1f}"
    for peer in peers:
        speed = took[peer.name]
        told += f"{speed:9.1f} {f'({build / speed:.1f}x)':<8}" if speed else f"{'cannot':>9} {'':8}"
    return told


def log_mel_line() -> str:
    """Log-mel alone: one thread, one clip, in turns, processor time."""
    from bench.mel import ROUNDS, kaldi, seconds

    wave_BS = 0.1 * torch.randn(1, SPEC.clip_samples, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: log_mel(wave_BS, SPEC),
        "torchaudio kaldi.fbank": lambda: kaldi(wave_BS, SPEC),
        "librosa": lambda: librosa_mel(wave_BS[0].numpy()),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS // 2):
        for name, call in calls.items():
            took[name].append(1000 * seconds(call))
    ours = statistics.median(took["ours"])
    told = [
        f"{name} {statistics.median(ms):.2f} ms ({statistics.median(ms) / ours:.1f}x)"
        for name, ms in took.items()
    ]
    return "log-mel of 10 s at 32 kHz, one thread: " + ", ".join(told)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=320, help="in every container")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--containers", default=",".join(WRITERS))
    asked = parser.parse_args()
    if asked.clips < 2 * WARM_BLOCKS * SMALLEST_BLOCK:
        parser.error(
            f"--clips {asked.clips}: expected {2 * WARM_BLOCKS * SMALLEST_BLOCK} at least, half of them to warm up"
        )
    torch.set_num_threads(1)
    containers = asked.containers.split(",")
    print(machine("ajepa", "torch", "torchaudio", "soundfile", "av", "soxr", "numpy", "lhotse", "librosa"))
    print(log_mel_line(), flush=True)
    peers = [RunningPeer(peer) for peer in PEERS]
    with tempfile.TemporaryDirectory(prefix="bench-build-") as scratch:
        folder = Path(scratch)
        make_files(folder, containers, asked.clips)
        for peer in peers:
            warm = sorted((folder / containers[0]).iterdir())[:WARM_CLIPS]
            peer.speed(warm, folder / f"warm-{peer.name}")
        starts = ", ".join(f"{peer.name} {peer.start_seconds:.1f} s" for peer in peers)
        print(f"{asked.clips} clips of 10 s, {asked.rounds} rounds; start of two processes: {starts}")
        print(
            f"{'':5}{'ms a clip on one core':^45}{'ours, clips/s, two workers':^33}  theirs, clips/s, two processes"
        )
        heads = [*PARTS, "sum", "bound"], [f"{peer.name:>9}{'':9}" for peer in peers]
        columns = "".join(f"{head:>9}" for head in heads[0])
        print(f"{'':5}{columns}{'build':>8}{'share':>7}{'started':>9}{''.join(heads[1])}", flush=True)
        for name in containers:
            print(line(name, measure(folder, name, peers, asked.rounds), peers), flush=True)
    for peer in peers:
        peer.close()


if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"  # for the processes that are started; none of ours or theirs has more
    main()
