"""Batch, View, and the plain loader, which defines what a right batch is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RunError
from pipeline.joined import AnyStore
from pipeline.order import Order

CROP_STREAM = 0x63726F70  # keeps the crops' draws apart from others made from the same seed and step


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one rank trains on in one step; tensors lie on the loader's device."""

    mel_BTF: Tensor  # float32, (log-mel - mean) / std; 0 past the valid frames
    n_frames_B: Tensor  # int64, valid frames of each clip within mel_BTF
    rows_B: np.ndarray  # int64, rows of the store
    labels_BC: Tensor | None  # float32, 1 where a clip has a class
    weights_B: Tensor  # float32


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How stored clips are shown to a model: `frames` of each, as (log-mel - mean) / std.

    A clip with more valid frames is cut, from its start or from a place drawn anew each step; one with fewer
    is followed by zeros, set after normalisation, which are not audio.
    """

    frames: int
    mean: float
    std: float
    crop: Literal["random", "start"] = "random"
    label_set: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or not self.std > 0:
            raise ValueError(f"frames and std must be above 0, got {self.frames} and {self.std}")
        if self.crop not in ("random", "start"):
            raise ValueError(f"crop must be random or start, got {self.crop!r}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cuts:
    """The frames of one step on one rank: [start, start + n_frames) of each row are audio."""

    rows_B: np.ndarray
    starts_B: np.ndarray
    n_frames_B: np.ndarray


class Loader(Protocol):
    """Batches of any range of steps, the same whenever and however often they are asked for."""

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first, last); raises the StoreError of the first that cannot be read."""

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Feed:
    """What every loader shares: which frames a step takes, their stored values, and the batch around the mel.

    Raises StoreError where the store lacks the label set.
    """

    store: AnyStore
    order: Order
    view: View
    device: torch.device
    weights_N: np.ndarray | None  # one per row of the store; None: every clip weighs 1

    def __post_init__(self) -> None:
        if self.view.label_set is not None:
            self.store.labels_BC(np.empty(0, np.int64), self.view.label_set)

    @property
    def frames(self) -> int:
        """Frames read of each clip; what the view wants beyond the stored ones is padding."""
        return min(self.view.frames, self.store.frames)

    @property
    def centre_and_spread(self) -> tuple[np.float32, np.float32]:
        """Mean and standard deviation in stored units: normalised = (stored - centre) / spread."""
        view, store = self.view, self.store
        return np.float32((view.mean - store.offset) / store.scale), np.float32(view.std / store.scale)

    def cuts(self, step: int) -> Cuts:
        rows_B = self.order.rows(step)
        valid_B = self.store.n_frames_N[rows_B].astype(np.int64)
        starts_B = np.zeros_like(rows_B)
        if self.view.crop == "random":
            places_B = 1 + np.maximum(valid_B - self.view.frames, 0)
            starts_B = (draws(self.view.seed, step, self.order) * places_B).astype(np.int64)
        n_frames_B = np.minimum(valid_B - starts_B, self.view.frames)
        return Cuts(rows_B=rows_B, starts_B=starts_B, n_frames_B=n_frames_B)

    def read(self, cuts: Cuts, out: np.ndarray | None = None) -> np.ndarray:
        """Stored values as `[B, self.frames, F]`, into `out` if given; raises StoreError."""
        return self.store.read(cuts.rows_B, starts_B=cuts.starts_B, frames=self.frames, out=out)

    def batch(self, mel_BTF: Tensor, cuts: Cuts) -> Batch:
        """The batch of a normalised mel, which is cleared in place where it is not audio."""
        clear_padding(mel_BTF, cuts.n_frames_B)
        label_set, rows_B = self.view.label_set, cuts.rows_B
        labels_BC = None if label_set is None else torch.from_numpy(self.store.labels_BC(rows_B, label_set))
        weights_B = np.ones(len(rows_B)) if self.weights_N is None else self.weights_N[rows_B]
        return Batch(
            mel_BTF=mel_BTF,
            n_frames_B=torch.from_numpy(cuts.n_frames_B).to(self.device),
            rows_B=rows_B,
            labels_BC=None if labels_BC is None else labels_BC.to(self.device),
            weights_B=torch.from_numpy(weights_B.astype(np.float32)).to(self.device),
        )


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name, with its number if it is a GPU; raises RunError where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"device {name!r}: expected cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices; use cpu")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def draws(seed: int, step: int, order: Order) -> np.ndarray:
    """One number in [0, 1) for each clip of this rank's step, as if all ranks' clips were drawn at once.

    So a crop, like a row, does not depend on how many ranks the step was dealt to.
    """
    rng = np.random.default_rng([seed, step, CROP_STREAM])
    mine = slice(order.rank * order.clips, (order.rank + 1) * order.clips)
    return rng.random(order.clips_of_all_ranks)[mine]


def clear_padding(mel_BTF: Tensor, n_frames_B: np.ndarray) -> None:
    """Set to 0, in place, what lies past each clip's valid frames."""
    longest = int(n_frames_B.max())
    mel_BTF[:, longest:] = 0  # one write for most batches, one more for each short clip
    for clip in np.flatnonzero(n_frames_B < longest):
        mel_BTF[clip, int(n_frames_B[clip]) : longest] = 0


class PlainLoader:
    """Batches made one by one with plain tensor arithmetic, when they are asked for: slow, and right."""

    def __init__(
        self,
        store: AnyStore,
        order: Order,
        view: View,
        device: str | torch.device = "cpu",
        *,
        weights_N: np.ndarray | None = None,
    ) -> None:
        self.feed = Feed(store=store, order=order, view=view, device=device_of(device), weights_N=weights_N)

    def batch(self, step: int) -> Batch:
        """The batch of one step, a pure function of it; raises StoreError where a clip cannot be read."""
        feed, cuts = self.feed, self.feed.cuts(step)
        stored_BTF = torch.from_numpy(feed.read(cuts))
        centre, spread = feed.centre_and_spread
        mel_BTF = torch.zeros(len(stored_BTF), feed.view.frames, feed.store.bands)
        audio_BTF = mel_BTF[:, : feed.frames].copy_(stored_BTF)
        audio_BTF.sub_(float(centre)).mul_(float(1 / spread))
        return feed.batch(mel_BTF.to(feed.device), cuts)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first, last)."""
        return map(self.batch, range(first_step, last_step))

    def close(self) -> None:
        """Nothing is held between batches."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
