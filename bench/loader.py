"""Random reads and whole batches beside what others would use: the same clips, the same number of processes, one run.

    just bench loader [--clips 2048] [--batch 64] [--rounds 5]

Clips of 10 s (`a-jepa`, 998 x 128) as float16 and uint8, read in turns, medians. Cold: the page cache is emptied of a
side's files before its turn. Start-up is left out on all sides: every loader has made batches before the clock
runs. Last, the share of pre-training spent waiting for data, ViT-B (`a-jepa`) on a GPU, the small encoder on a CPU.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import zarr

from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.catalogue import pretrain_recipe
from bench.build import LIST, SPEC, make_files
from bench.loader_peers import (
    Hdf5Clips,
    Normalise,
    StoreClips,
    data_loader,
    web_loader,
    write_hdf5,
    write_tars,
)
from bench.machine import machine
from pipeline.build.build import build_stores
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.audioset import audioset_corpus
from pipeline.loading.augment import Augment
from pipeline.loading.dali import DaliLoader
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore

DTYPES = ("float16", "uint8")

VIEW_FRAMES = 1_024

UNTIMED_STEPS = 8

WAIT_STEPS, LOG_STEPS = 40, 5

AUGMENT = Augment(roll=True, gain_db=6, time_mask_frames=192, band_mask_bands=48, mixup_share=0.5)

PROCESSES = 2


def evict(path: Path) -> None:
    """Have the system forget a file, or every file below a folder."""
    for file in [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_stores(folder: Path, clips: int) -> list[FeatureStore]:
    """The same clips in one store of each dtype."""
    make_files(folder, ["wav"], clips)
    outputs = [StoreOutput(path=folder / f"{dtype}.zarr", spec=SPEC, dtype=dtype) for dtype in DTYPES]
    build_stores(audioset_corpus([folder / "wav"], [folder / LIST]), outputs, BuildOptions(workers=PROCESSES))
    return [FeatureStore.open(output.path) for output in outputs]


class Reads:
    """Ways to read the stored values of some rows, and the files that each reads."""

    def __init__(self, store: FeatureStore, folder: Path, batch: int) -> None:
        self.store, self.flat = store, folder / "flat"
        self.out_BTF = np.empty((batch, store.frames, store.bands), store.dtype)
        self.array = zarr.open_array(store.path / "mel", mode="r")
        self.hdf5 = h5py.File(folder / "mel.h5")
        flat_NTF = self.mapped("w+")
        for row in range(len(flat_NTF)):
            store.read(np.array([row]), out=flat_NTF[row : row + 1])
        flat_NTF.flush()
        self.map()

    def map(self) -> None:
        self.flat_NTF, self.maps = self.mapped("r"), FeatureStore.open(self.store.path, io="mmap")

    def mapped(self, mode: Literal["r", "w+"]) -> np.memmap:
        shape = (len(self.store.n_frames_N), *self.out_BTF.shape[1:])
        return np.memmap(self.flat, self.store.dtype, mode, shape=shape)

    def ways(self) -> dict[str, tuple[Callable[[np.ndarray], object], Path]]:
        return {
            "ours": (lambda rows_B: self.store.read(rows_B, out=self.out_BTF), self.store.path),
            "ours, io mmap": (lambda rows_B: self.maps.read(rows_B, out=self.out_BTF), self.store.path),
            "raw memmap": (lambda rows_B: self.one_by_one(self.flat_NTF, rows_B), self.flat),
            "zarr-python oindex": (lambda rows_B: self.array.oindex[rows_B], self.store.path),
            "HDF5 (h5py)": (
                lambda rows_B: self.one_by_one(self.hdf5["mel"], rows_B),
                self.flat.parent / "mel.h5",
            ),
        }

    def one_by_one(self, mel_NTF: np.ndarray | h5py.Dataset, rows_B: np.ndarray) -> None:
        for mel_TF, row in zip(self.out_BTF, rows_B, strict=True):
            mel_TF[:] = mel_NTF[row]

    def forget(self, files: Path) -> None:
        """Have the system forget these files; what is mapped it would keep."""
        del self.flat_NTF, self.maps
        evict(files)
        self.map()


def read_table(store: FeatureStore, folder: Path, batch: int, rounds: int) -> None:
    """Print how long each way takes to read random rows, in turns on the same ones."""
    reads, rng = Reads(store, folder, batch), np.random.default_rng(0)
    ways = reads.ways()
    took: dict[tuple[str, bool], list[float]] = {}
    for cold in [False] * (4 * rounds) + [True] * rounds:
        rows_B = np.sort(rng.choice(len(store.n_frames_N), batch, replace=False))
        for name, (read, files) in ways.items():
            if cold:
                reads.forget(files)
            began = time.perf_counter()
            read(rows_B)
            took.setdefault((name, cold), []).append(time.perf_counter() - began)
    print(f"\nrandom read of {batch} clips, {store.dtype}   warm ms    x ours    cold ms    x ours")
    ours = [statistics.median(took["ours", cold]) for cold in (False, True)]
    for name in ways:
        warm, cold = (statistics.median(took[name, cold]) for cold in (False, True))
        told = f"{1000 * warm:10.2f}{warm / ours[0]:10.2f}{1000 * cold:11.2f}{cold / ours[1]:10.2f}"
        print(f"  {name:<30}{told}", flush=True)


def makers(
    stores: list[FeatureStore], folder: Path, batch: int
) -> dict[str, tuple[Callable[[], Iterator[object]], Path]]:
    """An epoch of batches from each side, and the files that it reads."""
    sides: dict[str, tuple[Callable[[], Iterator[object]], Path]] = {}
    for store in stores:
        view = view_of(store)
        order = RowOrder(rows_N=store.good_rows(), clips=batch, seed=0)
        normalise = Normalise(view, store.scale, store.offset)
        rows_N = np.concatenate([order.rows_at_step(step) for step in range(order.steps_per_epoch)])
        loaders = {
            "PlainLoader": (PlainLoader, view),
            "DaliLoader": (partial(DaliLoader, threads=PROCESSES), view),
            "DaliLoader augmented": (partial(DaliLoader, threads=PROCESSES), replace(view, augment=AUGMENT)),
        }
        for name, (loader, shown) in loaders.items():
            made = loader(store, order, shown)
            sides[f"{name}, {store.dtype}"] = partial(made.batches, 0, order.steps_per_epoch), store.path
        feed = data_loader(StoreClips(store, normalise), rows_N, batch, PROCESSES)
        sides[f"DataLoader, {store.dtype}"] = partial(iter, feed), store.path
        if store.dtype == np.float16:
            hdf5 = data_loader(Hdf5Clips(folder / "mel.h5", normalise), rows_N, batch, PROCESSES)
            sides["DataLoader, HDF5, float16"] = partial(iter, hdf5), folder / "mel.h5"
            web = web_loader(folder / "tars", normalise, batch, PROCESSES)
            sides["webdataset, float16"] = partial(iter, web), folder / "tars"
    return sides


def view_of(store: FeatureStore) -> View:
    return View(frames=VIEW_FRAMES, mean=store.stats["all"]["mean"], std=store.stats["all"]["std"])


def clips_per_second(batches: Iterator[object], batch: int) -> float:
    """Over an epoch's steps after the first few, to its end; the batches are thrown away."""
    for _ in itertools.islice(batches, UNTIMED_STEPS):
        pass
    began = time.perf_counter()
    steps = sum(1 for _ in batches)
    return steps * batch / (time.perf_counter() - began)


