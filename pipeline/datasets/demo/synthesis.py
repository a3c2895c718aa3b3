"""Synthetic sounds of AudioSet classes that have a formula: one function per class, which returns `wave_S` at 48 kHz.

All classes without a fixed pitch draw it from the same range, so that pitch alone does not identify the class. The
range ends at 3.4 kHz, which a file with 8 kHz sample rate still contains. A formula may return any level; the levels
are set when sounds are mixed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SYNTHESIS_RATE_HZ = 48_000

PITCH_RANGE_HZ = (120.0, 3_400.0)

GATE_RAMP_SECONDS = 0.003  # edge of a switched tone: short enough to be abrupt, long enough not to click

# North America; United Kingdom (ITU-T E.180, list of national tones).
DIAL_TONES_HZ = ((350.0, 440.0), (350.0, 450.0))

# Frequencies in Hz, seconds on, seconds off, from the same list.
BUSY_TONES = (
    ((480.0, 620.0), 0.5, 0.5),  # North America, subscriber busy
    ((480.0, 620.0), 0.25, 0.25),  # North America, all circuits busy
    ((425.0,), 0.5, 0.5),  # the ITU's recommendation, most of Europe
    ((400.0,), 0.375, 0.375),  # United Kingdom
)

# The keypad of ITU-T Q.23, without its fourth column.
DTMF_ROWS_HZ = np.array([697.0, 770.0, 852.0, 941.0])

DTMF_COLUMNS_HZ = np.array([1_209.0, 1_336.0, 1_477.0])


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSound:
    """A sound that can be mixed into a clip, and its classes."""

    name: str
    mids: tuple[str, ...]  # ids of the classes; the first is the class for which the sound is chosen
    # Arguments: generator and number of samples. Returns the wave at SYNTHESIS_RATE_HZ.
    make_wave: Callable[[np.random.Generator, int], np.ndarray]
    level_dbfs: tuple[float, float] = (-36.0, -15.0)  # range of the loudest tenth of a second in a clip
    is_alone: bool = False  # True: the clip has no other sound and no background noise


def sine_wave(rng: np.random.Generator, samples: int) -> np.ndarray:
    """One pure tone of constant pitch."""
    return unit_sine_S(draw_pitch_hz(rng), samples)


def harmonic_tone(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Sine tones at several integer multiples of one fundamental, which itself may be absent."""
    # The second and third partial are always present, the others at random.
    weights_N = rng.uniform(0.2, 1.0, 10) * (rng.random(10) < 0.6)
    weights_N[[1, 2]] = rng.uniform(0.5, 1.0, 2)
    return sum_partials(running_phase_S(draw_pitch_hz(rng, high_hz=700.0), samples), weights_N)


