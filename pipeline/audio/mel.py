"""Log-mel spectrograms of waveforms: frames, windows, power spectra, mel filters, logarithm."""

from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pipeline.audio.mel_scales import hz_to_kaldi_mel, hz_to_slaney_mel
from pipeline.audio.mel_spec import MelSpec

# Samples of windowed frames that a CPU processes at a time: 256 frames of 1024. Twice as many do not fit into the
# cache; half as many need more calls.
PIECE_SAMPLES = 2**18

# Mel bands per dense product on a CPU; measured from 8 to 128. 16 is as fast, except with many bands.
BLOCK_BANDS = 32


def log_mel(wave_BS: Tensor, spec: MelSpec) -> Tensor:
    """Log mel power as `mel_BTF`, float32, natural logarithm, on the wave's device; T = `spec.frames_of(S)`.

    Framing `kaldi` gives Kaldi's fbank (Povey et al. 2011) without dither, as `torchaudio.compliance.kaldi.fbank`
    computes it; `centred` gives a centred short-time Fourier transform, as torchaudio and librosa compute it.
    The wave is float32 in [-1, 1]; larger samples are not clipped. No gradient flows. The values of a clip do not
    depend on the other clips of the batch.
    """
    frames = spec.frames_of(wave_BS.shape[-1])
    mel_BTF = wave_BS.new_empty(len(wave_BS), frames, spec.mel_bands)
    if not mel_BTF.numel():
        return mel_BTF

    # On a CPU, the buffers of one piece of frames should stay in the cache.
    frames_at_once = frames
    if mel_BTF.is_cpu:
        frames_at_once = min(frames, max(1, PIECE_SAMPLES // spec.fft_samples))

    # `mel_BTF` was made outside of inference mode, so autograd may use it although it is filled inside.
    with torch.inference_mode(), torch.autocast(wave_BS.device.type, enabled=False):
        buffers = FrameBuffers.allocate(frames_at_once, spec, mel_BTF.device)
        for wave_S, mel_TF in zip(wave_BS, mel_BTF, strict=True):
            write_log_mel(mel_TF, split_into_frames(wave_S, spec), spec, buffers)
    return mel_BTF


def write_log_mel(mel_TF: Tensor, frames_TN: Tensor, spec: MelSpec, buffers: "FrameBuffers") -> None:
    """Fill `mel_TF` from raw frames, as many at a time as the buffers hold."""
    frames_at_once = len(buffers.windowed_TN)
    for first in range(0, len(mel_TF), frames_at_once):
        piece = slice(first, first + frames_at_once)
        piece_TF = mel_TF[piece]
        write_mel_power(piece_TF, apply_window(frames_TN[piece], spec, buffers), spec, buffers)
        if spec.flooring == "add":
            piece_TF.add_(spec.floor)

        # The clamp comes after the logarithm, so that silence is `floor_log` to the bit on any device.
        piece_TF.log_().clamp_(min=spec.floor_log)


def split_into_frames(wave_S: Tensor, spec: MelSpec) -> Tensor:
    """Raw frames as a view `frames_TN` of the wave, which for framing `centred` is first emphasised and padded."""
    if spec.framing == "centred":
        wave_S = emphasise_and_pad(wave_S, spec)
    return wave_S.unfold(-1, spec.window_samples, spec.hop_samples)


def emphasise_and_pad(wave_S: Tensor, spec: MelSpec) -> Tensor:
    """The wave, emphasised, with half a window of its mirror image at each end; end samples are not doubled.

    A wave shorter than half a window is mirrored again and again, as NumPy's `pad` does (torch's refuses).
    """
    # One buffer holds the padding before, the wave, and the padding after.
    before = (spec.window_samples + 1) // 2
    after = spec.window_samples // 2
    samples = len(wave_S) - (spec.preemphasis > 0)
    whole_S = wave_S.new_empty(before + samples + after)

    # Pre-emphasis in two steps, each rounded, as the references do.
    inner_S = whole_S[before : before + samples]
    if spec.preemphasis:
        torch.mul(wave_S[:-1], spec.preemphasis, out=inner_S)
        torch.sub(wave_S[1:], inner_S, out=inner_S)
    else:
        inner_S.copy_(wave_S)

    # A mirrored wave is periodic: once forwards, once backwards. `first` is the number of a padding's first sample.
    period = max(1, 2 * (samples - 1))
    for padding_S, first in ((whole_S[:before], -before), (whole_S[before + samples :], samples)):
        place_S = torch.arange(first, first + len(padding_S), device=wave_S.device) % period
        torch.index_select(inner_S, 0, torch.minimum(place_S, period - place_S), out=padding_S)
    return whole_S


class FrameBuffers(NamedTuple):
    """Buffers for one piece of frames, reused for the next piece: allocating it each time costs a tenth of the time."""

    zero_mean_TN: Tensor
    windowed_TN: Tensor  # zeros beyond the window
    power_TN: Tensor

    @classmethod
    def allocate(cls, frames: int, spec: MelSpec, device: torch.device) -> Self:
        """Buffers for `frames` frames."""
        return cls(
            zero_mean_TN=torch.empty(frames, spec.window_samples, dtype=torch.float32, device=device),
            windowed_TN=torch.zeros(frames, spec.fft_samples, dtype=torch.float32, device=device),
            power_TN=torch.empty(frames, spec.fft_samples // 2 + 1, dtype=torch.float32, device=device),
        )


def apply_window(frames_TN: Tensor, spec: MelSpec, buffers: FrameBuffers) -> Tensor:
    """Frames times the window, padded to `fft_samples`; Kaldi's frames lose their DC and are emphasised first.

    Every step is rounded as in the reference: next to a full-scale tone, values near the floor depend on the last bit
    of these samples. Filtering the whole wave once would save 0.5 ms, with errors of up to 0.06 nat in such values;
    a fused multiply-add (`torch.sub` with `alpha`) has errors of up to 0.05 nat.
    """
    windowed_TN = buffers.windowed_TN[: len(frames_TN)]
    window_N = hann_window_N(spec.window_samples, spec.window == "hann_periodic", frames_TN.device)

    # Centred: the window is in the middle of the FFT, as in the references. This changes rounding errors only.
    if spec.framing == "centred":
        first = (spec.fft_samples - spec.window_samples) // 2
        torch.mul(frames_TN, window_N, out=windowed_TN[:, first : first + spec.window_samples])
        return windowed_TN

    # Kaldi: the first sample of a frame is left out, because the window is 0 there.
    if spec.remove_dc:
        zero_mean_TN = buffers.zero_mean_TN[: len(frames_TN)]
        frames_TN = torch.sub(frames_TN, frames_TN.mean(-1, keepdim=True), out=zero_mean_TN)
    inner_TN = windowed_TN[:, 1 : spec.window_samples]
    torch.mul(frames_TN[:, :-1], spec.preemphasis, out=inner_TN)
    torch.sub(frames_TN[:, 1:], inner_TN, out=inner_TN)
    inner_TN *= window_N[1:]
    return windowed_TN


def write_mel_power(mel_TF: Tensor, windowed_TN: Tensor, spec: MelSpec, buffers: FrameBuffers) -> None:
    """Fill `mel_TF` with the mel power of windowed frames: power spectrum, then filters."""
    # Real and imaginary parts are adjacent. Adding them up is six times faster than `.abs() ** 2` or `.sum(-1)`.
    squares_TN = torch.view_as_real(torch.fft.rfft(windowed_TN)).flatten(-2).square_()
    power_TN = torch.add(squares_TN[:, ::2], squares_TN[:, 1::2], out=buffers.power_TN[: len(mel_TF)])
    for block in mel_filter_blocks(spec, mel_TF.device):
        torch.mm(power_TN[:, block.bins], block.filters_NF, out=mel_TF[:, block.bands])


# The tensors in these caches are made outside of inference mode: autograd refuses those made inside.
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def hann_window_N(samples: int, periodic: bool, device: torch.device) -> Tensor:
    """The Hann window, whose first sample is 0."""
    return torch.hann_window(samples, periodic=periodic, dtype=torch.float32, device="cpu").to(device)


class FilterBlock(NamedTuple):
    """The filters of neighbouring bands, cut to the bins that they touch: most of the full matrix is zero."""

    bins: slice
    bands: slice
    filters_NF: Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def mel_filter_blocks(spec: MelSpec, device: torch.device) -> tuple[FilterBlock, ...]:
    """The filter bank as a few dense matrices; on a GPU as one matrix, because launches cost more there than zeros."""
    filters_NF = mel_filters_NF(spec)
    bands_per_block = BLOCK_BANDS if device.type == "cpu" else spec.mel_bands
    blocks = []
    for first in range(0, spec.mel_bands, bands_per_block):
        bands = slice(first, min(first + bands_per_block, spec.mel_bands))

        # A block of empty filters still needs a bin, which gives its bands the power 0.
        touched_bins = filters_NF[:, bands].any(1).nonzero().flatten().tolist() or [0]
        bins = slice(touched_bins[0], touched_bins[-1] + 1)
        weights_NF = filters_NF[bins, bands].contiguous().to(device)
        blocks.append(FilterBlock(bins, bands, weights_NF))
    return tuple(blocks)


def mel_filters_NF(spec: MelSpec) -> Tensor:
    """The filter bank: the weight of every bin of the power spectrum (rows) in every band (columns)."""
    return kaldi_filters_NF(spec) if spec.filters == "kaldi" else slaney_filters_NF(spec)


def kaldi_filters_NF(spec: MelSpec) -> Tensor:
    """Triangles on Kaldi's scale; the last bin (Nyquist) has no weight.

    They are computed in float32 as in the reference: in float64 the small weights at the ends of the triangles would
    differ by 1 %.
    """
    # Positions of bins in mel.
    bin_hz_N = arange_float32(spec.fft_samples // 2) * (spec.sample_rate_hz / spec.fft_samples)
    bin_mel_N1 = 1127.0 * (1.0 + bin_hz_N / 700.0).log()[:, None]

    # Corners of triangles: evenly spaced in mel.
    low_mel = hz_to_kaldi_mel(spec.low_hz)
    high_mel = hz_to_kaldi_mel(spec.high_hz)
    step_mel = (high_mel - low_mel) / (spec.mel_bands + 1)
    edges_mel = low_mel + arange_float32(spec.mel_bands + 2) * step_mel
    return torch.nn.functional.pad(triangle_filters_NF(bin_mel_N1, edges_mel), (0, 0, 0, 1))


def slaney_filters_NF(spec: MelSpec) -> Tensor:
    """Triangles of area 1 over Hz, their corners evenly spaced on the scale of Slaney's Auditory Toolbox (1998).

    They are computed in float64 as in librosa.
    """
    # Positions of bins in Hz.
    bin_N1 = arange_float32(spec.fft_samples // 2 + 1).double()[:, None]
    bin_hz_N1 = bin_N1 * spec.sample_rate_hz / spec.fft_samples

    # Corners of triangles: evenly spaced in mel, then in Hz.
    low_mel = hz_to_slaney_mel(spec.low_hz)
    high_mel = hz_to_slaney_mel(spec.high_hz)
    step_mel = (high_mel - low_mel) / (spec.mel_bands + 1)
    edges_mel = low_mel + arange_float32(spec.mel_bands + 2).double() * step_mel
    edges_hz = torch.where(edges_mel < 15, edges_mel * 200 / 3, 1000 * 6.4 ** ((edges_mel - 15) / 27))

    # Each triangle is divided by its area, so a wide one has smaller weights.
    area_F = (edges_hz[2:] - edges_hz[:-2]) / 2
    return (triangle_filters_NF(bin_hz_N1, edges_hz) / area_F).float()


def triangle_filters_NF(position_N1: Tensor, edges: Tensor) -> Tensor:
    """Weights of positions in triangles, each of which rises from 0 at an edge to 1 at the next, then falls to 0."""
    left_F, centre_F, right_F = edges[:-2], edges[1:-1], edges[2:]
    rising_NF = (position_N1 - left_F) / (centre_F - left_F)
    falling_NF = (right_F - position_N1) / (right_F - centre_F)
    return torch.minimum(rising_NF, falling_NF).clamp(min=0.0)


def arange_float32(length: int) -> Tensor:
    """0, 1, 2, ... in float32 on the CPU, whatever torch's defaults are set to."""
    return torch.arange(length, dtype=torch.float32, device="cpu")
