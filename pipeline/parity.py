"""Parity: what a store holds, beside what its sounds give today."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.build import versions
from pipeline.errors import AudioError, BrokenClip
from pipeline.header import Header
from pipeline.on_the_fly import SoundReader
from pipeline.shardmaker import restore
from pipeline.store import FeatureStore
from pipeline.upkeep import told_of_build

WRITERS = ("python", "zarr")  # of `versions`: these do not touch a value
TOLERANCE_NAT = 0.1  # and a step of the stored dtype: what other versions may differ by


@dataclass(frozen=True, slots=True)
class Compared:
    """One row: `fault` where it is not what its sound gives, `gone` where there is no sound any more."""

    row: int
    clip_id: str
    apart_nat: float = 0.0  # the largest difference
    fault: str | None = None
    gone: str | None = None


def compared(store: Path, sample: int | None = None, seed: int = 0) -> Iterator[Compared]:
    """Good rows of a store, all or as many as `sample` drawn by `seed`, with their sounds decoded anew.

    Equal versions give equal bytes, and all else is a fault; where versions differ, so may values, by TOLERANCE_NAT.
    Raises StoreError where build.json does not say where the sounds lie, or its lists are not those of the store.
    """
    opened = FeatureStore.open(store, check="always")
    reader = SoundReader.of(store, opened.header, opened.n_frames_N)
    most_nat = 0.0 if not changed_versions(store) else TOLERANCE_NAT + step_nat(opened.header)
    rows_N = opened.good_rows()
    if sample is not None:
        rows_N = np.sort(np.random.default_rng(seed).permutation(rows_N)[:sample])
    with ThreadPoolExecutor(reader.threads) as threads:
        yield from threads.map(partial(_compare, opened, reader, most_nat), rows_N.tolist())


def changed_versions(store: Path) -> list[str]:
    """What values depend on and is not what it was when the store was built: `soxr 0.5.0, now 1.0.0`."""
    then, now = told_of_build(store).get("versions", {}), versions()
    names = (name for name in now if name not in WRITERS and then.get(name) != now[name])
    return [f"{name} {then.get(name, 'unknown')}, now {now[name]}" for name in names]


def step_nat(header: Header) -> float:
    """Between two values that can be stored: of uint8 everywhere, of float16 where it is coarsest, at the floor."""
    return (
        header.scale
        if header.layout.dtype == "uint8"
        else float(np.spacing(np.float16(header.spec.floor_log)))
    )


def _compare(store: FeatureStore, reader: SoundReader, most_nat: float, row: int) -> Compared:
    clip_id, frames, digest = store.manifest.select("clip_id", "n_frames", "digest").row(row)
    try:
        stored_TF = store.read(np.array([row]))[0]
        mel_TF, result = reader.heard(row)
    except BrokenClip as broken:
        return Compared(row, clip_id, fault=str(broken))
    except AudioError as error:
        if error.reason == "missing":
            return Compared(row, clip_id, gone=str(error))
        return Compared(row, clip_id, fault=f"its sound cannot be used any more: {error}")
    why = "" if result["digest"] == digest else "; its sound is not the one that it was built from"
    if result["n_frames"] != frames:
        return Compared(row, clip_id, fault=f"{frames} frames, its sound gives {result['n_frames']}{why}")
    if stored_TF.tobytes() == mel_TF.tobytes():
        return Compared(row, clip_id)
    apart_TF = (restore(stored_TF, store.header) - restore(mel_TF, store.header)).abs()
    apart_nat = float(apart_TF.max())
    if apart_nat <= most_nat:
        return Compared(row, clip_id, apart_nat)
    told = (
        f"up to {apart_nat:.3g} nat from what its sound gives, in {int((apart_TF > 0).sum()):,} values{why}"
    )
    return Compared(row, clip_id, apart_nat, fault=told)
