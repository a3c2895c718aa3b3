"""Batch, View, and the plain loader, which defines what a right batch is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import BrokenClipError, RunError, StoreError
from pipeline.loading.augment import (
    Augment,
    ClipChanges,
    copy_rolled,
    draw_changes,
    draw_uniform_B,
    zero_masked_spans,
)
from pipeline.loading.sampling import RowOrder
from pipeline.messages import print_to_stderr
from pipeline.store.joined_store import AnyStore


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one rank trains on in one step; tensors lie on the loader's device.

    A mixture has the row and the weight of the clip that was mixed with another, and the valid frames of the
    longer of the two.
    """

    mel_BTF: Tensor  # float32, (log-mel - mean) / std, augmented; 0 past the valid frames
    n_frames_B: Tensor  # int64, valid frames of each clip within mel_BTF
    rows_B: np.ndarray  # int64, rows of the store
    labels_BC: Tensor | None  # float32, 1 where a clip has a class; mixed as the mels are
    weights_B: Tensor  # float32, of the rows
    skipped_clips: int = 0  # clips that could not be read; others of this batch stand in their places


NO_AUGMENTATION = Augment()


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How stored clips are shown to a model: `frames` of each, as (log-mel - mean) / std.

    A clip with more valid frames is cut, from its start or from a place drawn anew each step; one with fewer
    is followed by zeros, set after normalisation, which are not audio. Mixed with a longer one, it is silent
    at the mean from its end on, as `augment.py` says with all else that may be changed.
    """

    frames: int
    mean: float
    std: float
    crop: Literal["random", "start"] = "random"
    label_set: str | None = None
    seed: int = 0
    augment: Augment = NO_AUGMENTATION

    def __post_init__(self) -> None:
        if self.frames < 1 or not self.std > 0:
            raise ValueError(f"frames and std must be above 0, got {self.frames} and {self.std}")
        if self.crop not in ("random", "start"):
            raise ValueError(f"crop must be random or start, got {self.crop!r}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepCuts:
    """The frames of one step on one rank, [start, start + n_frames) of each row, and what is done to them."""

    rows_B: np.ndarray
    starts_B: np.ndarray
    n_frames_B: np.ndarray
    changes: ClipChanges
    skipped_clips: int


class Loader(Protocol):
    """Batches of any range of steps, the same whenever and however often they are asked for."""

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first, last); raises the StoreError of the first that cannot be read."""

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchMaker:
    """What every loader shares: which frames a step takes, their stored values, and the batch around the mel.

    Raises StoreError where the store lacks the label set.
    """

    store: AnyStore
    order: RowOrder
    view: View
    device: torch.device
    weights_N: np.ndarray | None = None  # one per row of the store; None: every clip weighs 1
    on_broken: Literal["raise", "skip"] = "raise"
    say: Callable[[str], None] = print_to_stderr  # is told of each row that is skipped, once
    broken_rows: set[int] = field(default_factory=set)  # rows that turned out to be unreadable

    def __post_init__(self) -> None:
        if self.on_broken not in ("raise", "skip"):
            raise RunError(f"on_broken must be raise or skip, got {self.on_broken!r}")
        order = self.order
        if self.view.augment.has_mixup and order.world > 1 and order.clips % 2:
            told = (
                f"mixup pairs clips, and {order.clips} clips of each of {order.world} ranks is an odd number"
            )
            raise RunError(
                f"{told}; choose --batch a multiple of {2 * order.world}, or another number of ranks"
            )
        if self.view.label_set is not None:
            self.store.labels_BC(np.empty(0, np.int64), self.view.label_set)

    @property
    def stored_frames(self) -> int:
        """Frames read of each clip; what the view wants beyond the stored ones is padding."""
        return min(self.view.frames, self.store.frames)

    @property
    def stored_std(self) -> np.float32:
        """The standard deviation in stored units: normalised = (stored - centre) / spread."""
        return np.float32(self.view.std / self.store.scale)

    @property
    def stored_mean(self) -> np.float32:
        """The mean in stored units."""
        return np.float32((self.view.mean - self.store.offset) / self.store.scale)

    def stored_means_B(self, cuts: StepCuts) -> np.ndarray:
        """The centre of each clip: less by its gain, which so costs nothing and is not rounded twice."""
        means_B = self.view.mean - cuts.changes.gains_B
        return ((means_B - self.store.offset) / self.store.scale).astype(np.float32)

    def cuts_at_step(self, step: int) -> StepCuts:
        """What is shown of a step, as far as is known which of its rows cannot be read."""
        view, all_rows_B = self.view, self.order.rows_at_step(step)
        rows_B, skipped = replace_broken_rows(all_rows_B, self.broken_rows)
        valid_B = self.store.n_frames_N[rows_B].astype(np.int64)
        starts_B = np.zeros_like(rows_B)
        if view.crop == "random":
            places_B = 1 + np.maximum(valid_B - view.frames, 0)
            starts_B = (draw_uniform_B("crop", view.seed, step, self.order) * places_B).astype(np.int64)
        n_frames_B = np.minimum(valid_B - starts_B, view.frames)
        changes = draw_changes(
            view.augment, view.seed, step, self.order, n_frames_B=n_frames_B, bands=self.store.bands
        )
        return StepCuts(
            rows_B=rows_B, starts_B=starts_B, n_frames_B=n_frames_B, changes=changes, skipped_clips=skipped
        )

    def read_step(self, step: int, out: np.ndarray | None = None) -> tuple[StepCuts, np.ndarray]:
        """A step's cuts and their stored values as `[B, self.frames, F]`, into `out` if given.

        Raises StoreError; with `on_broken="skip"`, of broken clips only where no clip of the step can be read.
        """
        while True:
            cuts = self.cuts_at_step(step)
            try:
                return cuts, self.store.read(
                    cuts.rows_B, starts_B=cuts.starts_B, frames=self.stored_frames, out=out
                )
            except BrokenClipError as error:
                if self.on_broken == "raise" or error.row not in cuts.rows_B:
                    raise
                self.broken_rows.add(error.row)
                self.say(f"skipped: {error}")

    def finish_batch(self, mel_BTF: Tensor, cuts: StepCuts) -> Batch:
        """The batch of a mel that is ready but for its padding, which is cleared in place."""
        rows_B, partners_B = cuts.rows_B, cuts.changes.partners_B
        n_frames_B = np.maximum(cuts.n_frames_B, cuts.n_frames_B[partners_B])
        clear_padding(mel_BTF, n_frames_B)
        labels_BC = self._mixed_labels_BC(cuts)
        weights_B = np.ones(len(rows_B)) if self.weights_N is None else self.weights_N[rows_B]
        return Batch(
            mel_BTF=mel_BTF,
            n_frames_B=torch.from_numpy(n_frames_B).to(self.device),
            rows_B=rows_B,
            labels_BC=None if labels_BC is None else torch.from_numpy(labels_BC).to(self.device),
            weights_B=torch.from_numpy(weights_B.astype(np.float32)).to(self.device),
            skipped_clips=cuts.skipped_clips,
        )

    def _mixed_labels_BC(self, cuts: StepCuts) -> np.ndarray | None:
        if self.view.label_set is None:
            return None
        labels_BC = self.store.labels_BC(cuts.rows_B, self.view.label_set)
        if not self.view.augment.has_mixup:
            return labels_BC
        shares_B1 = cuts.changes.shares_B[:, None]
        return labels_BC * shares_B1 + labels_BC[cuts.changes.partners_B] * (1 - shares_B1)


