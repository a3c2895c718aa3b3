"""Log-mel against its reference: one thread, one clip, side by side.

`python bench/mel.py` prints one line for each preset.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torchaudio

from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import MEL_PRESETS, MelSpec

ROUNDS = 20

CALLS = 10  # in a row, each side: both find the memory they gave back a moment ago


class Comparison(NamedTuple):
    """Medians over the rounds; `ratio` is the median of each round's own ratio, so that drift cancels."""

    ours_ms: float
    theirs_ms: float
    ratio: float


def kaldi(wave_BS: torch.Tensor, spec: MelSpec) -> torch.Tensor:
    """One clip through `torchaudio.compliance.kaldi.fbank`, with the settings of `spec`."""
    return torchaudio.compliance.kaldi.fbank(
        wave_BS,
        sample_frequency=spec.sample_rate_hz,
        frame_length=1000 * spec.window_samples / spec.sample_rate_hz,
        frame_shift=1000 * spec.hop_samples / spec.sample_rate_hz,
        num_mel_bins=spec.mel_bands,
        low_freq=spec.low_hz,
        high_freq=spec.high_hz,
        preemphasis_coefficient=spec.preemphasis,
        remove_dc_offset=spec.remove_dc,
        window_type="hanning",
        dither=0.0,
        use_energy=False,
    )


@lru_cache
def mel_spectrogram(spec: MelSpec) -> torchaudio.transforms.MelSpectrogram:
    """`torchaudio.transforms.MelSpectrogram` with the settings of `spec`; made once, as its users do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filterbank", UserWarning)
        return torchaudio.transforms.MelSpectrogram(
            sample_rate=spec.sample_rate_hz,
            n_fft=spec.fft_samples,
            hop_length=spec.hop_samples,
            f_min=spec.low_hz,
            f_max=spec.high_hz,
            n_mels=spec.mel_bands,
            norm="slaney",
            mel_scale="slaney",
        )


@lru_cache
def kaldi_banks(spec: MelSpec) -> torch.Tensor:
    """`torchaudio.compliance.kaldi.get_mel_banks` with the settings of `spec` and a row for Nyquist; made once."""
    banks, _ = torchaudio.compliance.kaldi.get_mel_banks(
        spec.mel_bands, spec.fft_samples, spec.sample_rate_hz, spec.low_hz, spec.high_hz, 100.0, -500.0, 1.0
    )
    return torch.nn.functional.pad(banks, (0, 1))


@lru_cache
def spectrogram(spec: MelSpec) -> torchaudio.transforms.Spectrogram:
    """`torchaudio.transforms.Spectrogram` with PaSST's window."""
    return torchaudio.transforms.Spectrogram(
        spec.fft_samples,
        win_length=spec.window_samples,
        hop_length=spec.hop_samples,
        window_fn=torch.hann_window,
        wkwargs={"periodic": False},
    )


def reference(wave_BS: torch.Tensor, spec: MelSpec) -> torch.Tensor:
    """One clip as `mel_TF`, made of torchaudio's pieces."""
    if spec.framing == "kaldi":
        return kaldi(wave_BS, spec)
    if spec.filters == "slaney":
        return mel_spectrogram(spec)(wave_BS)[0].clamp(min=spec.floor).log().T
    emphasised_BS = wave_BS[:, 1:] - spec.preemphasis * wave_BS[:, :-1]
    return (kaldi_banks(spec) @ spectrogram(spec)(emphasised_BS)[0] + spec.floor).log().T


def compare(spec: MelSpec, *, rounds: int = ROUNDS) -> Comparison:
    """Time both on one clip of noise, in turns, on the threads torch has."""
    wave_BS = 0.1 * torch.randn(1, spec.clip_samples, generator=torch.Generator().manual_seed(0))
    log_mel(wave_BS, spec), reference(wave_BS, spec)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: log_mel(wave_BS, spec)))
        theirs.append(seconds(lambda: reference(wave_BS, spec)))
    ratios = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
    return Comparison(
        1000 * statistics.median(ours), 1000 * statistics.median(theirs), statistics.median(ratios)
    )


def seconds(call: Callable[[], object]) -> float:
    """Processor time of one call, the mean of `CALLS`: on one thread the wall time, but for what others run."""
    started = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - started) / CALLS


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(
        f"log-mel of one clip, one thread, {ROUNDS} rounds of {CALLS} calls each, in turns, medians of processor time"
    )
    for spec in MEL_PRESETS.values():
        result = compare(spec)
        print(
            f"{spec.name:12} {result.ours_ms:6.2f} ms   torchaudio {result.theirs_ms:6.2f} ms"
            f"   {result.ratio:4.2f}x faster (at least 2.5x wanted)"
        )


if __name__ == "__main__":
    main()
