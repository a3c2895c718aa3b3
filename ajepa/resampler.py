"""Resampler: audio at another rate as `pipeline.audio` has it, by a convolution: what a graph changes rates with."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.audio import resampled_pieces
from pipeline.errors import RunError

REACH_SAMPLES = 128  # of soxr's filter to either side, at the lower of two rates: past it 1e-7 is left
MOST_WEIGHTS = 2**24  # 64 MB
START_SAMPLES = 64  # given at most that the beginning of a sound changes


class Resampler(nn.Module):
    """`samples` of audio from one rate to another, sample for sample what soxr gives: to 2e-6 of full scale.

    It answers single impulses, and its answers are the weights: soxr is linear, and the same again every `down`
    samples in, `up` samples out. But for a sound's beginning: of two filters in a row the second hears nothing of
    what the first makes before it, which changes some first samples by a hundredth of a step there.
    RunError where the rates have so little in common that this would be a very large network.
    """

    def __init__(self, from_hz: int, to_hz: int, samples: int) -> None:
        super().__init__()
        common = math.gcd(from_hz, to_hz)
        self.from_hz, self.to_hz, self.samples = from_hz, to_hz, samples
        self.up, self.down = to_hz // common, from_hz // common
        self.reach = math.ceil(REACH_SAMPLES * max(1, self.down / self.up))
        if self.up * (self.down + 2 * self.reach) > MOST_WEIGHTS:
            raise RunError(
                f"audio at {from_hz} Hz for a mel spec at {to_hz} Hz: a graph for this ratio, "
                f"{self.up}/{self.down}, would be too large; choose --audio-hz {to_hz}"
            )
        self.register_buffer("kernels_L1K", self._kernels())
        self.register_buffer("start_FE", self._start())

    kernels_L1K: Tensor
    start_FE: Tensor

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """The audio of `samples` at the other rate, and how many of its samples are sound; zeros lie around it."""
        place_S = torch.arange(audio_BS.shape[1], device=audio_BS.device)
        heard_BS = torch.where(place_S < samples_B[:, None], audio_BS, 0.0)
        steady_BS = self._steady(heard_BS, round(self.samples * self.up / self.down))
        first, given = self.start_FE.shape
        start_BE = heard_BS[:, :first] @ self.start_FE[: heard_BS.shape[1]]
        resampled_BS = torch.cat((steady_BS[:, :given] + start_BE, steady_BS[:, given:]), dim=1)
        return resampled_BS, ((samples_B * self.up).double() / self.down).round().long()

    def _steady(self, audio_BS: Tensor, given: int) -> Tensor:
        after = -(-given // self.up) * self.down + self.reach - audio_BS.shape[1]
        padded_BS = nn.functional.pad(audio_BS, (self.reach, after))
        told_BLN = nn.functional.conv1d(padded_BS[:, None], self.kernels_L1K, stride=self.down)
        return told_BLN.transpose(1, 2).flatten(1)[:, :given]

    def _kernels(self) -> Tensor:
        """What each of `up` samples out takes of the samples in around it, `[up, 1, down + 2 reach]`."""
        groups = -(-self.reach // self.down) + 1  # of `down` samples, before and after the impulse
        kernels_LK = torch.zeros(self.up, self.down + 2 * self.reach)
        for place in range(self.down):
            impulse_S = np.zeros((2 * groups + 1) * self.down, np.float32)
            impulse_S[groups * self.down + place] = 1
            for group, answer_L in enumerate(self._answer(impulse_S).split(self.up)):
                index = place + (groups - group) * self.down + self.reach
                if 0 <= index < kernels_LK.shape[1]:
                    kernels_LK[:, index] = answer_L
        return kernels_LK[:, None]

    def _start(self) -> Tensor:
        """What the first samples out take of the first in beside that, `[reach, START_SAMPLES or fewer]`."""
        impulses_FS = np.eye(self.reach, 2 * self.reach + self.down, dtype=np.float32)
        given = min(START_SAMPLES, round(self.samples * self.up / self.down))
        actual_FS = torch.stack([self._answer(impulse_S) for impulse_S in impulses_FS])
        given = min(given, actual_FS.shape[1])
        return actual_FS[:, :given] - self._steady(torch.from_numpy(impulses_FS), given)

    def _answer(self, wave_S: np.ndarray) -> Tensor:
        return torch.from_numpy(
            np.concatenate(list(resampled_pieces(iter([wave_S]), self.from_hz, self.to_hz)))
        )
