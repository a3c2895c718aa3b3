"""Mel scales, and the middles of bands on them; without PyTorch, which takes seconds to import, for who draws an axis.

Kaldi's scale is 1127 ln(1 + f / 700). That of Slaney's Auditory Toolbox (1998) has 3 mel in 200 Hz up to 1 kHz, and 27
mel in each factor of 6.4 above.
"""

import math

from pipeline.audio.mel_spec import MelSpec


def hz_to_kaldi_mel(hz: float) -> float:
    """A frequency on Kaldi's scale."""
    return 1127.0 * math.log(1.0 + hz / 700.0)


def kaldi_mel_to_hz(mel: float) -> float:
    """The frequency of a place on Kaldi's scale."""
    return 700.0 * math.expm1(mel / 1127.0)


def hz_to_slaney_mel(hz: float) -> float:
    """A frequency on Slaney's scale."""
    if hz < 1000:
        return hz * 3 / 200
    return 15 + 27 * math.log(hz / 1000, 6.4)


def slaney_mel_to_hz(mel: float) -> float:
    """The frequency of a place on Slaney's scale."""
    if mel < 15:
        return mel * 200 / 3
    return 1000 * 6.4 ** ((mel - 15) / 27)


def band_centres_hz(spec: MelSpec) -> tuple[float, ...]:
    """The frequency at which the filter of each band peaks: its corners are evenly spaced on the mel scale."""
    scales = {"kaldi": (hz_to_kaldi_mel, kaldi_mel_to_hz), "slaney": (hz_to_slaney_mel, slaney_mel_to_hz)}
    to_mel, to_hz = scales[spec.filters]
    low_mel, high_mel = to_mel(spec.low_hz), to_mel(spec.high_hz)
    step_mel = (high_mel - low_mel) / (spec.mel_bands + 1)
    return tuple(to_hz(low_mel + step_mel * (1 + band)) for band in range(spec.mel_bands))
