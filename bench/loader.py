"""Random reads beside zarr-python and a raw memmap; batches beside a torch DataLoader; one store, one run.

    just bench loader STORE [CLIPS_PER_STEP]

Warm: every clip has been read before. Start-up is left out: each side first makes a few batches untimed.
"""

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import zarr

from pipeline.dali import DaliLoader
from pipeline.loader import Batch, PlainLoader, View
from pipeline.order import Order
from pipeline.store import FeatureStore

ROUNDS = 7
CLIPS_AT_MOST = 2_048  # of the store: half a gigabyte of float16, which stays in the page cache
UNTIMED_STEPS, TIMED_STEPS = 8, 24
PROCESSES = 2


class Clips(torch.utils.data.Dataset):
    """What most trainers do: one normalised, padded clip at a time, stacked by the DataLoader."""

    def __init__(self, store: FeatureStore, view: View) -> None:
        self.store, self.view = store, view

    def __getitem__(self, row: int) -> torch.Tensor:
        n_frames = int(self.store.n_frames_N[row])
        stored_TF = torch.from_numpy(self.store.read(np.array([row]))[0, :n_frames])
        mel_TF = torch.zeros(self.view.frames, self.store.bands)
        mel_TF[:n_frames] = (
            stored_TF.float() * self.store.scale + self.store.offset - self.view.mean
        ) / self.view.std
        return mel_TF


def reads(
    store: FeatureStore, rows_N: np.ndarray, clips: int, scratch: Path
) -> dict[str, Callable[[np.ndarray], object]]:
    """Ways to read the stored values of `clips` rows."""
    array = zarr.open_array(store.path / "mel", mode="r")
    flat_NTF = np.memmap(
        scratch / "flat", store.dtype, "w+", shape=(int(rows_N.max()) + 1, store.frames, store.bands)
    )
    for row in rows_N:
        store.read(rows_N[:1] * 0 + row, out=flat_NTF[row : row + 1])
    out_BTF = np.empty((clips, store.frames, store.bands), store.dtype)

    def memmap(rows_B: np.ndarray) -> None:
        for mel_TF, row in zip(out_BTF, rows_B, strict=True):
            mel_TF[:] = flat_NTF[row]

    return {
        "FeatureStore.read": lambda rows_B: store.read(rows_B, out=out_BTF),
        "zarr-python oindex": lambda rows_B: array.oindex[rows_B],
        "raw memmap": memmap,
    }


def read_table(store: FeatureStore, rows_N: np.ndarray, clips: int, scratch: Path) -> None:
    """Print how long each way takes, in turns on the same rows."""
    ways = reads(store, rows_N, clips, scratch)
    rng = np.random.default_rng(0)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3 * ROUNDS):
        rows_B = np.sort(rng.choice(rows_N, clips, replace=False))
        for name, read in ways.items():
            began = time.perf_counter()
            read(rows_B)
            took[name].append(time.perf_counter() - began)
    print(f"random read of {clips} clips ({store.dtype}), {3 * ROUNDS} rounds in turns, medians:")
    ours = statistics.median(took["FeatureStore.read"])
    for name, seconds in took.items():
        median = statistics.median(seconds)
        print(f"  {name:<28}{1000 * median:8.2f} ms {median / ours:8.2f} x ours")


def loaders(store: FeatureStore, order: Order, view: View) -> dict[str, Callable[[], Iterator[object]]]:
    """The same steps, by name of who makes their batches."""
    rows_N = np.concatenate([order.rows(step) for step in range(UNTIMED_STEPS + TIMED_STEPS)])
    feed = torch.utils.data.DataLoader(
        Clips(store, view),
        batch_size=order.clips,
        sampler=rows_N.tolist(),
        num_workers=PROCESSES,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )

    def ours(loader: PlainLoader | DaliLoader) -> Iterator[Batch]:
        return loader.batches(0, UNTIMED_STEPS + TIMED_STEPS)

    return {
        "PlainLoader": lambda: ours(PlainLoader(store, order, view)),
        f"DaliLoader, {PROCESSES} threads": lambda: ours(DaliLoader(store, order, view, threads=PROCESSES)),
        f"torch DataLoader, {PROCESSES} workers": lambda: iter(feed),
    }


def clips_per_second(batches: Iterator[object], clips: int) -> float:
    """Over the timed steps, to the end of `batches`, which are thrown away."""
    for _ in itertools.islice(batches, UNTIMED_STEPS):
        pass
    began = time.perf_counter()
    steps = sum(1 for _ in batches)
    assert steps == TIMED_STEPS, f"{steps} steps came"
    return steps * clips / (time.perf_counter() - began)


def loader_table(store: FeatureStore, order: Order) -> None:
    """Print the speeds of whole normalised batches, in turns."""
    view = View(frames=1_024, mean=store.stats["all"]["mean"], std=store.stats["all"]["std"])
    makers = loaders(store, order, view)
    speeds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            speeds[name].append(clips_per_second(make(), order.clips))
    print(
        f"normalised batches of {order.clips} clips x {view.frames} frames, {ROUNDS} rounds in turns, medians:"
    )
    slowest = statistics.median(speeds[next(reversed(speeds))])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"  {name:<28}{median:8.0f} clips/s {median / slowest:5.2f} x the DataLoader")


def main(path: Path, clips: int = 64) -> None:
    """Print both tables."""
    store = FeatureStore.open(path)
    rows_N = store.good_rows()[:CLIPS_AT_MOST]
    print(f"{path.name}: {len(rows_N)} clips, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        read_table(store, rows_N, clips, Path(scratch))
    loader_table(store, Order(rows_N=rows_N, clips=clips, seed=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
