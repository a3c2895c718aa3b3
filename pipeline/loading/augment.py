"""Augmentation: the random changes of each clip in each training step, and how they are drawn.

This file draws the changes; the loaders in loader.py and dali.py apply them. Both loaders apply the operations in
the order of this list. An augmentation that is off costs nothing and changes no bit.

crop       choice of the frames, by `View.crop` of loader.py
roll       rotation of the valid frames in time: frames that leave at the end come back at the start
gain       one number of decibels, added to every value of a clip
normalise  (log-mel - mean) / std, after the gain
masks      SpecAugment (arXiv 1904.08779): spans of frames and spans of bands are set to 0, the mean
padding    frames that are not audio are set to 0
mixup      share * clip + (1 - share) * partner (arXiv 1710.09412); the partner is a neighbour in the step, which is
           a random clip
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.loading.sampling import RowOrder

NATS_PER_DB = math.log(10) / 10  # a log-mel is the natural logarithm of power


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """The strength of each augmentation; by default all are off.

    Audio-MAE fine-tunes AudioSet with masks of up to 192 frames and 48 bands and mixup of share 0.5, alpha 10;
    PANNs train with two masks of up to 64 frames and two of up to 8 bands.
    """

    roll: bool = False
    gain_db: float = 0.0  # the gain is drawn from [-gain_db, gain_db)
    time_mask_frames: int = 0  # greatest width of a time mask; at most the valid frames are masked
    band_mask_bands: int = 0  # greatest width of a band mask; widths are drawn from 0 to this
    masks_each: int = 1  # number of time masks, and number of band masks; masks may overlap
    mixup_share: float = 0.0  # share of the clips that are mixed with a partner
    mixup_alpha: float = 10.0  # a clip's share of its mixture is Beta(alpha, alpha)

    def __post_init__(self) -> None:
        if not 0 <= self.gain_db < math.inf or min(self.time_mask_frames, self.band_mask_bands) < 0:
            raise ValueError(f"gain and masks must be finite and 0 or more, got {self}")
        if self.masks_each < 1:
            raise ValueError(
                f"masks_each must be 1 or more, got {self.masks_each}; for no masks set their widths to 0"
            )
        if not 0 <= self.mixup_share <= 1 or not 0 < self.mixup_alpha < math.inf:
            raise ValueError(f"mixup_share must lie in [0, 1] and mixup_alpha above 0, got {self}")

    @property
    def has_masks(self) -> bool:
        return self.time_mask_frames > 0 or self.band_mask_bands > 0

    @property
    def has_mixup(self) -> bool:
        return self.mixup_share > 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipChanges:
    """The augmentation of each clip of a step; neutral values for augmentations that are off."""

    rolls_B: np.ndarray  # frames by which the valid frames are rotated: the new position of frame 0
    gains_B: np.ndarray  # nat, added to the log-mel
    time_masks_BN2: np.ndarray  # frames [start, stop)
    band_masks_BN2: np.ndarray  # bands [start, stop)
    partners_B: np.ndarray  # position of the partner in the batch; its own if a clip is not mixed
    shares_B: np.ndarray  # float32, a clip's share of its mixture; 1 for a clip that is not mixed


def draw_uniform_B(name: str, seed: int, step: int, order: RowOrder) -> np.ndarray:
    """Return a random number in [0, 1) for each clip of this rank's step.

    The numbers of all ranks are drawn at once, so a clip's number does not depend on how many ranks share the step.
    Each name has its own random stream: turning one augmentation on does not change the draws of the others. `random`
    returns the upper 53 bits of the raw stream; other methods of `Generator` may change with NumPy (NEP 19).
    """
    rng = np.random.default_rng([seed, step, int.from_bytes(name.encode())])
    first = order.rank * order.clips
    return rng.random(order.clips_per_step)[first : first + order.clips]


def draw_changes(
    augment: Augment, seed: int, step: int, order: RowOrder, *, n_frames_B: np.ndarray, bands: int
) -> ClipChanges:
    """Draw the changes of a step's clips; they depend only on these arguments.

    The changes do not depend on how many ranks share the step. For mixup partners this holds only if each rank has an
    even number of clips.
    """

    def draw_named_B(name: str) -> np.ndarray:
        return draw_uniform_B(name, seed, step, order)

    def draw_spans_B2(name: str, max_width: int, room_B: np.ndarray) -> np.ndarray:
        """Draw one span [start, stop) for each clip, at most `max_width` wide and within [0, room_B)."""
        widths_B = (draw_named_B(f"{name} width") * (1 + np.minimum(max_width, room_B))).astype(np.int64)
        starts_B = (draw_named_B(f"{name} start") * (1 + room_B - widths_B)).astype(np.int64)
        return np.stack([starts_B, starts_B + widths_B], axis=1)

    def draw_spans_BN2(name: str, max_width: int, room_B: np.ndarray) -> np.ndarray:
        names = [name, *(f"{name} {number}" for number in range(2, augment.masks_each + 1))]
        return np.stack([draw_spans_B2(each, max_width, room_B) for each in names], axis=1)

    # Neutral values.
    clips = len(n_frames_B)
    no_spans_BN2 = np.zeros((clips, augment.masks_each, 2), np.int64)
    rolls_B = np.zeros(clips, np.int64)
    gains_B = np.zeros(clips)
    time_BN2 = no_spans_BN2
    bands_BN2 = no_spans_BN2
    partners_B = np.arange(clips)
    shares_B = np.ones(clips, np.float32)

    # Draw for the augmentations that are on; each has its own streams.
    if augment.roll:
        rolls_B = (draw_named_B("roll") * n_frames_B).astype(np.int64)
    if augment.gain_db:
        gains_B = (2 * draw_named_B("gain") - 1) * augment.gain_db * NATS_PER_DB
    if augment.time_mask_frames:
        time_BN2 = draw_spans_BN2("time mask", augment.time_mask_frames, n_frames_B)
    if augment.band_mask_bands:
        bands_BN2 = draw_spans_BN2("band mask", augment.band_mask_bands, np.full(clips, bands))
    if augment.has_mixup:
        mixed_B = draw_named_B("mixup") < augment.mixup_share
        betas_B = symmetric_beta(
            augment.mixup_alpha, draw_named_B("mixup radius"), draw_named_B("mixup angle")
        )
        partners_B = np.where(mixed_B, mixup_partners(clips), partners_B)
        shares_B = np.where(mixed_B, betas_B.astype(np.float32), shares_B)
    return ClipChanges(
        rolls_B=rolls_B,
        gains_B=gains_B,
        time_masks_BN2=time_BN2,
        band_masks_BN2=bands_BN2,
        partners_B=partners_B,
        shares_B=shares_B,
    )


def mixup_partners(clips: int) -> np.ndarray:
    """Return the partner of each position: the pairs are (0, 1), (2, 3), ...; of an odd number the last three cycle.

    The clips of a step are in random order, so a neighbour is a random clip. If each rank has an even number of clips,
    both clips of a pair are on the same rank.
    """
    places_B = np.arange(clips)
    if clips % 2 == 0:
        return places_B ^ 1
    paired = max(clips - 3, 0)
    return np.concatenate([places_B[:paired] ^ 1, np.roll(places_B[paired:], -1)])


def symmetric_beta(alpha: float, radius_B: np.ndarray, angle_B: np.ndarray) -> np.ndarray:
    """Return Beta(alpha, alpha) variates, each from two uniform numbers without rejection.

    The polar method (Bailey 1994) gives a Student t variate with 2 alpha degrees of freedom, which is mapped to [0, 1]
    (Devroye 1996). `Generator.beta` is not used, because its stream may change with NumPy.
    """
    # For a tiny alpha, t overflows to infinity, which gives a share of 0 or 1.
    with np.errstate(over="ignore"):
        t_B = np.sqrt((1 - radius_B) ** (-1 / alpha) - 1) * np.cos(2 * np.pi * angle_B)
    return (1 + np.sin(np.arctan(t_B))) / 2


def copy_rolled(stored_BTF: Tensor, mel_BTF: Tensor, rolls_B: np.ndarray, n_frames_B: np.ndarray) -> None:
    """Copy stored values to `mel_BTF`, rolled; frames of `mel_BTF` past the valid ones may keep their old values."""
    if not rolls_B.any():
        mel_BTF[:, : stored_BTF.shape[1]].copy_(stored_BTF)
        return
    for mel_TF, stored_TF, roll, n_frames in zip(
        mel_BTF, stored_BTF, rolls_B.tolist(), n_frames_B.tolist(), strict=True
    ):
        mel_TF[roll:n_frames].copy_(stored_TF[: n_frames - roll])
        mel_TF[:roll].copy_(stored_TF[n_frames - roll : n_frames])


def zero_masked_spans(mel_BTF: Tensor, changes: ClipChanges) -> None:
    """Set each clip's masked frames and bands to 0, in place."""
    masks_BN2 = zip(changes.time_masks_BN2.tolist(), changes.band_masks_BN2.tolist(), strict=True)
    for mel_TF, (frames_N2, bands_N2) in zip(mel_BTF, masks_BN2, strict=True):
        for frames, bands in zip(frames_N2, bands_N2, strict=True):
            mel_TF[slice(*frames)] = 0
            mel_TF[:, slice(*bands)] = 0
