"""Random reads and whole batches beside other tools: the same clips, the same number of processes, one run.

    just bench loader [--clips 2048] [--batch 64] [--rounds 5]

Clips of 10 s (`a-jepa`, 998 x 128) as float16 and uint8, read in turns; the tables have medians. Cold: a side's files
are dropped from the page cache before its turn. Start-up is left out on all sides: every loader has made batches before
it is timed. Last comes the share of pre-training spent waiting for data, of ViT-B (`a-jepa`) on a GPU or of the small
encoder on a CPU.
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

WAIT_STEPS = 40  # of pre-training

LOG_STEPS = 5

AUGMENT = Augment(roll=True, gain_db=6, time_mask_frames=192, band_mask_bands=48, mixup_share=0.5)

PROCESSES = 2


def evict(path: Path) -> None:
    """Drop a file, or every file below a folder, from the page cache."""
    for file in [path, *path.rglob("*")]:
        if not file.is_file():
            continue
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_stores(folder: Path, clips: int) -> list[FeatureStore]:
    """Build one store of each dtype from the same clips."""
    make_files(folder, ["wav"], clips)
    outputs = [StoreOutput(path=folder / f"{dtype}.zarr", spec=SPEC, dtype=dtype) for dtype in DTYPES]
    build_stores(audioset_corpus([folder / "wav"], [folder / LIST]), outputs, BuildOptions(workers=PROCESSES))
    return [FeatureStore.open(output.path) for output in outputs]


class RandomReads:
    """Ways to read the stored values of some rows, and the files that each way reads."""

    def __init__(self, store: FeatureStore, folder: Path, batch: int) -> None:
        self.store = store
        self.flat_file = folder / "flat"
        self.out_BTF = np.empty((batch, store.frames, store.bands), store.dtype)
        self.zarr_array = zarr.open_array(store.path / "mel", mode="r")
        self.hdf5 = h5py.File(folder / "mel.h5")

        # The raw file holds the rows one after the other.
        flat_NTF = self.map_flat_file("w+")
        for row in range(len(flat_NTF)):
            store.read(np.array([row]), out=flat_NTF[row : row + 1])
        flat_NTF.flush()
        self.open_maps()

    def open_maps(self) -> None:
        self.flat_NTF = self.map_flat_file("r")
        self.mapped_store = FeatureStore.open(self.store.path, io="mmap")

    def map_flat_file(self, mode: Literal["r", "w+"]) -> np.memmap:
        shape = (len(self.store.n_frames_N), *self.out_BTF.shape[1:])
        return np.memmap(self.flat_file, self.store.dtype, mode, shape=shape)

    def ways(self) -> dict[str, tuple[Callable[[np.ndarray], object], Path]]:
        """The function and the files of each way, by name."""
        return {
            "ours": (lambda rows_B: self.store.read(rows_B, out=self.out_BTF), self.store.path),
            "ours, io mmap": (
                lambda rows_B: self.mapped_store.read(rows_B, out=self.out_BTF),
                self.store.path,
            ),
            "raw memmap": (lambda rows_B: self.copy_rows(self.flat_NTF, rows_B), self.flat_file),
            "zarr-python oindex": (lambda rows_B: self.zarr_array.oindex[rows_B], self.store.path),
            "HDF5 (h5py)": (
                lambda rows_B: self.copy_rows(self.hdf5["mel"], rows_B),
                self.flat_file.parent / "mel.h5",
            ),
        }

    def copy_rows(self, mel_NTF: np.ndarray | h5py.Dataset, rows_B: np.ndarray) -> None:
        for mel_TF, row in zip(self.out_BTF, rows_B, strict=True):
            mel_TF[:] = mel_NTF[row]

    def drop_from_cache(self, files: Path) -> None:
        """Drop these files from the page cache, which would keep mapped ones."""
        del self.flat_NTF, self.mapped_store
        evict(files)
        self.open_maps()


def print_read_table(store: FeatureStore, folder: Path, batch: int, rounds: int) -> None:
    """Print how long each way takes to read random rows, in turns on the same rows."""
    # Measure.
    reads = RandomReads(store, folder, batch)
    rng = np.random.default_rng(0)
    ways = reads.ways()
    seconds: dict[tuple[str, bool], list[float]] = {}
    for is_cold in [False] * (4 * rounds) + [True] * rounds:
        rows_B = np.sort(rng.choice(len(store.n_frames_N), batch, replace=False))
        for name, (read, files) in ways.items():
            if is_cold:
                reads.drop_from_cache(files)
            began = time.perf_counter()
            read(rows_B)
            seconds.setdefault((name, is_cold), []).append(time.perf_counter() - began)

    # Print.
    print(f"\nrandom read of {batch} clips, {store.dtype}   warm ms    x ours    cold ms    x ours")
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    for name in ways:
        warm = medians[name, False]
        cold = medians[name, True]
        figures = f"{1000 * warm:10.2f}{warm / medians['ours', False]:10.2f}"
        figures += f"{1000 * cold:11.2f}{cold / medians['ours', True]:10.2f}"
        print(f"  {name:<30}{figures}", flush=True)


def epoch_functions(
    stores: list[FeatureStore], folder: Path, batch: int
) -> dict[str, tuple[Callable[[], Iterator[object]], Path]]:
    """For each side, a function that yields the batches of an epoch, and the files that it reads."""
    sides: dict[str, tuple[Callable[[], Iterator[object]], Path]] = {}
    for store in stores:
        view = whole_clip_view(store)
        order = RowOrder(rows_N=store.good_rows(), clips=batch, seed=0)
        steps = order.steps_per_epoch

        # Ours.
        loaders = {
            "PlainLoader": (PlainLoader, view),
            "DaliLoader": (partial(DaliLoader, threads=PROCESSES), view),
            "DaliLoader augmented": (partial(DaliLoader, threads=PROCESSES), replace(view, augment=AUGMENT)),
        }
        for name, (loader_class, loader_view) in loaders.items():
            loader = loader_class(store, order, loader_view)
            sides[f"{name}, {store.dtype}"] = partial(loader.batches, 0, steps), store.path

        # Theirs, on the same rows.
        normalise = Normalise(view, store.scale, store.offset)
        rows_N = np.concatenate([order.rows_at_step(step) for step in range(steps)])
        torch_loader = data_loader(StoreClips(store, normalise), rows_N, batch, PROCESSES)
        sides[f"DataLoader, {store.dtype}"] = partial(iter, torch_loader), store.path
        if store.dtype == np.float16:
            hdf5 = data_loader(Hdf5Clips(folder / "mel.h5", normalise), rows_N, batch, PROCESSES)
            sides["DataLoader, HDF5, float16"] = partial(iter, hdf5), folder / "mel.h5"
            web = web_loader(folder / "tars", normalise, batch, PROCESSES)
            sides["webdataset, float16"] = partial(iter, web), folder / "tars"
    return sides


def whole_clip_view(store: FeatureStore) -> View:
    """A view of whole clips, normalised by the store's own statistics."""
    return View(frames=VIEW_FRAMES, mean=store.stats["all"]["mean"], std=store.stats["all"]["std"])


