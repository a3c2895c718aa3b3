"""Every formula sounds like the definition of its class."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from pipeline.datasets.demo.synthesis import FORMULA_SOUNDS, SYNTHESIS_RATE_HZ

SEEDS = range(4)

SECONDS = 6

FORMULA = {sound.name: sound for sound in FORMULA_SOUNDS}


def render_sound(name: str, seed: int, seconds: float = SECONDS) -> np.ndarray:
    """A sound of this name, float64."""
    return np.asarray(
        FORMULA[name].make_wave(np.random.default_rng(seed), round(seconds * SYNTHESIS_RATE_HZ)),
        dtype=np.float64,
    )


def power_spectrum(wave_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and the share of the power at each."""
    power_N = np.abs(np.fft.rfft(wave_S * np.hanning(len(wave_S)))) ** 2
    return np.fft.rfftfreq(len(wave_S), 1 / SYNTHESIS_RATE_HZ), power_N / power_N.sum()


def share_near(wave_S: np.ndarray, *hz: float, width_hz: float = 3.0) -> float:
    """The share of the power within `width_hz` of any of these frequencies."""
    hz_N, power_N = power_spectrum(wave_S)
    return sum(power_N[np.abs(hz_N - each) < width_hz].sum() for each in hz)


def loudest_hz(wave_S: np.ndarray) -> float:
    hz_N, power_N = power_spectrum(wave_S)
    return hz_N[power_N.argmax()]


def slope_db_per_octave(wave_S: np.ndarray) -> float:
    """The slope of the power per hertz over the eight octaves from 60 Hz on."""
    hz_N, power_N = power_spectrum(wave_S)
    edges_hz = 60.0 * 2.0 ** np.arange(9)
    bands = [(hz_N >= low) & (hz_N < high) for low, high in pairwise(edges_hz)]
    return np.polyfit(np.arange(8), [10 * np.log10(power_N[band].mean()) for band in bands], 1)[0]


