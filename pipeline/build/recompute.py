"""On the fly: the rows of a store, recomputed from their sounds whenever they are read.

Parity: what a store holds, beside what its sounds give today.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.audio.decode import AudioPolicy, load_clip_audio
from pipeline.audio.sources import ClipSources
from pipeline.build.plan import StoreOutput, current_versions, plan_store
from pipeline.build.prepare import read_build_record
from pipeline.build.shard_builder import compute_stored_row, dequantise_mel
from pipeline.datasets.catalogue import recreate_corpus
from pipeline.datasets.corpus import Corpus
from pipeline.errors import AudioError, BrokenClipError, InputError, StoreError
from pipeline.store.feature_store import FeatureStore
from pipeline.store.header import StoreHeader

# What is good in the store was judged when it was built.
RECOMPUTE_POLICY = AudioPolicy(accept_truncated=True, keep_silent=True, max_seconds=math.inf)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SoundReader:
    """In the place of a `ShardReader`: the same values, decoded and transformed as the store's build did it.

    A clip takes milliseconds instead of microseconds: for small sets, and to compare. Raises BrokenClip where a sound
    is gone or is another than it was, StoreError where a server does not answer.
    """

    header: StoreHeader
    sources: ClipSources
    plan: pl.DataFrame
    n_frames_N: np.ndarray  # of the store
    threads: int

    @classmethod
    def of_store(cls, path: Path, header: StoreHeader, n_frames_N: np.ndarray, *, threads: int = 2) -> Self:
        """For the store at `path`, from where its build.json says that the sounds lie.

        Raises StoreError where it does not say so, or the lists are no longer those of the store.
        """
        corpus = corpus_as_built(path, header)
        return cls(
            header=header, sources=corpus.sources, plan=corpus.plan, n_frames_N=n_frames_N, threads=threads
        )

    def read(self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray) -> None:
        """Frames [start, start + T) of each row."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="sounds") as threads:
            mels = threads.map(self._recompute_mel, rows_B.tolist())
            for mel_TF, start, out_TF in zip(mels, starts_B.tolist(), out_BTF, strict=True):
                out_TF[:] = mel_TF[start : start + len(out_TF)]

    def _recompute_mel(self, row: int) -> np.ndarray:
        try:
            mel_TF, result = self.recompute_row(row)
        except AudioError as error:
            raise BrokenClipError(row, f"{error.reason}: {error}") from None
        except InputError as error:  # a server
            raise StoreError(str(error)) from None
        if result["n_frames"] != self.n_frames_N[row]:
            told = f"its sound has {result['n_frames']} frames, the store {self.n_frames_N[row]}"
            raise BrokenClipError(row, told)
        return mel_TF

    def recompute_row(self, row: int) -> tuple[np.ndarray, dict[str, Any]]:
        """A row as the store would hold it, and its result columns but for `source`; raises AudioError."""
        (locator,) = self.sources.locators_of_rows(range(row, row + 1))
        if locator is None:
            raise AudioError("missing", "no sound for it in the folders and archives of the build")
        begin, end = self.plan.select("start_seconds", "end_seconds").row(row)
        seconds = min(end - begin, self.header.spec.clip_seconds)
        audio = load_clip_audio(
            locator, start_seconds=begin, end_seconds=begin + seconds, policy=RECOMPUTE_POLICY
        )
        return compute_stored_row(audio, self.header)


def corpus_as_built(path: Path, header: StoreHeader) -> Corpus:
    """What a store was built from, found again; StoreError: build.json does not tell, or it tells other clips now."""
    corpus = recreate_corpus(read_build_record(path)["asked"])
    if plan_store(corpus, StoreOutput(path=path, spec=header.spec, dtype=header.layout.dtype)) != header:
        told = "was planned from other clips, lists or classes than are there now"
        raise StoreError(f"{path}: {told}; put back what {path / 'build.json'} says it was built from")
    return corpus


