"""On the fly: the rows of a store, recomputed from their sounds whenever they are read."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.audio import AudioPolicy, load
from pipeline.build import Output, plan_store
from pipeline.datasets.catalogue import corpus_of
from pipeline.errors import AudioError, BrokenClip, InputError, StoreError
from pipeline.header import Header
from pipeline.locators import Sources
from pipeline.shardmaker import spectrogram
from pipeline.store import FeatureStore
from pipeline.upkeep import check_same, told_of_build

LOOSE = AudioPolicy(
    accept_truncated=True, keep_silent=True
)  # what is good in the store was judged when it was built


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SoundReader:
    """In the place of a `ShardReader`: the same values, decoded and transformed as the store's build did it.

    A clip takes milliseconds instead of microseconds: for small sets, and to compare. Raises BrokenClip where a sound
    is gone or is another than it was, StoreError where a server does not answer.
    """

    header: Header
    sources: Sources
    plan: pl.DataFrame
    n_frames_N: np.ndarray  # of the store
    threads: int

    @classmethod
    def of(cls, path: Path, header: Header, n_frames_N: np.ndarray, *, threads: int = 2) -> Self:
        """For the store at `path`, from where its build.json says that the sounds lie.

        Raises StoreError where it does not say so, or the lists are no longer those of the store.
        """
        corpus = corpus_of(told_of_build(path)["asked"])
        output = Output(path=path, spec=header.spec, dtype=header.layout.dtype)
        check_same(path, header, plan_store(corpus, output))
        return cls(
            header=header, sources=corpus.sources, plan=corpus.plan, n_frames_N=n_frames_N, threads=threads
        )

    def read(self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray) -> None:
        """Frames [start, start + T) of each row."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="sounds") as threads:
            mels = threads.map(self._mel, rows_B.tolist())
            for mel_TF, start, out_TF in zip(mels, starts_B.tolist(), out_BTF, strict=True):
                out_TF[:] = mel_TF[start : start + len(out_TF)]

    def _mel(self, row: int) -> np.ndarray:
        try:
            mel_TF, result = self.heard(row)
        except AudioError as error:
            raise BrokenClip(row, f"{error.reason}: {error}") from None
        except InputError as error:  # a server
            raise StoreError(str(error)) from None
        if result["n_frames"] != self.n_frames_N[row]:
            told = f"its sound has {result['n_frames']} frames, the store {self.n_frames_N[row]}"
            raise BrokenClip(row, told)
        return mel_TF

    def heard(self, row: int) -> tuple[np.ndarray, dict[str, Any]]:
        """A row as the store would hold it, and its result columns but for `source`; raises AudioError."""
        (locator,) = self.sources.locators(range(row, row + 1))
        if locator is None:
            raise AudioError("missing", "no sound for it in the folders and archives of the build")
        begin, end = self.plan.select("start_seconds", "end_seconds").row(row)
        seconds = min(end - begin, self.header.spec.clip_seconds)
        audio = load(locator, start_seconds=begin, end_seconds=begin + seconds, policy=LOOSE)
        return spectrogram(audio, self.header)


def on_the_fly(store: FeatureStore, *, threads: int = 2) -> FeatureStore:
    """The same store, its values computed from the sounds: `threads` clips of a batch at a time.

    Raises StoreError where build.json does not say where they lie, or its lists are no longer those of the store.
    """
    reader = SoundReader.of(store.path, store.header, store.n_frames_N, threads=threads)
    return FeatureStore(store.path, store.header, store.manifest, store.store_id, reader=reader)
