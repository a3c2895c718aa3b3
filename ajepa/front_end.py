"""FrontEnd: audio at any rate -> log-mel, as a network of convolutions: what a graph computes inside itself."""

import torch
from torch import Tensor, nn

from ajepa.resampler import Resampler
from pipeline.mel import hann_N, mel_filters_NF
from pipeline.melspec import MelSpec


class FrontEnd(nn.Module):
    """`pipeline.mel.log_mel` of the first `frames` frames, for any mel spec, with nothing but products and sums.

    Spectra come from one convolution, whose kernels are the DFT and all that is linear before it. Sounds begin with
    their first sample and end with the last of their `samples_B`: what lies past it is not heard, and a centred
    frame meets a mirror there. Another rate than the spec's is changed first (`Resampler`).

    samples  of audio at `rate_hz` that fill so many frames
    """

    def __init__(self, spec: MelSpec, frames: int, rate_hz: int) -> None:
        super().__init__()
        self.spec, self.frames = spec, frames
        self.samples = -(-spec.samples_of(frames) * rate_hz // spec.sample_rate_hz)
        same = rate_hz == spec.sample_rate_hz
        self.resampler = None if same else Resampler(rate_hz, spec.sample_rate_hz, self.samples)
        filters_NF = mel_filters_NF(spec)
        touched_N = filters_NF.any(1)
        self.register_buffer(
            "kernels_K1N", spectrum_kernels(spec)[:, touched_N].flatten(0, 1)[:, None].float()
        )
        self.register_buffer("filters_NF", filters_NF[touched_N])

    kernels_K1N: Tensor
    filters_NF: Tensor

    def forward(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """`mel_BTF`, and how many of its frames are sound; those past them mean nothing."""
        samples_B = samples_B.clamp(0, self.samples)
        if self.resampler is not None:
            audio_BS, samples_B = self.resampler(audio_BS, samples_B)
        if self.spec.framing == "kaldi":
            frames_B = (1 + (samples_B - self.spec.window_samples) // self.spec.hop_samples).clamp(min=0)
        else:
            audio_BS, samples_B = self.emphasised(audio_BS, samples_B)
            frames_B = torch.where(samples_B > 0, 1 + samples_B // self.spec.hop_samples, 0)
            audio_BS = self.prolonged(audio_BS, samples_B)
        return self.log_mel(audio_BS), frames_B.clamp(max=self.frames)

    def emphasised(self, audio_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-emphasis over the whole wave, which costs it a sample."""
        if not self.spec.preemphasis:
            return audio_BS, samples_B
        return audio_BS[:, 1:] - self.spec.preemphasis * audio_BS[:, :-1], (samples_B - 1).clamp(min=0)

    def prolonged(self, audio_BS: Tensor, samples_B: Tensor) -> Tensor:
        """All frames' samples, with the wave's mirror image before it and past its end (`pipeline.mel.prolonged`)."""
        window, hop = self.spec.window_samples, self.spec.hop_samples
        place_N = torch.arange((self.frames - 1) * hop + window, device=audio_BS.device) - (window + 1) // 2
        period_B1 = (2 * (samples_B - 1)).clamp(min=1)[:, None]
        place_BN = place_N % period_B1
        return audio_BS.gather(1, torch.minimum(place_BN, period_B1 - place_BN))

    def log_mel(self, audio_BS: Tensor) -> Tensor:
        """Of frames that lie side by side in the audio."""
        both_BKT = nn.functional.conv1d(audio_BS[:, None], self.kernels_K1N, stride=self.spec.hop_samples)
        power_BNT = both_BKT[:, :, : self.frames].square().unflatten(1, (2, -1)).sum(1)
        mel_BTF = power_BNT.transpose(1, 2) @ self.filters_NF
        if self.spec.flooring == "add":
            mel_BTF = mel_BTF + self.spec.floor
        return mel_BTF.clamp(min=self.spec.floor).log()


def spectrum_kernels(spec: MelSpec) -> Tensor:
    """`[2, bin, sample]`, float64: the real and imaginary parts of a raw frame's spectrum, Kaldi's steps included.

    Those are: less the frame's mean, pre-emphasis, window, DFT; a product of matrices, made from its left.
    """
    bin_K, sample_N = torch.arange(spec.fft_samples // 2 + 1).double(), torch.arange(spec.window_samples)
    angle_KN = bin_K[:, None] * sample_N * (2 * torch.pi / spec.fft_samples)
    window_N = hann_N(spec.window_samples, spec.window == "hann_periodic", torch.device("cpu")).double()
    kernels_2KN = torch.stack((angle_KN.cos(), -angle_KN.sin())) * window_N
    if spec.framing == "kaldi":  # the window's first sample is 0: what precedes a frame does not matter
        kernels_2KN = kernels_2KN - spec.preemphasis * nn.functional.pad(kernels_2KN[..., 1:], (0, 1))
    return kernels_2KN - kernels_2KN.mean(-1, keepdim=True) if spec.remove_dc else kernels_2KN
