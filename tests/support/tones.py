"""Sounds whose every second tells which second it is, and how to read that from a store."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sounds import write

from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import MelSpec, preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.corpus import Corpus
from pipeline.store.feature_store import FeatureStore

RATE_HZ = 16_000

SPEC = replace(preset_mel_spec("a-jepa"), clip_seconds=5.0)


def hz_of(number: int) -> float:
    """Seconds and clips are told apart by the pitch of a tone."""
    return 300.0 * 1.12**number


def tones(*numbers: int, last_seconds: float = 1.0) -> np.ndarray:
    """A second of each numbered tone, the last one maybe shorter."""
    lengths = [1.0] * (len(numbers) - 1) + [last_seconds]
    parts = [
        np.sin(2 * np.pi * hz_of(n) * np.arange(round(length * RATE_HZ)) / RATE_HZ)
        for n, length in zip(numbers, lengths, strict=True)
    ]
    return 0.3 * np.concatenate(parts)


def write_seconds(path: Path, seconds: float) -> Path:
    """A file in which second k is tone k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = int(np.ceil(seconds))
    return write(path, tones(*range(whole), last_seconds=seconds - whole + 1), RATE_HZ)


@cache
def band_of(number: int, spec: MelSpec) -> int:
    """The mel band in which a tone is loudest."""
    wave_S = 0.3 * np.sin(2 * np.pi * hz_of(number) * np.arange(spec.sample_rate_hz) / spec.sample_rate_hz)
    mel_TF = log_mel(torch.from_numpy(wave_S.astype(np.float32))[None], spec)[0]
    return int(mel_TF[mel_TF.shape[0] // 2].argmax())


def heard(mel_TF: np.ndarray, n_frames: int, spec: MelSpec) -> list[int]:
    """The tone in the middle of every half second of a clip."""
    number_of = {band_of(number, spec): number for number in range(30)}
    assert len(number_of) == 30
    hop_seconds = spec.hop_samples / spec.sample_rate_hz
    middles = np.arange(0.25, n_frames * hop_seconds, 0.5)
    return [number_of[int(mel_TF[int(middle / hop_seconds)].argmax())] for middle in middles]


def built(corpus: Corpus, out: Path) -> tuple[FeatureStore, dict[str, list[int]]]:
    """The store, and what each good clip sounds like."""
    build_store(corpus, StoreOutput(path=out, spec=SPEC), BuildOptions(workers=0))
    store = FeatureStore.open(out)
    ids = store.manifest["clip_id"]
    return store, {
        ids[int(row)]: heard(store.read(np.array([row]))[0], int(store.n_frames_N[row]), SPEC)
        for row in store.good_rows()
    }


def halves(*seconds: int) -> list[int]:
    """What is heard of whole seconds."""
    return [second for second in seconds for _ in range(2)]