def clips_per_second(batches: Iterator[object], batch: int) -> float:
    """Clips/s from the first batches of an epoch to its end."""
    for _ in itertools.islice(batches, UNTIMED_STEPS):
        pass
    began = time.perf_counter()
    steps = sum(1 for _ in batches)
    return steps * batch / (time.perf_counter() - began)


def print_loader_table(stores: list[FeatureStore], folder: Path, batch: int, rounds: int) -> None:
    """Print the speeds of whole normalised batches, in turns."""
    # Measure; the first round starts the processes and is not counted.
    sides = epoch_functions(stores, folder, batch)
    speeds: dict[tuple[str, bool], list[float]] = {}
    for is_cold in [False] * (rounds + 1) + [True] * rounds:
        for name, (epoch_batches, files) in sides.items():
            if is_cold:
                evict(files)
            speeds.setdefault((name, is_cold), []).append(clips_per_second(epoch_batches(), batch))
    medians = {
        (name, is_cold): statistics.median(values if is_cold else values[1:])
        for (name, is_cold), values in speeds.items()
    }

    # Print.
    print(
        f"\nbatches of {batch} x {VIEW_FRAMES} x {stores[0].bands}, {PROCESSES} threads or processes, clips/s"
    )
    print(f"{'':34}{'warm':>10}{'x DataLoader':>14}{'cold':>10}{'x DataLoader':>14}")
    for name in sides:
        dtype = name.rpartition(", ")[2]
        line = f"  {name:<32}"
        for is_cold in (False, True):
            speed = medians[name, is_cold]
            line += f"{speed:10.0f}{speed / medians[f'DataLoader, {dtype}', is_cold]:14.2f}"
        print(line, flush=True)


def print_wait_line(store: FeatureStore, folder: Path) -> None:
    """Print how long a trainer waits, once its first steps are over."""
    if torch.cuda.is_available():
        recipe = pretrain_recipe("a-jepa").with_counts(clips_per_step=64)
        device = torch.cuda.get_device_name()
    else:
        recipe = pretrain_recipe("small")
        device = "CPU; ViT-B on a GPU: skipped, there is none"
    run = pretrain(
        store.path,
        replace(recipe, log_every=LOG_STEPS),
        folder / "run",
        steps=WAIT_STEPS,
        say=lambda line: None,
    )
    metrics = run.read_metrics()[1:]
    wait, speed = (statistics.median(line[name] for line in metrics) for name in ("data_wait", "clips_per_s"))
    print(
        f"\npre-training, recipe {recipe.name} ({device}): {speed:.0f} clips/s, {wait:.1%} of the time waiting"
    )


def main() -> None:
    """Print the tables."""
    # Options.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=2_048, help="clips of each store (2048)")
    parser.add_argument("--batch", type=int, default=64, help="clips of a batch (64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds whose median counts (5)")
    options = parser.parse_args()
    if options.clips < 2 * UNTIMED_STEPS * options.batch:
        parser.error(f"--clips {options.clips}: expected {2 * UNTIMED_STEPS * options.batch} at least")

    torch.set_num_threads(PROCESSES)
    print(machine("ajepa", "torch", "nvidia-dali-cuda130", "zarr", "h5py", "webdataset", "numpy"))

    # The same clips for all sides, then the tables.
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        folder = Path(scratch)
        stores = make_stores(folder, options.clips)
        write_hdf5(stores[0], folder / "mel.h5")
        write_tars(stores[0], folder / "tars")
        print_read_table(stores[0], folder, options.batch, options.rounds)
        print_loader_table(stores, folder, options.batch, options.rounds)
        print_wait_line(stores[0], folder)


if __name__ == "__main__":
    main()
