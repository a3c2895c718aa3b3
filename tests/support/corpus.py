"""A corpus in AudioSet's shape, small enough to build in a second or two: tones and noise in wav files."""

from pathlib import Path

import numpy as np
import soundfile

RATES_HZ = (32_000, 44_100, 16_000)

LABELS = ("/m/09x0r", "/m/05zppz", "/m/0395lw", "/m/04rlf,/m/0838f", "")  # two of them imply others

SHORT = (3, 17, 40)  # clips of 2, 3 and 4 seconds

MISSING, SILENT, BROKEN = 5, 9, 44


def clip_id(number: int) -> str:
    return f"clip_{number:06d}"


def tone_in_noise(number: int, *, seconds: float, rate_hz: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    time_S = np.arange(round(seconds * rate_hz)) / rate_hz
    level = rng.uniform(0.05, 0.5)
    return level * np.sin(2 * np.pi * rng.uniform(100, 6_000) * time_S) + 0.01 * rng.standard_normal(
        len(time_S)
    )


def write_corpus(folder: Path, *, clips: int = 48, clip_seconds: float = 10.0) -> Path:
    """`folder` with audio/, a_train_segments.csv (three quarters) and eval_segments.csv; returns it."""
    (folder / "audio").mkdir(parents=True)
    for number in range(clips):
        path = folder / "audio" / f"{clip_id(number)}.wav"
        rate_hz = RATES_HZ[number % 3]
        seconds = 2.0 + SHORT.index(number) if number in SHORT else clip_seconds
        wave_S = tone_in_noise(number, seconds=seconds, rate_hz=rate_hz)
        if number == BROKEN:
            path.write_bytes(b"this is no sound")
        elif number != MISSING:
            soundfile.write(path, 0 * wave_S if number == SILENT else wave_S, rate_hz)
    train = clips * 3 // 4
    write_segments(folder / "a_train_segments.csv", range(train))
    write_segments(folder / "eval_segments.csv", range(train, clips))
    return folder


def write_segments(path: Path, numbers: range) -> None:
    rows = [f'{clip_id(n)}, 30.000, 40.000, "{LABELS[n % len(LABELS)]}"' for n in numbers]
    head = [
        "# Segments csv created today",
        "# num_ytids=0",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]
    path.write_text("\n".join(head + rows) + "\n")