def recomputed_store(store: FeatureStore, *, threads: int = 2) -> FeatureStore:
    """The same store, its values computed from the sounds: `threads` clips of a batch at a time.

    Raises StoreError where build.json does not say where they lie, or its lists are no longer those of the store.
    """
    reader = SoundReader.of_store(store.path, store.header, store.n_frames_N, threads=threads)
    return FeatureStore(store.path, store.header, store.manifest, store.store_id, reader=reader)


UNCOMPARED_VERSIONS = ("python", "zarr")  # of `versions`: these do not touch a value

VERSION_TOLERANCE_NAT = 0.1  # and a step of the stored dtype: what other versions may differ by


@dataclass(frozen=True, slots=True)
class RowComparison:
    """One row: `fault` where it is not what its sound gives, `gone` where there is no sound any more."""

    row: int
    clip_id: str
    difference_nat: float = 0.0  # the largest difference
    fault: str | None = None
    missing_sound: str | None = None


def compare_with_audio(store: Path, sample: int | None = None, seed: int = 0) -> Iterator[RowComparison]:
    """Good rows of a store, all or as many as `sample` drawn by `seed`, with their sounds decoded anew.

    Equal versions give equal bytes, and all else is a fault; where versions differ, so may values, by TOLERANCE_NAT.
    Raises StoreError where build.json does not say where the sounds lie, or its lists are not those of the store.
    """
    opened = FeatureStore.open(store, check="always")
    reader = SoundReader.of_store(store, opened.header, opened.n_frames_N)
    most_nat = (
        0.0 if not changed_versions(store) else VERSION_TOLERANCE_NAT + quantisation_step_nat(opened.header)
    )
    rows_N = opened.good_rows()
    if sample is not None:
        rows_N = np.sort(np.random.default_rng(seed).permutation(rows_N)[:sample])
    with ThreadPoolExecutor(reader.threads) as threads:
        yield from threads.map(partial(_compare_row, opened, reader, most_nat), rows_N.tolist())


def changed_versions(store: Path) -> list[str]:
    """What values depend on and is not what it was when the store was built: `soxr 0.5.0, now 1.0.0`."""
    then, now = read_build_record(store).get("versions", {}), current_versions()
    names = (name for name in now if name not in UNCOMPARED_VERSIONS and then.get(name) != now[name])
    return [f"{name} {then.get(name, 'unknown')}, now {now[name]}" for name in names]


def quantisation_step_nat(header: StoreHeader) -> float:
    """Between two values that can be stored: of uint8 everywhere, of float16 where it is coarsest, at the floor."""
    return (
        header.scale
        if header.layout.dtype == "uint8"
        else float(np.spacing(np.float16(header.spec.floor_log)))
    )


def _compare_row(store: FeatureStore, reader: SoundReader, tolerance_nat: float, row: int) -> RowComparison:
    clip_id, frames, digest = store.manifest.select("clip_id", "n_frames", "digest").row(row)
    try:
        stored_TF = store.read(np.array([row]))[0]
        mel_TF, result = reader.recompute_row(row)
    except BrokenClipError as broken:
        return RowComparison(row, clip_id, fault=str(broken))
    except AudioError as error:
        if error.reason == "missing":
            return RowComparison(row, clip_id, missing_sound=str(error))
        return RowComparison(row, clip_id, fault=f"its sound cannot be used any more: {error}")
    why = "" if result["digest"] == digest else "; its sound is not the one that it was built from"
    if result["n_frames"] != frames:
        return RowComparison(
            row, clip_id, fault=f"{frames} frames, its sound gives {result['n_frames']}{why}"
        )
    if stored_TF.tobytes() == mel_TF.tobytes():
        return RowComparison(row, clip_id)
    apart_TF = (dequantise_mel(stored_TF, store.header) - dequantise_mel(mel_TF, store.header)).abs()
    apart_nat = float(apart_TF.max())
    if apart_nat <= tolerance_nat:
        return RowComparison(row, clip_id, apart_nat)
    told = (
        f"up to {apart_nat:.3g} nat from what its sound gives, in {int((apart_TF > 0).sum()):,} values{why}"
    )
    return RowComparison(row, clip_id, apart_nat, fault=told)