def envelope(wave_S: np.ndarray, *, step_seconds: float = 0.005) -> np.ndarray:
    """The RMS of each step, the loudest being 1."""
    step = round(step_seconds * SYNTHESIS_RATE_HZ)
    rms_N = np.sqrt(np.square(wave_S[: len(wave_S) // step * step].reshape(-1, step)).mean(axis=1))
    return rms_N / rms_N.max()


def onsets_seconds(wave_S: np.ndarray, *, threshold: float = 0.3, step_seconds: float = 0.005) -> np.ndarray:
    """When the envelope rises above the threshold."""
    on_N = envelope(wave_S, step_seconds=step_seconds) > threshold
    return np.flatnonzero(~on_N[:-1] & on_N[1:]) * step_seconds


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sine_wave_is_one_line_of_constant_strength(seed):
    """AudioSet: a continuous, pure tone of fixed pitch and amplitude."""
    wave_S = render_sound("Sine wave", seed)
    assert share_near(wave_S, loudest_hz(wave_S)) > 0.999
    assert envelope(wave_S, step_seconds=0.1).min() > 0.98


@pytest.mark.parametrize("seed", SEEDS)
def test_a_chirp_sweeps_over_an_octave(seed):
    """AudioSet: a tone whose frequency increases or decreases with time."""
    wave_S = render_sound("Chirp tone", seed)
    peaks_hz = [loudest_hz(part_S) for part_S in np.array_split(wave_S, 120)]
    moves = Counter(np.sign(np.diff(peaks_hz)))
    assert max(peaks_hz) > 1.7 * min(peaks_hz)
    assert max(moves[1], moves[-1]) > 3 * min(
        moves[1], moves[-1]
    )  # it jumps back only where a sweep begins anew


@pytest.mark.parametrize(("name", "expected_db"), [("White noise", 0.0), ("Pink noise", -3.01)])
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_has_the_slope_of_its_colour(name, expected_db, seed):
    """White: equal power per hertz. Pink: equal power per octave, -3.01 dB per octave."""
    assert slope_db_per_octave(render_sound(name, seed)) == pytest.approx(expected_db, abs=0.25)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dial_tone_is_two_steady_tones(seed):
    """350 + 440 Hz in North America, 350 + 450 Hz in Britain, equally loud and without a pause."""
    wave_S = render_sound("Dial tone", seed)
    high_hz = max((440.0, 450.0), key=lambda hz: share_near(wave_S, hz))
    assert share_near(wave_S, 350.0) == pytest.approx(0.5, abs=0.01)
    assert share_near(wave_S, high_hz) == pytest.approx(0.5, abs=0.01)
    assert envelope(wave_S, step_seconds=0.1).min() > 0.9


def test_both_dial_tones_occur():
    """One national tone alone would make the class a template."""
    assert {
        round(np.mean([hz for hz in (440.0, 450.0) if share_near(render_sound("Dial tone", s), hz) > 0.4]))
        for s in range(8)
    } == {
        440,
        450,
    }


@pytest.mark.parametrize("seed", range(8))
def test_a_busy_signal_keeps_a_national_cadence(seed):
    """Half on, half off, at 1, 4/3 or 2 periods a second, at the frequencies of E.180's national list."""
    wave_S = render_sound("Busy signal", seed)
    assert share_near(wave_S, 400.0, 425.0, 480.0, 620.0, width_hz=15.0) > 0.97
    period_seconds = np.median(np.diff(onsets_seconds(wave_S)))
    assert min(abs(period_seconds - each) for each in (1.0, 0.75, 0.5)) < 0.006
    assert (envelope(wave_S) > 0.3).mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_dialled_digit_is_one_row_and_one_column(seed):
    """Q.23: a key is the pair of its row's and its column's frequency, and nothing else."""
    wave_S = render_sound("Telephone dialing, DTMF", seed, seconds=3)
    onsets = onsets_seconds(wave_S)
    assert len(onsets) >= 6
    digits = set()
    for at in onsets[:-1]:
        burst_S = wave_S[round((at + 0.01) * SYNTHESIS_RATE_HZ) : round((at + 0.055) * SYNTHESIS_RATE_HZ)]
        near = {hz: share_near(burst_S, hz, width_hz=25.0) for hz in (697, 770, 852, 941, 1209, 1336, 1477)}
        row, column = sorted(sorted(near, key=near.__getitem__)[-2:])
        assert row < 1000 < column
        assert near[row] + near[column] > 0.8
        digits.add((row, column))
    assert len(digits) > 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beep_is_short_and_keeps_its_pitch(seed):
    """AudioSet: a short, single tone."""
    wave_S = render_sound("Beep, bleep", seed)
    pitch_hz = loudest_hz(wave_S)
    assert share_near(wave_S, pitch_hz, 3 * pitch_hz, width_hz=60.0) > 0.9
    assert 0.03 < (envelope(wave_S) > 0.3).mean() < 0.8
    assert len(onsets_seconds(wave_S)) >= 4


@pytest.mark.parametrize("seed", range(6))
def test_a_siren_moves_up_and_down_again(seed):
    """AudioSet: a single pitch that changes smoothly or abruptly on timescales around one second."""
    wave_S = render_sound("Siren", seed)
    spans_NS = [part_S for part_S in np.array_split(wave_S, 150)]
    pitches_hz = np.array([loudest_hz(part_S) for part_S in spans_NS])
    assert pitches_hz.max() > 1.25 * pitches_hz.min()
    assert (np.diff(pitches_hz) > 0).any()
    assert (np.diff(pitches_hz) < 0).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_mains_hum_is_the_harmonics_of_50_or_60_hz(seed):
    """The frequency of the grid and its multiples, below 1 kHz, steady."""
    wave_S = render_sound("Mains hum", seed)
    assert max(share_near(wave_S, *(order * hz for order in range(1, 16))) for hz in (50.0, 60.0)) > 0.99
    assert envelope(wave_S, step_seconds=0.5).min() > 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_a_harmonic_sound_has_lines_at_integer_multiples_only(seed):
    """AudioSet: tones whose frequency is an integer multiple of some fundamental."""
    wave_S = render_sound("Harmonic", seed)
    hz_N, power_N = power_spectrum(wave_S)
    lines_hz = hz_N[1:-1][
        (power_N[1:-1] > 1e-3) & (power_N[1:-1] >= power_N[:-2]) & (power_N[1:-1] >= power_N[2:])
    ]
    fundamental_hz = lines_hz[1] - lines_hz[0] if len(lines_hz) == 2 else np.diff(lines_hz).min()
    orders = lines_hz / fundamental_hz
    assert len(lines_hz) >= 2
    assert np.abs(orders - orders.round()).max() < 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pulse_swells_about_once_a_second(seed):
    """AudioSet: modulated in short, regular bursts at approximately 1 Hz."""
    periods_seconds = np.diff(onsets_seconds(render_sound("Pulse", seed, seconds=10), step_seconds=0.05))
    assert 0.55 < periods_seconds.min() <= periods_seconds.max() < 1.55
    assert np.ptp(periods_seconds) < 0.15


@pytest.mark.parametrize("seed", SEEDS)
def test_static_crackles(seed):
    """Sparks: the fourth moment is many times that of a Gaussian noise, which has 3."""
    for name, low, high in (("Static", 20, 10_000), ("White noise", 2.9, 3.1)):
        wave_S = render_sound(name, seed)
        assert low < np.mean(wave_S**4) / np.mean(wave_S**2) ** 2 < high


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clock_ticks_evenly_and_in_two_pitches(seed):
    """Tick and tock differ, and the time between them does not."""
    wave_S = render_sound("Tick-tock", seed)
    onsets = onsets_seconds(wave_S, threshold=0.1)
    assert np.diff(onsets).max() - np.diff(onsets).min() < 0.02
    assert 0.19 < np.diff(onsets).mean() < 0.51
    knocks = [
        wave_S[round(at * SYNTHESIS_RATE_HZ) : round((at + 0.08) * SYNTHESIS_RATE_HZ)] for at in onsets[1:5]
    ]
    tick_hz, tock_hz, again_hz, _ = map(loudest_hz, knocks)
    assert abs(tick_hz - again_hz) < 15 < abs(tick_hz - tock_hz)
