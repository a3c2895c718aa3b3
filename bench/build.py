"""The build's clips/s on two workers beside the bare cost of its parts on the same files.

    just bench build [CORPUS]      CORPUS: a folder like that of `ajepa-data demo-corpus`; made if not given

The bound is what two cores reach if they do nothing but decode, resample, transform and write.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pipeline.audio import load
from pipeline.build import Build, build_store, plan_store
from pipeline.datasets.audioset import audioset, find_sources, plan_clips
from pipeline.datasets.demo import make_demo_corpus
from pipeline.errors import AudioError
from pipeline.files import replacing
from pipeline.locators import Locator
from pipeline.mel import log_mel
from pipeline.melspec import mel_spec
from pipeline.ontology import load_class_list
from pipeline.shardmaker import quantise
from pipeline.shards import encode_shard

T = TypeVar("T")
REPEATS = 3
SPEC = mel_spec("a-jepa")


def main(corpus: Path | None, scratch: Path) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    if corpus is None:
        corpus = scratch / "corpus"
        make_demo_corpus(corpus, clips=600)
    segments = sorted(corpus.glob("*_segments.csv"))
    plan = plan_clips(segments)
    paths = [Path(path) for path in find_sources(plan, [corpus / "audio"]).frame["path"].drop_nulls()]
    waves, decode_seconds = timed(lambda: [audio for path in paths if (audio := load_or_none(path))])
    mels, mel_seconds = timed(lambda: [log_mel(torch.from_numpy(a)[None], SPEC)[0].numpy() for a in waves])
    _, write_seconds = timed(
        lambda: write_all(mels, plan_store(plan, Build(spec=SPEC), load_class_list()), scratch)
    )
    builds = [build_seconds(corpus, segments, scratch / f"{n}.zarr") for n in range(REPEATS)]
    bound = 2 * len(mels) / (decode_seconds + mel_seconds + write_seconds)
    reached = len(mels) / statistics.median(builds)
    print(f"{len(mels)} clips, one core, ms a clip:")
    for name, seconds in [
        ("decode, resample", decode_seconds),
        ("log-mel", mel_seconds),
        ("write", write_seconds),
    ]:
        print(f"  {name:<18}{1000 * seconds / len(mels):8.2f}")
    print(f"bound, two cores    {bound:8.0f} clips/s")
    print(
        f"build, two workers  {reached:8.0f} clips/s   {reached / bound:.0%} of the bound, start of workers included"
    )


def timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def load_or_none(path: Path) -> np.ndarray | None:
    try:
        return load(Locator.of(path), start_seconds=0, end_seconds=10).resampled(SPEC.sample_rate_hz)
    except AudioError:
        return None


def write_all(mels: list[np.ndarray], header, scratch: Path) -> None:
    layout = header.layout
    for shard in range(len(mels) // layout.shard_clips):
        mel_NTF = np.full((layout.shard_clips, layout.frames, layout.bands), np.nan, np.float16)
        for place, mel_TF in enumerate(mels[shard * layout.shard_clips :][: layout.shard_clips]):
            mel_NTF[place, : len(mel_TF)] = quantise(mel_TF, header)
        with replacing(scratch / "shard") as path:
            path.write_bytes(encode_shard(layout, shard, mel_NTF[: len(layout.rows(shard))]))


def build_seconds(corpus: Path, segments: list[Path], out: Path) -> float:
    began = time.perf_counter()
    build_store(audioset([corpus / "audio"], segments), out, Build(spec=SPEC, workers=2))
    return time.perf_counter() - began


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, Path(folder))
