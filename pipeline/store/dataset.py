"""ClipDataset: the good clips of a store as a map-style dataset of PyTorch, for a plain `DataLoader`.

`DataLoader(store.dataset("train", labels="raw"), batch_size=32, shuffle=True, num_workers=4)` works with processes that
are forked and with such as are spawned. `pipeline.open_batches` gives the batches that training takes, several times as
fast.
"""

from collections.abc import Callable, Sequence
from typing import NotRequired, Protocol, TypedDict

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Clip(TypedDict):
    """One clip: numbers as tensors, which a `DataLoader` stacks.

    mel       log-mel, float32 `TF`; the frames past the end of a sound are those of silence
    n_frames  valid frames, int64
    row       of the store, int64
    clip_id   text
    labels    float32 `C`, 1 if the clip has a class, else 0; only of a dataset that was made with labels
    """

    mel: Tensor
    n_frames: Tensor
    row: Tensor
    clip_id: str
    labels: NotRequired[Tensor]


class ReadableStore(Protocol):
    """What a dataset asks of a store; `FeatureStore` documents it."""

    @property
    def n_frames_N(self) -> np.ndarray: ...
    def manifest_columns(self, *names: str) -> pl.DataFrame: ...
    def good_rows(self, splits: str | Sequence[str] | None = None) -> np.ndarray: ...
    def labels_BC(self, rows_B: np.ndarray, label_set: str = "raw") -> np.ndarray: ...
    def to_log_mel(self, stored: np.ndarray) -> np.ndarray: ...
    def read(self, rows_B: np.ndarray) -> np.ndarray: ...


class ClipDataset(Dataset[Clip]):
    """The good clips of some splits, in the order of their rows: `len(dataset)`, `dataset[i]`.

    rows_N     the rows of the store, one for each clip
    transform  is given the log-mel `TF` of each clip, and returns what takes its place; for processes that are spawned
               it must be picklable

    What a clip needs of the store's tables is read here and now: in a process that is forked, polars would wait for
    ever for threads of its parent. StoreError if the store lacks a split or the label set; reading raises it for a
    clip that cannot be read.
    """

    def __init__(
        self,
        store: ReadableStore,
        splits: str | Sequence[str] | None = None,
        *,
        labels: str | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.store = store
        self.rows_N = store.good_rows(splits)
        self.labels = labels
        self.transform = transform

        # An Arrow array gives single texts without polars, and takes no more memory than they have bytes.
        self._clip_ids_N = store.manifest_columns("clip_id")["clip_id"].gather(self.rows_N).to_arrow()
        self._n_frames_N = store.n_frames_N[self.rows_N]

        # Labels of no rows: a missing label set is refused now, and the set is in memory from now on.
        if labels is not None:
            store.labels_BC(self.rows_N[:0], labels)

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Clip]:
        """Return several clips from one read; a `DataLoader` calls this for each batch."""
        indices_B = np.asarray(indices, np.int64)
        rows_B = self.rows_N[indices_B]
        mel_BTF = torch.from_numpy(self.store.to_log_mel(self.store.read(rows_B)))
        clips = [
            Clip(
                mel=mel_TF if self.transform is None else self.transform(mel_TF),
                n_frames=torch.tensor(int(self._n_frames_N[index])),
                row=torch.tensor(int(self.rows_N[index])),
                clip_id=self._clip_ids_N[index].as_py(),
            )
            for mel_TF, index in zip(mel_BTF, indices_B.tolist(), strict=True)
        ]
        if self.labels is not None:
            labels_BC = torch.from_numpy(self.store.labels_BC(rows_B, self.labels))
            for clip, labels_C in zip(clips, labels_BC, strict=True):
                clip["labels"] = labels_C
        return clips

    def __repr__(self) -> str:
        labels = "" if self.labels is None else f", labels {self.labels}"
        return f"ClipDataset({len(self):,} good clips of {self.store!r}{labels})"
