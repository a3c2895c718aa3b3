"""Views: several random crops of a clip, each changed as another recording of the same sound would be.

A joint-embedding loss asks for equal vectors of the views of a clip, so what differs between views is what the encoder
learns to ignore. All changes are made to log-mels, on the device of the model:

stretch   frames are repeated or left out, which changes the speed and keeps the pitch
shift     all bands are moved up or down, which changes the pitch
mixing    the sound of another clip of the step, some decibels weaker; the power of a sum is taken for the larger of
          its two powers, which is wrong by 3 dB at most
colour    gain, a smooth curve over the bands as of another microphone, and a low-pass filter
noise     a constant noise floor

`ViewDraws` holds the random numbers of all clips of a step, whoever computes them; they depend on seed and step only.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pipeline.loading.augment import NATS_PER_DB, mixup_partners
from pipeline.loading.transfer import copy_to_device

# The number of this random stream in the seed; masks have another stream, so their numbers are independent.
VIEW_STREAM = int.from_bytes(b"views")

CURVE_COSINES = 5  # slow cosines over the bands that a curve of `colour` consists of

SILENCED_DB = (
    174.0  # by which a low-pass filter weakens the bands above its cut: more than any log-mel's range
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """The views of each clip in a step: how many, and how strongly each is changed; a strength of 0 is off.

    crops         views of a clip, each cut at a random position
    stretch       the speed is drawn from [e^-stretch, e^stretch), even on a logarithmic scale
    shift_bands   the bands are moved by at most this number
    mix_share     share of the views into which another clip is mixed
    mix_high_db   the other clip is at least this much weaker ...
    mix_low_db    ... and at most this much
    gain_db       the gain is drawn from [-gain_db, gain_db)
    curve_db      standard deviation of the slowest cosine of the curve; that of the k-th is 1 / sqrt(k) of it
    low_pass_share  share of the views that lose all bands above a cut, which lies in the upper half of the bands
    noise_share   share of the views with a noise floor
    noise_db      the noise floor lies at most this much above the lowest value of the mel spec
    """

    crops: int = 2
    stretch: float = 0.15
    shift_bands: int = 0
    mix_share: float = 0.5
    mix_high_db: float = 3.0
    mix_low_db: float = 20.0
    gain_db: float = 6.0
    curve_db: float = 2.0
    low_pass_share: float = 0.2
    noise_share: float = 0.3
    noise_db: float = 30.0

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"crops must be 1 or more, got {self.crops}")
        strengths = [getattr(self, field.name) for field in fields(self)]
        if not all(0 <= strength < math.inf for strength in strengths):
            raise ValueError(f"the strengths of views must be finite and 0 or more, got {self}")
        shares = (self.mix_share, self.low_pass_share, self.noise_share)
        if max(shares) > 1 or self.mix_high_db > self.mix_low_db:
            raise ValueError(f"views need shares up to 1 and mix_high_db <= mix_low_db, got {self}")

    def source_frames(self, frames: int) -> int:
        """The number of frames that a view of `frames` frames is made from, at the highest speed."""
        return int((frames - 1) * math.exp(self.stretch)) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class InputScale:
    """How normalised values relate to log-mels: `(log-mel - mean) / std`; `floor` is the lowest log-mel."""

    mean: float = 0.0
    std: float = 1.0
    floor: float = math.log(2.0**-23)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ViewDraws:
    """The changes of the views of some clips, V = clips times crops; the views of a clip are adjacent.

    speed_V       float64
    shift_V       int64, bands by which a view moves down
    mix_V         float32, nats by which the other clip is weaker; infinite where none is mixed in
    colour_VF     float32, nats added to each band
    noise_V       float32, nats by which the noise floor lies above the lowest value
    """

    speed_V: np.ndarray
    shift_V: np.ndarray
    mix_V: np.ndarray
    colour_VF: np.ndarray
    noise_V: np.ndarray

    def select_views(self, views: slice) -> "ViewDraws":
        """The changes of these views alone."""
        return ViewDraws(**{field.name: getattr(self, field.name)[views] for field in fields(self)})


def draw_views(views: Views, seed: int, step: int, *, clips: int, bands: int) -> ViewDraws:
    """Draw the changes of the views of all clips of a step."""
    rng = np.random.default_rng([seed, step, VIEW_STREAM])
    count = clips * views.crops

    def draw_signed_V(strength: float) -> np.ndarray:
        return (2 * rng.random(count) - 1) * strength

    # Time and pitch.
    speed_V = np.exp(draw_signed_V(views.stretch))
    shift_V = np.floor(rng.random(count) * (2 * views.shift_bands + 1)).astype(np.int64) - views.shift_bands

    # The other clip.
    is_mixed_V = rng.random(count) < views.mix_share
    mix_db_V = views.mix_high_db + rng.random(count) * (views.mix_low_db - views.mix_high_db)
    mix_V = np.where(is_mixed_V, mix_db_V * NATS_PER_DB, np.inf)

    # Colour: gain, curve, low-pass.
    gain_V1 = draw_signed_V(views.gain_db)[:, None]
    order_N = np.arange(1, CURVE_COSINES + 1)
    cosine_NF = np.cos(np.pi * order_N[:, None] * (np.arange(bands) + 0.5) / bands)
    curve_VF = (rng.standard_normal((count, CURVE_COSINES)) / np.sqrt(order_N)) @ cosine_NF * views.curve_db
    is_filtered_V1 = rng.random((count, 1)) < views.low_pass_share
    cut_V1 = (1 + rng.random((count, 1))) * bands / 2
    silenced_VF = (is_filtered_V1 & (np.arange(bands) >= cut_V1)) * SILENCED_DB
    colour_VF = (gain_V1 + curve_VF - silenced_VF) * NATS_PER_DB

    # Noise.
    is_noisy_V = rng.random(count) < views.noise_share
    noise_V = is_noisy_V * rng.random(count) * views.noise_db * NATS_PER_DB
    return ViewDraws(
        speed_V=speed_V,
        shift_V=shift_V,
        mix_V=mix_V.astype(np.float32),
        colour_VF=colour_VF.astype(np.float32),
        noise_V=noise_V.astype(np.float32),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ViewBatch:
    """The views of a batch: normalised log-mels on the model's device.

    clean_BTF   the first crop of each clip with its speed and pitch, and unchanged otherwise: the teacher's input
    mel_VTF     all views, the student's input
    n_frames_V  int64 on the CPU, valid frames of each view; the first crop's are those of `clean_BTF`
    crops       views of a clip, adjacent in `mel_VTF`
    """

    clean_BTF: Tensor
    mel_VTF: Tensor
    n_frames_V: Tensor
    crops: int

    @property
    def n_frames_B(self) -> Tensor:
        """Valid frames of each clean crop."""
        return self.n_frames_V[:: self.crops]


def make_views(
    source_VTF: Tensor, n_frames_V: Tensor, draws: ViewDraws, *, frames: int, crops: int, scale: InputScale
) -> ViewBatch:
    """Return the views of some crops, `source_VTF`, that have `Views.source_frames` frames each.

    Frames past the valid ones repeat the last valid one. Another clip is mixed in by `mixup_partners`: all clips of
    the rank must be here, and an even number of them where several ranks are to make the views of one.
    """
    device = source_VTF.device
    views = len(source_VTF)

    # Speed: the frame of the source at each frame of the view.
    frame_VT = (np.arange(frames) * draws.speed_V[:, None]).astype(np.int64)
    last_V1 = (n_frames_V.numpy() - 1)[:, None]
    valid_V = torch.from_numpy((frame_VT <= last_V1).sum(1))
    frame_VT = np.minimum(frame_VT, last_V1) + np.arange(views)[:, None] * source_VTF.shape[1]
    mel_VTF = source_VTF.flatten(0, 1)[copy_to_device(frame_VT, device)]

    # Pitch: the outermost bands are repeated.
    bands = source_VTF.shape[2]
    if draws.shift_V.any():
        band_VF = np.clip(np.arange(bands) + draws.shift_V[:, None], 0, bands - 1)
        mel_VTF = mel_VTF.gather(2, copy_to_device(band_VF, device)[:, None].expand_as(mel_VTF))
    clean_BTF = mel_VTF[::crops]

    # The other clip: the same crop of the partner.
    def to_column(value_V: np.ndarray) -> Tensor:
        return copy_to_device(np.asarray(value_V / scale.std, np.float32), device)[:, None, None]

    if np.isfinite(draws.mix_V).any():
        partner_B = mixup_partners(views // crops)
        partner_V = (partner_B[:, None] * crops + np.arange(crops)).ravel()
        mel_VTF = torch.maximum(mel_VTF, mel_VTF[copy_to_device(partner_V, device)] - to_column(draws.mix_V))

    # Colour and noise.
    colour_VF = copy_to_device(draws.colour_VF / np.float32(scale.std), device)
    noise_V11 = to_column(draws.noise_V) + (scale.floor - scale.mean) / scale.std
    mel_VTF = torch.maximum(mel_VTF + colour_VF[:, None], noise_V11)
    return ViewBatch(clean_BTF=clean_BTF, mel_VTF=mel_VTF, n_frames_V=valid_V, crops=crops)
