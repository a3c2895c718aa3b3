"""The front end of graphs: every mel spec's values, at every length and rate, from convolutions alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from own_specs import OWN, own_spec
from sounds import babble

from ajepa.front_end import FrontEnd
from ajepa.resampler import Resampler
from pipeline.audio import resampled_pieces
from pipeline.errors import RunError
from pipeline.mel import log_mel
from pipeline.melspec import A_JEPA, PRESETS, MelSpec

FRAMES, RATE_HZ = 24, 32_000


def expected_TF(wave_S: np.ndarray, spec: MelSpec, rate_hz: int) -> torch.Tensor:
    """As files and arrays are embedded."""
    if rate_hz != spec.sample_rate_hz:
        wave_S = np.concatenate(list(resampled_pieces(iter([wave_S]), rate_hz, spec.sample_rate_hz)))
    return log_mel(torch.from_numpy(wave_S)[None], spec)[0]


@pytest.mark.parametrize("name", [*PRESETS, *OWN])
def test_every_mel_spec_has_its_values_at_every_length(name, tmp_path):
    """Full windows, part of one, a single frame and none; what lies past the end, even nan, is not heard."""
    spec = PRESETS.get(name) or own_spec(name, tmp_path)
    made = FrontEnd(spec, FRAMES, RATE_HZ)
    noise_S = np.random.default_rng(0).uniform(-1, 1, made.samples).astype(np.float32)
    shortest = next(n for n in range(1, 9_999) if len(expected_TF(noise_S[:n], spec, RATE_HZ)))
    lengths = [made.samples, made.samples, made.samples * 2 // 3 + 1, shortest, shortest - 1]
    audio_BS = np.stack([noise_S, babble(4.0, RATE_HZ)[: made.samples], *[noise_S] * 3])
    for wave_S, length in zip(audio_BS, lengths, strict=True):
        wave_S[length:] = np.nan
    mel_BTF, frames_B = made(torch.from_numpy(audio_BS), torch.tensor(lengths))
    assert mel_BTF.shape == (5, FRAMES, spec.mel_bands)
    assert frames_B[[0, 1, -2, -1]].tolist() == [FRAMES, FRAMES, 1, 0]
    for mel_TF, frames, wave_S, length in zip(mel_BTF, frames_B, audio_BS, lengths, strict=True):
        told_TF = expected_TF(wave_S[:length], spec, RATE_HZ)[:FRAMES]
        assert len(told_TF) == frames
        if frames:
            apart_TF = (mel_TF[:frames] - told_TF).abs()
            assert apart_TF.quantile(0.98) < 1e-2
            assert apart_TF.max() < 0.1  # in bands without sound, beside loud ones, all is rounding


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(32_000, 16_000), (8_000, 32_000), (44_100, 32_000), (32_000, 44_100)]
)
def test_another_rate_is_the_resamplers_own(from_hz, to_hz):
    """No other filter: sample for sample what soxr gives, beginning and end included."""
    spec = replace(A_JEPA, sample_rate_hz=to_hz, high_hz=to_hz / 2)
    made = FrontEnd(spec, FRAMES, from_hz)
    wave_S = np.random.default_rng(0).uniform(-1, 1, made.samples).astype(np.float32)
    for length in (made.samples, made.samples // 2 + 1):
        resampled_S = np.concatenate(list(resampled_pieces(iter([wave_S[:length]]), from_hz, to_hz)))
        told_BS, samples_B = made.resampler(torch.from_numpy(wave_S)[None], torch.tensor([length]))
        assert samples_B.tolist() == [len(resampled_S)]
        np.testing.assert_allclose(told_BS[0, : len(resampled_S)], resampled_S, atol=2e-6)


def test_a_window_is_the_shortest_sound_that_fills_the_view():
    """A sample less, and the last frame is gone."""
    for spec in PRESETS.values():
        samples = FrontEnd(spec, FRAMES, spec.sample_rate_hz).samples
        assert (spec.frames_of(samples), spec.frames_of(samples - 1)) == (FRAMES, FRAMES - 1)


def test_rates_without_a_common_measure_are_refused():
    """22,051 to 32,000 Hz would be a filter for each of 32,000 phases."""
    with pytest.raises(RunError, match=r"32000/22051, would be too large; choose --audio-hz 32000"):
        Resampler(22_051, 32_000, 10_000)
