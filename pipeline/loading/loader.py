"""Batch, View and the work that all loaders share; and the plain loader, the reference for every other loader."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, TypedDict, Unpack

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
from pipeline.loading.transfer import copy_to_device
from pipeline.messages import print_to_stderr
from pipeline.store.joined_store import AnyStore


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """The clips on which one rank trains in one step; mels and labels are on the loader's device.

    A clip that mixup mixes with its partner keeps its own row number. Its valid frames are those of the longer clip.
    If the view has several crops, `mel_BTF` and `n_frames_B` have an entry for each of them, those of a clip adjacent.
    """

    mel_BTF: Tensor  # float32, (log-mel - mean) / std, augmented; 0 past the valid frames
    n_frames_B: Tensor  # int64 on the CPU, where models want it: valid frames of each clip within mel_BTF
    rows_B: np.ndarray  # int64, rows of the store, one for each clip
    labels_BC: Tensor | None  # float32, 1 if a clip has the class, else 0; mixed like the mels
    skipped_clips: int = 0  # clips that could not be read; other clips of this batch take their places


NO_AUGMENTATION = Augment()


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The model's input from a stored clip: `frames` frames as (log-mel - mean) / std, augmented.

    A clip with more valid frames is cropped: at its start, or at a random position that is drawn anew in every step. A
    shorter clip is padded with zeros after normalisation. Padding does not count as audio; mixup treats it as the mean.
    With `crops` above 1 every clip comes that often, each time at another random position, without augmentation.
    """

    frames: int
    mean: float
    std: float
    crop: Literal["random", "start"] = "random"
    label_set: str | None = None
    seed: int = 0
    augment: Augment = NO_AUGMENTATION
    crops: int = 1

    def __post_init__(self) -> None:
        if self.crops < 1 or (
            self.crops > 1
            and (self.crop != "random" or self.augment != NO_AUGMENTATION or self.label_set is not None)
        ):
            raise ValueError(
                f"crops must be 1 or more, and several need random crops without augmentation and labels, got {self}"
            )
        if self.frames < 1 or not self.std > 0:
            raise ValueError(f"frames and std must be above 0, got {self.frames} and {self.std}")
        if self.crop not in ("random", "start"):
            raise ValueError(f"crop must be random or start, got {self.crop!r}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepCuts:
    """The rows of one step on one rank, the frames [start, start + n_frames) of each row, and its augmentation.

    A row is repeated for each of its crops.
    """

    rows_B: np.ndarray
    starts_B: np.ndarray
    n_frames_B: np.ndarray
    changes: ClipChanges
    skipped_clips: int


class Loader(Protocol):
    """Yields the batches of any range of steps; the same step always gives the same batch."""

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the batches of steps [first, last); raises StoreError at the first batch that cannot be read."""

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class BrokenClipOptions(TypedDict, total=False):
    """Keyword arguments of every loader for clips that cannot be read; the defaults are those of `BatchMaker`."""

    on_broken: Literal["raise", "skip"]
    say: Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchMaker:
    """The work that all loaders share: choosing the frames of a step, reading them, and completing the batch.

    Raises StoreError if the store lacks the label set, RunError if mixup would have to pair clips across ranks.
    """

    store: AnyStore
    order: RowOrder
    view: View
    device: torch.device
    on_broken: Literal["raise", "skip"] = "raise"  # skip: another clip of the step takes the place
    say: Callable[[str], None] = print_to_stderr  # gets one line for each row that is skipped
    broken_rows: set[int] = field(default_factory=set)  # rows that could not be read so far

    def __post_init__(self) -> None:
        if self.on_broken not in ("raise", "skip"):
            raise RunError(f"on_broken must be raise or skip, got {self.on_broken!r}")

        # A rank reads only its own clips, so partners must be on the same rank.
        clips, ranks = self.order.clips, self.order.world
        if self.view.augment.has_mixup and ranks > 1 and clips % 2:
            raise RunError(
                f"mixup pairs clips, and {clips} clips of each of {ranks} ranks is an odd number; "
                f"choose --batch a multiple of {2 * ranks}, or another number of ranks"
            )

        # Read the labels of no rows, so that a missing label set is refused now, not at the first batch.
        if self.view.label_set is not None:
            self.store.labels_BC(np.empty(0, np.int64), self.view.label_set)

    @property
    def views(self) -> int:
        """Number of views in a batch: the crops of all clips."""
        return self.order.clips * self.view.crops

    @property
    def stored_frames(self) -> int:
        """Number of frames that are read of each clip; the view's further frames are padding."""
        return min(self.view.frames, self.store.frames)

    @property
    def stored_std(self) -> np.float32:
        """The standard deviation in stored units: normalised = (stored - stored_mean) / stored_std."""
        return np.float32(self.view.std / self.store.scale)

    @property
    def stored_mean(self) -> np.float32:
        """The mean in stored units."""
        return np.float32((self.view.mean - self.store.offset) / self.store.scale)

    def stored_means_B(self, cuts: StepCuts) -> np.ndarray:
        """Mean in stored units minus the gain of each clip.

        Subtracting the gain together with the mean costs nothing and rounds only once.
        """
        means_B = self.view.mean - cuts.changes.gains_B
        return ((means_B - self.store.offset) / self.store.scale).astype(np.float32)

    def cuts_at_step(self, step: int) -> StepCuts:
        """Choose rows, crops and augmentation of a step; rows in `broken_rows` are replaced."""
        view = self.view
        rows_B, skipped = replace_broken_rows(self.order.rows_at_step(step), self.broken_rows)
        rows_B = np.repeat(rows_B, view.crops)

        # Crops. The first one's random stream has the same name, however many there are.
        valid_B = self.store.n_frames_N[rows_B].astype(np.int64)
        starts_B = np.zeros_like(rows_B)
        if view.crop == "random":
            places_B = 1 + np.maximum(valid_B - view.frames, 0)
            names = ["crop", *(f"crop {number}" for number in range(2, view.crops + 1))]
            uniform_NB = [draw_uniform_B(name, view.seed, step, self.order) for name in names]
            starts_B = (np.stack(uniform_NB, axis=1).ravel() * places_B).astype(np.int64)
        n_frames_B = np.minimum(valid_B - starts_B, view.frames)

        # Augmentation.
        changes = draw_changes(
            view.augment, view.seed, step, self.order, n_frames_B=n_frames_B, bands=self.store.bands
        )
        return StepCuts(
            rows_B=rows_B, starts_B=starts_B, n_frames_B=n_frames_B, changes=changes, skipped_clips=skipped
        )

    def read_step(self, step: int, out: np.ndarray | None = None) -> tuple[StepCuts, np.ndarray]:
        """Return a step's cuts and their stored values `[B, stored_frames, F]`, which are written to `out` if given.

        Raises StoreError if a clip cannot be read; with `on_broken="skip"`, only if no clip of the step can be read.
        """
        # Each attempt finds at most one more broken row.
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
        """Return the batch of a normalised and augmented mel; sets the padding of the mel to 0 in place."""
        n_frames_B = np.maximum(cuts.n_frames_B, cuts.n_frames_B[cuts.changes.partners_B])
        clear_padding(mel_BTF, n_frames_B)
        labels_BC = self._mixed_labels_BC(cuts)
        return Batch(
            mel_BTF=mel_BTF,
            n_frames_B=torch.from_numpy(n_frames_B),
            rows_B=cuts.rows_B[:: self.view.crops],
            labels_BC=None if labels_BC is None else copy_to_device(labels_BC, self.device),
            skipped_clips=cuts.skipped_clips,
        )

    def _mixed_labels_BC(self, cuts: StepCuts) -> np.ndarray | None:
        """Return the labels of the view's label set, mixed with the shares of the mels; None without a label set."""
        if self.view.label_set is None:
            return None
        labels_BC = self.store.labels_BC(cuts.rows_B, self.view.label_set)
        if not self.view.augment.has_mixup:
            return labels_BC
        shares_B1 = cuts.changes.shares_B[:, None]
        return labels_BC * shares_B1 + labels_BC[cuts.changes.partners_B] * (1 - shares_B1)


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device with this name, a GPU with its number; raises RunError if there is no such device."""
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
    """Replace each broken row by the next good row, cyclically; returns the rows and the number of replaced rows.

    Raises StoreError if all rows are broken.
    """
    broken_N = np.flatnonzero(np.isin(rows_B, list(broken_rows)))
    if not len(broken_N):
        return rows_B, 0
    good_N = np.delete(np.arange(len(rows_B)), broken_N)
    if not len(good_N):
        raise StoreError(
            f"none of the {len(rows_B)} clips of a step can be read; "
            "a line on each of them says why, and how to repair it"
        )
    rows_B = rows_B.copy()
    rows_B[broken_N] = rows_B[good_N[np.searchsorted(good_N, broken_N) % len(good_N)]]
    return rows_B, len(broken_N)


def clear_padding(mel_BTF: Tensor, n_frames_B: np.ndarray) -> None:
    """Set the frames past each clip's valid ones to 0, in place."""
    # Most batches need a single write.
    longest = int(n_frames_B.max())
    mel_BTF[:, longest:] = 0
    if not (n_frames_B < longest).any():
        return

    # On a GPU one pass over the batch is cheaper than a write for each of some short clips.
    if mel_BTF.is_cuda:
        frame_T = torch.arange(longest, device=mel_BTF.device)
        is_padding_BT = frame_T >= copy_to_device(n_frames_B, mel_BTF.device)[:, None]
        mel_BTF[:, :longest].masked_fill_(is_padding_BT[..., None], 0)
        return
    for clip in np.flatnonzero(n_frames_B < longest):
        mel_BTF[clip, int(n_frames_B[clip]) : longest] = 0


class PlainLoader:
    """Makes each batch on request, with plain tensor arithmetic: slow, and the reference for other loaders."""

    def __init__(
        self,
        store: AnyStore,
        order: RowOrder,
        view: View,
        device: str | torch.device = "cpu",
        **broken_clips: Unpack[BrokenClipOptions],
    ) -> None:
        self.batch_maker = BatchMaker(
            store=store, order=order, view=view, device=resolve_device(device), **broken_clips
        )

    def make_batch(self, step: int) -> Batch:
        """Return the batch of a step, which depends only on the step; raises StoreError if clips cannot be read."""
        batch_maker = self.batch_maker
        view = batch_maker.view
        cuts, stored_BTF = batch_maker.read_step(step)

        # Roll, gain and normalisation.
        mel_BTF = torch.zeros(len(stored_BTF), view.frames, batch_maker.store.bands)
        copy_rolled(torch.from_numpy(stored_BTF), mel_BTF, cuts.changes.rolls_B, cuts.n_frames_B)
        means_B11 = torch.from_numpy(batch_maker.stored_means_B(cuts))[:, None, None]
        mel_BTF.sub_(means_B11).mul_(float(1 / batch_maker.stored_std))

        # Masks and padding, both set to 0, the mean.
        if view.augment.has_masks:
            zero_masked_spans(mel_BTF, cuts.changes)
        clear_padding(mel_BTF, cuts.n_frames_B)

        # Mixup.
        if view.augment.has_mixup:
            shares_B11 = torch.from_numpy(cuts.changes.shares_B)[:, None, None]
            mel_BTF = mel_BTF * shares_B11 + mel_BTF[cuts.changes.partners_B] * (1 - shares_B11)
        return batch_maker.finish_batch(copy_to_device(mel_BTF, batch_maker.device), cuts)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the batches of steps [first, last)."""
        return map(self.make_batch, range(first_step, last_step))

    def close(self) -> None:
        """Do nothing: this loader holds nothing between batches."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
