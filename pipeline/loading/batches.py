"""open_batches: normalised batches of a store in one call, by DALI, for a training loop of one's own."""

from collections.abc import Iterator, Sequence
from typing import Literal, Self

import torch

from pipeline.errors import RunError
from pipeline.loading.dali import open_loader
from pipeline.loading.loader import Batch, Loader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.joined_store import AnyStore


class BatchStream:
    """Iterable batches, from the first step to the last, as often as it is iterated; `len` counts them. Close it."""

    def __init__(self, loader: Loader, first_step: int, last_step: int) -> None:
        self._loader = loader
        self._steps = (first_step, last_step)

    def __len__(self) -> int:
        return self._steps[1] - self._steps[0]

    def __iter__(self) -> Iterator[Batch]:
        return self._loader.batches(*self._steps)

    def close(self) -> None:
        """End the threads that read ahead."""
        self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_batches(
    store: AnyStore,
    splits: str | Sequence[str] | None = None,
    *,
    clips: int = 32,
    epochs: int = 1,
    frames: int | None = None,
    labels: str | None = None,
    crop: Literal["random", "start"] = "random",
    seed: int = 0,
    device: str | torch.device = "cpu",
    loader: Literal["dali", "plain"] = "dali",
) -> BatchStream:
    """Return batches of the good clips of some splits (None: all), shuffled by the seed, anew in every epoch.

    A batch has `mel_BTF`, normalised by mean and deviation of these splits, `n_frames_B`, `rows_B` and, with a label
    set, `labels_BC` (`Batch`). The rest of an epoch that fills no batch begins the next one; that of the last is left
    out. `frames` is the length of a view, by default whole clips; longer clips are cropped. RunError if the splits have
    fewer clips than a batch.
    """
    names = [splits] if isinstance(splits, str) else splits
    rows_N = store.good_rows(names)
    steps = len(rows_N) * epochs // clips
    if not steps:
        raise RunError(f"{store.location}: {len(rows_N)} clips fill no batch of {clips}; choose fewer clips")
    mean, std = store.mean_and_std(names or sorted(store.split_names))
    view = View(
        frames=store.frames if frames is None else frames,
        mean=mean,
        std=std,
        crop=crop,
        label_set=labels,
        seed=seed,
    )
    order = RowOrder(rows_N=rows_N, clips=clips, seed=seed)
    return BatchStream(open_loader(store, order, view, kind=loader, device=device), 0, steps)
