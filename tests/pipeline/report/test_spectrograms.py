"""Pictures of spectrograms are right about Hz and seconds, and show clips of different classes."""

import io
import math
from dataclasses import replace

import librosa
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pipeline.audio.mel import log_mel, mel_filters_NF
from pipeline.audio.mel_scales import band_centres_hz
from pipeline.audio.mel_spec import MEL_PRESETS
from pipeline.report.html import COLOUR_LEVELS, palette_png, spectrogram_chart
from pipeline.report.spectrograms import (
    draw_contact_sheet,
    mel_band_ticks,
    pick_varied_rows,
)
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import read_label_table


def mel_of_tone(hz: float, spec) -> np.ndarray:
    time_S = torch.arange(spec.clip_samples) / spec.sample_rate_hz
    return log_mel(0.5 * torch.sin(2 * math.pi * hz * time_S)[None], spec)[0].numpy()


@pytest.mark.parametrize("spec", MEL_PRESETS.values(), ids=MEL_PRESETS)
@pytest.mark.parametrize("hz", [500.0, 1_000.0, 4_000.0])
def test_a_pure_tone_lights_at_its_own_tick(spec, hz):
    """The brightest band lies within one band of the tick, in every spec."""
    place_of = {label: place for place, label in mel_band_ticks(spec, min_gap=0.0)}
    place = place_of[f"{hz / 1000:g}k" if hz >= 1_000 else f"{hz:g}"]
    loudest = mel_of_tone(hz, spec).mean(0).argmax()
    assert abs(loudest + 0.5 - place) <= 1


@pytest.mark.parametrize("spec", MEL_PRESETS.values(), ids=MEL_PRESETS)
def test_centres_are_those_of_the_filters(spec):
    """Triangles peak at equal distances on their own mel scale: Kaldi's 1127 ln(1 + f / 700), or Slaney's."""
    if spec.filters == "slaney":
        centres_F = librosa.mel_frequencies(spec.mel_bands + 2, fmin=spec.low_hz, fmax=spec.high_hz)[1:-1]
    else:
        low, high = (1127 * math.log(1 + hz / 700) for hz in (spec.low_hz, spec.high_hz))
        centres_F = 700 * np.expm1(np.linspace(low, high, spec.mel_bands + 2)[1:-1] / 1127)
    np.testing.assert_allclose(band_centres_hz(spec), centres_F, rtol=1e-9)

    # The filters themselves peak there, to a bin of a fine grid.
    fine_spec = replace(spec, fft_samples=2**16)
    bin_hz = spec.sample_rate_hz / fine_spec.fft_samples
    peaks_F = mel_filters_NF(fine_spec).argmax(0).numpy() * bin_hz
    assert np.abs(peaks_F - centres_F).max() <= bin_hz


@pytest.mark.parametrize("spec", MEL_PRESETS.values(), ids=MEL_PRESETS)
def test_ticks_do_not_run_into_each_other(spec):
    """Octaves are close together at the bottom of a mel axis."""
    places = [place for place, _ in mel_band_ticks(spec)]
    assert len(places) >= 5
    assert min(np.diff(places)) >= 0.07 * spec.mel_bands


def test_the_page_draws_low_bands_below_and_time_to_the_right():
    """The PNG is written by hand; matplotlib reads it back."""
    mel_TF = np.zeros((5, 4), np.float32)
    mel_TF[1, 0], mel_TF[4, 3] = 1.0, 0.5
    brightness = imread(io.BytesIO(palette_png(mel_TF, (0.0, 1.0))))[..., :3].sum(-1)
    assert brightness.shape == (4, 5)
    assert np.unravel_index(brightness.argmax(), brightness.shape) == (3, 1)
    assert brightness[0, 4] > brightness[0, 0]


def test_values_beyond_the_range_get_the_first_or_last_colour():
    """Colours do not wrap around: a loud value must not look quiet."""
    picture = imread(io.BytesIO(palette_png(np.array([[-9.0], [0.0], [1.0], [9.0]]), (0.0, 1.0))))
    assert (picture[0, 0] == picture[0, 1]).all()
    assert (picture[0, 2] == picture[0, 3]).all()
    assert COLOUR_LEVELS <= 256


def test_the_end_of_a_clip_is_marked_where_its_frames_end():
    """Half of the frames of 8 s on an axis of 10 s: at 4 s."""
    short = spectrogram_chart(
        np.zeros((80, 4)), (0.0, 1.0), [(2.0, "1k")], seconds=10, frame_seconds=0.1, valid_frames=40
    )
    whole = spectrogram_chart(
        np.zeros((80, 4)), (0.0, 1.0), [(2.0, "1k")], seconds=10, frame_seconds=0.1, valid_frames=80
    )
    assert '<line x1="164"' in short  # 40 + 4 / 10 of 310
    assert 'class="dimmed"' not in whole


def test_a_sheet_shows_different_classes(store):
    """Twelve clips of one common class would show one kind of sound."""
    rows_B = pick_varied_rows(store, read_label_table(store)[0], 4)
    assert store.labels_BC(rows_B).sum(0).max() == 1
    assert store.labels_BC(rows_B).sum(1).min() >= 1
    assert len(set(pick_varied_rows(store, read_label_table(store)[0], 30).tolist())) == 30


def test_a_sheet_is_a_picture(store, tmp_path, monkeypatch):
    """With more clips asked for than there are, it shows all: of seven, three in a row, there are three rows."""
    seven_N = store.good_rows()[:7]
    monkeypatch.setattr(FeatureStore, "good_rows", lambda store: seven_N)
    draw_contact_sheet(store, tmp_path / "new" / "mels.png", clip_count=60)
    assert imread(tmp_path / "new" / "mels.png").shape[0] == pytest.approx(3 * 2.3 * 110, abs=1)