def resolve_device(name: str | torch.device) -> torch.device:
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


def replace_broken_rows(rows_B: np.ndarray, broken_rows: set[int]) -> tuple[np.ndarray, int]:
    """The rows with the next good one, cyclically, in the place of each broken one; and how many those are.

    Raises StoreError where all are broken.
    """
    places_N = np.flatnonzero(np.isin(rows_B, list(broken_rows)))
    if not len(places_N):
        return rows_B, 0
    good_N = np.delete(np.arange(len(rows_B)), places_N)
    if not len(good_N):
        raise StoreError(
            f"none of the {len(rows_B)} clips of a step can be read; each was told, with what mends it"
        )
    rows_B = rows_B.copy()
    rows_B[places_N] = rows_B[good_N[np.searchsorted(good_N, places_N) % len(good_N)]]
    return rows_B, len(places_N)


def clear_padding(mel_BTF: Tensor, n_frames_B: np.ndarray) -> None:
    """Set to 0, in place, what lies past each clip's valid frames."""
    longest = int(n_frames_B.max())
    mel_BTF[:, longest:] = 0  # one write for most batches, one more for each short clip
    for clip in np.flatnonzero(n_frames_B < longest):
        mel_BTF[clip, int(n_frames_B[clip]) : longest] = 0


class PlainLoader:
    """Batches made one by one with plain tensor arithmetic, when they are asked for: slow, and right.

    With `on_broken="skip"`, another clip of its step is shown in the place of one that cannot be read, and
    `say` is told of it once.
    """

    def __init__(
        self,
        store: AnyStore,
        order: RowOrder,
        view: View,
        device: str | torch.device = "cpu",
        *,
        weights_N: np.ndarray | None = None,
        on_broken: Literal["raise", "skip"] = "raise",
        say: Callable[[str], None] = print_to_stderr,
    ) -> None:
        self.feed = BatchMaker(
            store=store,
            order=order,
            view=view,
            device=resolve_device(device),
            weights_N=weights_N,
            on_broken=on_broken,
            say=say,
        )

    def make_batch(self, step: int) -> Batch:
        """The batch of one step, a pure function of it; raises StoreError where clips cannot be read."""
        batch_maker = self.feed
        cuts, stored_BTF = batch_maker.read_step(step)
        mel_BTF = torch.zeros(len(stored_BTF), batch_maker.view.frames, batch_maker.store.bands)
        copy_rolled(torch.from_numpy(stored_BTF), mel_BTF, cuts.changes.rolls_B, cuts.n_frames_B)
        centres_B11 = torch.from_numpy(batch_maker.stored_means_B(cuts))[:, None, None]
        mel_BTF.sub_(centres_B11).mul_(float(1 / batch_maker.stored_std))
        if batch_maker.view.augment.has_masks:
            zero_masked_spans(mel_BTF, cuts.changes)
        clear_padding(mel_BTF, cuts.n_frames_B)
        if batch_maker.view.augment.has_mixup:
            shares_B11 = torch.from_numpy(cuts.changes.shares_B)[:, None, None]
            mel_BTF = mel_BTF * shares_B11 + mel_BTF[cuts.changes.partners_B] * (1 - shares_B11)
        return batch_maker.finish_batch(mel_BTF.to(batch_maker.device), cuts)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first, last)."""
        return map(self.make_batch, range(first_step, last_step))

    def close(self) -> None:
        """Nothing is held between batches."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
