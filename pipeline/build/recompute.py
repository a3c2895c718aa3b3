"""Recompute rows of a store from their sounds, to read them instead of the stored rows or to compare both."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.audio.decode import AudioPolicy, load_clip_audio
from pipeline.audio.open_sound import OpenSound, OpenSounds
from pipeline.audio.sources import ClipSources
from pipeline.build.plan import current_versions
from pipeline.build.planned_corpus import corpus_as_built
from pipeline.build.prepare import read_build_record
from pipeline.build.shard_builder import compute_stored_row
from pipeline.errors import AudioError, BrokenClipError, InputError, StoreError
from pipeline.progress import track_progress
from pipeline.store.feature_store import FeatureStore
from pipeline.store.header import StoreHeader
from pipeline.threads import map_on_threads

# Accepts every clip, because the build has already decided which clips are good.
RECOMPUTE_POLICY = AudioPolicy(accept_truncated=True, keep_silent=True, max_seconds=math.inf)

UNCOMPARED_VERSIONS = ("python", "zarr")  # keys of `versions` in build.json on which no stored value depends

# If other versions wrote the store, values may differ by this tolerance plus one step of the stored dtype.
VERSION_TOLERANCE_NAT = 0.1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SoundReader:
    """Reads rows as a `ShardReader` does, but decodes and transforms their sounds as the store's build did.

    A clip takes milliseconds instead of microseconds, which is fast enough for small sets and comparisons. Raises
    BrokenClipError if a sound is gone or its length differs from the stored clip, StoreError if a server does not
    answer.
    """

    header: StoreHeader
    sources: ClipSources
    plan: pl.DataFrame
    n_frames_N: np.ndarray  # valid frames of every row of the store
    threads: int  # clips that are decoded at the same time
    rows_N: np.ndarray | None = None  # the rows of `sources` and `plan`, ascending; None if they have all

    @classmethod
    def of_store(
        cls,
        path: Path,
        header: StoreHeader,
        n_frames_N: np.ndarray,
        *,
        threads: int = 2,
        rows_N: np.ndarray | None = None,
    ) -> Self:
        """Return a reader of the store at `path`, with the sounds of its build.json; raises as `corpus_as_built`.

        With `rows_N`, ascending, it reads only these rows, and has only their places in memory.
        """
        corpus = corpus_as_built(path, header)
        sources, plan = corpus.sources, corpus.plan
        if rows_N is not None:
            sources = replace(sources, frame=sources.frame[rows_N])
            plan = plan.select("start_seconds", "end_seconds")[rows_N]
        return cls(
            header=header,
            sources=sources,
            plan=plan,
            n_frames_N=n_frames_N,
            threads=threads,
            rows_N=rows_N,
        )

    def read(self, rows_B: np.ndarray, starts_B: np.ndarray, out_BTF: np.ndarray) -> None:
        """Write frames [start, start + T) of each row to `out_BTF`."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="sounds") as threads:
            mels = threads.map(self._recompute_mel, rows_B.tolist())
            for mel_TF, start, out_TF in zip(mels, starts_B.tolist(), out_BTF, strict=True):
                out_TF[:] = mel_TF[start : start + len(out_TF)]

    def _recompute_mel(self, row: int) -> np.ndarray:
        """Return a row as stored, `mel_TF`; raises BrokenClipError if its sound gives no clip or has another length."""
        try:
            mel_TF, result = self.recompute_row(row)
        except AudioError as error:
            raise BrokenClipError(row, f"{error.reason}: {error}") from None
        except InputError as error:  # a server does not answer, so the clip is not broken
            raise StoreError(str(error)) from None
        if result["n_frames"] != self.n_frames_N[row]:
            raise BrokenClipError(
                row, f"its sound has {result['n_frames']} frames, the store {self.n_frames_N[row]}"
            )
        return mel_TF

    def recompute_row(
        self, row: int, open_sound: OpenSound | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return a row as a build would store it, `mel_TF`, and its results without `source`; raises AudioError.

        `open_sound` is for rows in ascending order (`load_clip_audio`).
        """
        place = row if self.rows_N is None else int(np.searchsorted(self.rows_N, row))
        (locator,) = self.sources.locators_of_rows(range(place, place + 1))
        if locator is None:
            raise AudioError("missing", "no sound for it in the folders and archives of the build")
        start, end = self.plan.select("start_seconds", "end_seconds").row(place)
        seconds = min(end - start, self.header.spec.clip_seconds)
        audio = load_clip_audio(
            locator,
            start_seconds=start,
            end_seconds=start + seconds,
            policy=RECOMPUTE_POLICY,
            open_sound=open_sound,
        )
        return compute_stored_row(audio, self.header)


def recomputed_store(store: FeatureStore, *, threads: int = 2) -> FeatureStore:
    """Return the same store, but with values that are computed from the sounds on `threads` threads.

    Raises StoreError as `corpus_as_built` does.
    """
    reader = SoundReader.of_store(store.path, store.header, store.n_frames_N, threads=threads)
    return FeatureStore(store.path, store.header, store.manifest_table, store.store_id, reader=reader)


@dataclass(frozen=True, slots=True)
class RowComparison:
    """The comparison of a stored row with the row that is computed from its sound now."""

    row: int
    clip_id: str
    difference_nat: float = 0.0  # largest difference of a stored value and its recomputed value
    fault: str | None = None  # how the stored row is wrong; None if it is right
    missing_sound: str | None = None  # why the row could not be compared; None if it was


def compare_with_audio(
    store: Path, sample: int | None = None, seed: int = 0, *, progress: bool = False
) -> Iterator[RowComparison]:
    """Yield the comparison of each good row with its sound, for all rows or for `sample` rows drawn by `seed`.

    If the software versions are those of the build, every different bit is a fault. Otherwise values may differ by
    VERSION_TOLERANCE_NAT plus one step of the stored dtype. Raises StoreError as `corpus_as_built` does.
    """
    opened = FeatureStore.open(store, check="always")

    # The drawn rows are compared in ascending order.
    rows_N = opened.good_rows()
    if sample is not None:
        rows_N = np.sort(np.random.default_rng(seed).permutation(rows_N)[:sample])
    clips = opened.manifest_columns("clip_id", "n_frames", "digest")[rows_N]
    reader = SoundReader.of_store(
        store, opened.header, opened.n_frames_N, rows_N=None if sample is None else rows_N
    )

    # The versions come last: they import PyTorch, which takes as much memory as the places of two million sounds.
    tolerance_nat = 0.0
    if changed_versions(store):
        tolerance_nat = VERSION_TOLERANCE_NAT + quantisation_step_nat(opened.header)
    jobs = zip(rows_N.tolist(), clips.iter_rows(), strict=True)
    with OpenSounds() as open_sounds:
        compare = partial(_compare_row, opened, reader, open_sounds, tolerance_nat)
        compared = map_on_threads(compare, jobs, reader.threads)
        yield from track_progress(compared, len(rows_N), label="compare", unit="row", shown=progress)


def changed_versions(store: Path) -> list[str]:
    """Return the versions that differ from the store's build and may change values, as `soxr 0.5.0, now 1.0.0`."""
    built_with = read_build_record(store).get("versions", {})
    changes = []
    for name, version in current_versions().items():
        if name not in UNCOMPARED_VERSIONS and built_with.get(name) != version:
            changes.append(f"{name} {built_with.get(name, 'unknown')}, now {version}")
    return changes


def quantisation_step_nat(header: StoreHeader) -> float:
    """Return the step between two neighbouring stored values; for float16 the largest step, which is at the floor."""
    if header.layout.dtype == "uint8":
        return header.scale
    return float(np.spacing(np.float16(header.spec.floor_log)))


def _compare_row(
    store: FeatureStore,
    reader: SoundReader,
    open_sounds: OpenSounds,
    tolerance_nat: float,
    row_and_clip: tuple[int, tuple[str, int, str]],
) -> RowComparison:
    """Compare one good row with its sound; the clip is its id, frames and digest in the manifest."""
    row, (clip_id, frames, digest) = row_and_clip

    # The recomputed row and the stored row; either may be impossible to get.
    try:
        stored_TF = store.read(np.array([row]))[0]
        mel_TF, result = reader.recompute_row(row, open_sounds.sound_of_thread())
    except BrokenClipError as broken:
        return RowComparison(row, clip_id, fault=str(broken))
    except AudioError as error:
        if error.reason == "missing":
            return RowComparison(row, clip_id, missing_sound=str(error))
        return RowComparison(row, clip_id, fault=f"its sound cannot be used any more: {error}")

    # The length, then the values.
    explanation = ""
    if result["digest"] != digest:
        explanation = "; its sound is not the one that it was built from"
    if result["n_frames"] != frames:
        return RowComparison(
            row, clip_id, fault=f"{frames} frames, its sound gives {result['n_frames']}{explanation}"
        )
    if stored_TF.tobytes() == mel_TF.tobytes():
        return RowComparison(row, clip_id)
    difference_TF = np.abs(store.header.to_log_mel(stored_TF) - store.header.to_log_mel(mel_TF))
    difference_nat = float(difference_TF.max())
    if difference_nat <= tolerance_nat:
        return RowComparison(row, clip_id, difference_nat)
    values = int((difference_TF > 0).sum())
    return RowComparison(
        row,
        clip_id,
        difference_nat,
        fault=f"up to {difference_nat:.3g} nat from what its sound gives, in {values:,} values{explanation}",
    )