def loader_table(stores: list[FeatureStore], folder: Path, batch: int, rounds: int) -> None:
    """Print the speeds of whole normalised batches, in turns."""
    sides = makers(stores, folder, batch)
    speeds: dict[tuple[str, bool], list[float]] = {}
    for cold in [False] * (rounds + 1) + [True] * rounds:  # the first round starts the processes
        for name, (make, files) in sides.items():
            if cold:
                evict(files)
            speeds.setdefault((name, cold), []).append(clips_per_second(make(), batch))
    print(
        f"\nbatches of {batch} x {VIEW_FRAMES} x {stores[0].bands}, {PROCESSES} threads or processes, clips/s"
    )
    print(f"{'':34}{'warm':>10}{'x DataLoader':>14}{'cold':>10}{'x DataLoader':>14}")
    for name in sides:
        dtype, told = name.rpartition(", ")[2], f"  {name:<32}"
        for cold in (False, True):
            mine, base = (
                statistics.median(speeds[side, cold][not cold :]) for side in (name, f"DataLoader, {dtype}")
            )
            told += f"{mine:10.0f}{mine / base:14.2f}"
        print(told, flush=True)


def wait_line(store: FeatureStore, folder: Path) -> None:
    """Print how long a trainer waits, once its first steps are over."""
    on_gpu = torch.cuda.is_available()
    made = pretrain_recipe("a-jepa" if on_gpu else "small").with_counts(clips_per_step=64 if on_gpu else None)
    run = pretrain(
        store.path,
        replace(made, log_every=LOG_STEPS),
        folder / "run",
        steps=WAIT_STEPS,
        say=lambda line: None,
    )
    lines = run.read_metrics()[1:]
    wait, speed = (statistics.median(line[name] for line in lines) for name in ("data_wait", "clips_per_s"))
    where = torch.cuda.get_device_name() if on_gpu else "CPU; ViT-B on a GPU: skipped, there is none"
    print(
        f"\npre-training, recipe {made.name} ({where}): {speed:.0f} clips/s, {wait:.1%} of the time waiting"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=2_048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if asked.clips < 2 * UNTIMED_STEPS * asked.batch:
        parser.error(f"--clips {asked.clips}: expected {2 * UNTIMED_STEPS * asked.batch} at least")
    torch.set_num_threads(PROCESSES)
    print(machine("ajepa", "torch", "nvidia-dali-cuda130", "zarr", "h5py", "webdataset", "numpy"))
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        folder = Path(scratch)
        stores = make_stores(folder, asked.clips)
        write_hdf5(stores[0], folder / "mel.h5")
        write_tars(stores[0], folder / "tars")
        read_table(stores[0], folder, asked.batch, asked.rounds)
        loader_table(stores, folder, asked.batch, asked.rounds)
        wait_line(stores[0], folder)


if __name__ == "__main__":
    main()