def chirp_tone(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A tone that sweeps up or down by at least an octave, once or repeatedly."""
    # The range and the length of a sweep.
    low_hz = draw_pitch_hz(rng, high_hz=PITCH_RANGE_HZ[1] / 2.5)
    high_hz = draw_pitch_hz(rng, low_hz=2 * low_hz)
    sweep_seconds = rng.choice([samples / SYNTHESIS_RATE_HZ, rng.uniform(0.3, 3.0)])

    # Up or down, in equal steps of hertz or of octaves.
    rise_S = fractional_part(sample_times_S(samples) / sweep_seconds)
    if rng.random() >= 0.5:
        rise_S = 1.0 - rise_S
    hz_S = low_hz + (high_hz - low_hz) * rise_S
    if rng.random() >= 0.5:
        hz_S = low_hz * (high_hz / low_hz) ** rise_S
    return np.sin(running_phase_S(hz_S, samples))


def white_noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Equal power in every hertz."""
    return rng.standard_normal(samples, dtype=np.float32)


def pink_noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Equal power in every octave: -3 dB per octave."""
    return coloured_noise(rng, samples, db_per_octave=-10 * np.log10(2))


def near_silence(rng: np.random.Generator, samples: int) -> np.ndarray:
    """The faint noise of a quiet recording, of any slope between white and brown."""
    return coloured_noise(rng, samples, db_per_octave=rng.uniform(-6.0, 0.0))


def dial_tone(rng: np.random.Generator, samples: int) -> np.ndarray:
    """The two steady tones of a telephone exchange that is ready to dial."""
    low_hz, high_hz = DIAL_TONES_HZ[rng.integers(len(DIAL_TONES_HZ))]
    return unit_sine_S(low_hz, samples) + unit_sine_S(high_hz, samples)


def busy_signal(rng: np.random.Generator, samples: int) -> np.ndarray:
    """One or two tones switched on and off in a national cadence."""
    tones_hz, on_seconds, off_seconds = BUSY_TONES[rng.integers(len(BUSY_TONES))]
    wave_S = np.sum([unit_sine_S(hz, samples) for hz in tones_hz], axis=0)
    return wave_S * random_phase_gate(rng, samples, on_seconds, off_seconds)


def dtmf_dialing(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Random digits, each one tone of the keypad's row and one of its column."""
    on_seconds = rng.uniform(0.06, 0.18)
    off_seconds = rng.uniform(0.05, 0.2)

    # The position of each digit on the keypad, and the digit of each sample.
    digit_S = (sample_times_S(samples) / (on_seconds + off_seconds)).astype(int)
    digits = digit_S[-1] + 1
    row_N = rng.integers(len(DTMF_ROWS_HZ), size=digits)
    column_N = rng.integers(len(DTMF_COLUMNS_HZ), size=digits)

    row_hz_S = DTMF_ROWS_HZ[row_N][digit_S]
    column_hz_S = DTMF_COLUMNS_HZ[column_N][digit_S]
    wave_S = np.sin(running_phase_S(row_hz_S, samples)) + np.sin(running_phase_S(column_hz_S, samples))
    return wave_S * on_off_gate(sample_times_S(samples), on_seconds, off_seconds)


def repeated_beeps(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Short tones of one pitch, some with the third harmonic of a cheap buzzer, up to six a second."""
    phase_S = running_phase_S(draw_pitch_hz(rng), samples)
    third_harmonic = rng.choice([0.0, 0.3])
    wave_S = sum_partials(phase_S, np.array([1.0, 0.0, third_harmonic]))
    return wave_S * random_phase_gate(rng, samples, rng.uniform(0.05, 0.3), rng.uniform(0.1, 0.9))


def siren_tone(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A rich tone that wails (3-6 s), yelps (a third of a second) or alternates a fourth apart."""
    # All three periods are drawn for every kind, because the order of the draws decides the bytes of every corpus.
    kind = rng.choice(["wail", "yelp", "two-tone"])
    period_seconds_of_kind = {
        "wail": rng.uniform(3, 6),
        "yelp": rng.uniform(0.25, 0.4),
        "two-tone": rng.uniform(1, 2),
    }
    period_seconds = period_seconds_of_kind[kind]

    # The pitch between 0 (low) and 1 (high): a triangle, or a step up and down.
    turn_S = fractional_part(sample_times_S(samples) / period_seconds + rng.random())
    low_hz = rng.uniform(400, 700)
    if kind == "two-tone":
        rise_S = (turn_S < 0.5).astype(float)
        ratio = np.float32(4 / 3)
    else:
        rise_S = 1.0 - np.abs(2.0 * turn_S - 1.0)
        ratio = np.float32(rng.uniform(2.0, 2.6))
    return sum_partials(running_phase_S(low_hz * ratio**rise_S, samples), np.arange(1.0, 8.0) ** -1.3)


def mains_hum(rng: np.random.Generator, samples: int) -> np.ndarray:
    """50 or 60 Hz and its harmonics; the even ones stronger, for iron is pulled twice in every cycle."""
    mains_hz = rng.choice([50.0, 60.0]) * (1 + rng.normal(0.0, 2e-4))
    order_N = np.arange(1, 16)
    weights_N = rng.uniform(0.3, 1.0, 15) * order_N ** rng.uniform(-1.5, -0.7)
    return sum_partials(running_phase_S(mains_hz, samples), np.where(order_N % 2, 0.4, 1.0) * weights_N)


def swelling_pulse(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A tone or a noise that swells and fades about once a second."""
    make_carrier = (sine_wave, sawtooth_buzz, pink_noise)[rng.integers(3)]
    swell_hz = rng.uniform(0.7, 1.6)
    swell_S = np.cos(running_phase_S(swell_hz, samples) + np.float32(rng.uniform(0, 2 * np.pi)))
    carrier_S = make_carrier(rng, samples)
    offset = np.float32(rng.uniform(-0.3, 0.1))
    return carrier_S * (swell_S + offset).clip(min=0.0) ** 2


def crackling_static(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Crackle: sparks at random times, with amplitudes spread over 30 dB, and a little hiss."""
    # Sixteen spark shapes, and the amplitudes.
    sparks = rng.poisson(samples / SYNTHESIS_RATE_HZ * rng.uniform(15, 120))
    heights = np.exp(rng.normal(-1.5, 1.0, sparks)).clip(max=1.5)
    shapes_NS = rng.standard_normal((16, 96)) * np.exp(-np.arange(96) / rng.uniform(3, 24))

    # The hiss, with each spark at its own time.
    wave_S = np.float32(0.01) * rng.standard_normal(samples, dtype=np.float32)
    starts = rng.integers(samples, size=sparks)
    shape_numbers = rng.integers(len(shapes_NS), size=sparks)
    for start, shape_number, height in zip(starts, shape_numbers, heights, strict=True):
        add_event(wave_S, height * shapes_NS[shape_number], start)
    return wave_S


def clock_tick_tock(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A clock: two knocks of different pitch in turn, at an even pace of two to five a second."""
    tick_N = damped_knock(rng, rng.uniform(1_800, 3_400))
    tock_N = damped_knock(rng, rng.uniform(900, 1_700))
    step_samples = int(SYNTHESIS_RATE_HZ * rng.uniform(0.2, 0.5))
    first_start = rng.integers(step_samples)
    wave_S = np.zeros(samples, dtype=np.float32)
    for number, start in enumerate(range(first_start, samples, step_samples)):
        add_event(wave_S, tock_N if number % 2 else tick_N, start)
    return wave_S


FORMULA_SOUNDS = (
    DemoSound(name="Sine wave", mids=("/m/01v_m0",), make_wave=sine_wave),
    DemoSound(name="Chirp tone", mids=("/m/0hdsk",), make_wave=chirp_tone),
    DemoSound(name="White noise", mids=("/m/0chx_",), make_wave=white_noise),
    DemoSound(name="Pink noise", mids=("/m/0cj0r",), make_wave=pink_noise),
    DemoSound(
        name="Silence", mids=("/m/028v0c",), make_wave=near_silence, level_dbfs=(-72.0, -60.0), is_alone=True
    ),
    DemoSound(name="Dial tone", mids=("/m/015jpf",), make_wave=dial_tone),
    DemoSound(name="Busy signal", mids=("/m/01z47d",), make_wave=busy_signal),
    DemoSound(name="Telephone dialing, DTMF", mids=("/m/02c8p",), make_wave=dtmf_dialing),
    DemoSound(name="Beep, bleep", mids=("/m/02fs_r",), make_wave=repeated_beeps),
    DemoSound(name="Siren", mids=("/m/03kmc9",), make_wave=siren_tone),
    DemoSound(name="Mains hum", mids=("/m/06xkwv",), make_wave=mains_hum),
    DemoSound(name="Pulse", mids=("/m/07pt_g0",), make_wave=swelling_pulse),
    DemoSound(name="Harmonic", mids=("/m/0b9m1",), make_wave=harmonic_tone),
    DemoSound(name="Static", mids=("/m/07rgkc5",), make_wave=crackling_static),
    DemoSound(name="Tick-tock", mids=("/m/07qjznl",), make_wave=clock_tick_tock),
)


def sample_times_S(samples: int) -> np.ndarray:
    """Return the time of each sample in seconds."""
    return np.arange(samples, dtype=np.float64) * (1 / SYNTHESIS_RATE_HZ)


def draw_pitch_hz(
    rng: np.random.Generator, *, low_hz: float = PITCH_RANGE_HZ[0], high_hz: float = PITCH_RANGE_HZ[1]
) -> float:
    """Draw a frequency, equally likely in every octave of the range."""
    return float(np.exp(rng.uniform(np.log(low_hz), np.log(high_hz))))


def fractional_part(turns_S: np.ndarray) -> np.ndarray:
    """The part of each number after the decimal point, float32."""
    # `%` gives the same result at 20 times the cost.
    return (turns_S - np.floor(turns_S)).astype(np.float32)


def running_phase_S(hz: float | np.ndarray, samples: int) -> np.ndarray:
    """The running phase in [0, 2 pi) of a frequency that may change from sample to sample."""
    # Wrap the phase before rounding to float32, so that the last second is as exact as the first.
    turns_S = np.cumsum(np.broadcast_to(hz, samples), dtype=np.float64) / SYNTHESIS_RATE_HZ
    return (2 * np.pi) * fractional_part(turns_S)


def unit_sine_S(hz: float, samples: int) -> np.ndarray:
    """A sine of amplitude 1."""
    return np.sin(running_phase_S(hz, samples))


def sum_partials(phase_S: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """The sum of sines at 1, 2, 3 ... times a phase, with these amplitudes."""
    wave_S = np.zeros_like(phase_S)
    for order in np.flatnonzero(weights_N):
        wave_S += np.float32(weights_N[order]) * np.sin(np.float32(order + 1) * phase_S)
    return wave_S


def sawtooth_buzz(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A low tone with the partials of a sawtooth."""
    phase_S = running_phase_S(draw_pitch_hz(rng, high_hz=500.0), samples)
    return sum_partials(phase_S, 1 / np.arange(1.0, 7.0))


def on_off_gate(seconds_S: np.ndarray, on_seconds: float, off_seconds: float) -> np.ndarray:
    """1 while on and 0 while off, with short ramps; the first period begins at 0 s."""
    period_seconds = on_seconds + off_seconds
    since_on_S = period_seconds * fractional_part(seconds_S / period_seconds)
    to_nearest_edge_S = np.minimum(since_on_S, on_seconds - since_on_S)
    return (to_nearest_edge_S / GATE_RAMP_SECONDS).clip(0.0, 1.0)


def random_phase_gate(
    rng: np.random.Generator, samples: int, on_seconds: float, off_seconds: float
) -> np.ndarray:
    """Return the gate of `on_off_gate`, starting at a random point of its period."""
    shift_seconds = rng.uniform(0.0, on_seconds + off_seconds)
    return on_off_gate(sample_times_S(samples) + shift_seconds, on_seconds, off_seconds)


def coloured_noise(rng: np.random.Generator, samples: int, *, db_per_octave: float) -> np.ndarray:
    """Gaussian noise whose spectrum falls by a constant slope above 20 Hz; its level is about 1."""
    # The FFT is quickest at powers of two.
    padded_samples = 1 << (samples - 1).bit_length()

    # Random complex amplitudes, weighted by frequency.
    hz_N = np.fft.rfftfreq(padded_samples, 1 / SYNTHESIS_RATE_HZ).clip(min=20.0).astype(np.float32)
    gain_N = (hz_N / 1_000) ** np.float32(db_per_octave / (20 * np.log10(2)))
    white_N = rng.standard_normal((len(hz_N), 2), dtype=np.float32).view(np.complex64)[:, 0]
    wave_S = np.fft.irfft(white_N * gain_N)[:samples]
    return wave_S / wave_S.std()


def damped_knock(rng: np.random.Generator, hz: float) -> np.ndarray:
    """A tenth of a second of three damped resonances, the lowest at `hz`."""
    seconds_N = sample_times_S(SYNTHESIS_RATE_HZ // 10)

    # Higher resonances die away sooner.
    ratios = np.array([1.0, rng.uniform(1.3, 1.8), rng.uniform(2.1, 2.9)])
    decays_seconds = rng.uniform(0.004, 0.015, 3) / np.sqrt(ratios)
    resonances = [
        np.sin(2 * np.pi * hz * ratio * seconds_N) * np.exp(-seconds_N / decay_seconds)
        for ratio, decay_seconds in zip(ratios, decays_seconds, strict=True)
    ]
    return np.sum(resonances, axis=0)


def add_event(wave_S: np.ndarray, event_N: np.ndarray, start: int) -> None:
    """Add an event in place from sample `start` on; the part past the end of the wave is lost."""
    end = min(start + len(event_N), len(wave_S))
    wave_S[start:end] += event_N[: end - start]
