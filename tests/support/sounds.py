"""Sounds with known content, written into every container by the libraries people use."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

BLOCK = 1024

ENCODERS = {  # suffix: FFmpeg's codec, container and its options
    ".m4a": ("aac", "ipod", {}),
    ".fast.m4a": ("aac", "ipod", {"movflags": "faststart"}),
    ".mp4": ("aac", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ".mka": ("aac", "matroska", {}),
    ".aac": ("aac", "adts", {}),
    ".ts": ("aac", "mpegts", {}),
    ".opus": ("libopus", "ogg", {}),
    ".webm": ("libopus", "webm", {}),
    ".live.webm": ("libopus", "webm", {"live": "1"}),
    ".alac.m4a": ("alac", "ipod", {}),
    ".wv": ("wavpack", "wv", {}),
    ".tta": ("tta", "tta", {}),
    ".aiff": ("pcm_s16be", "aiff", {}),
    ".bare.mp3": ("libmp3lame", "mp3", {"write_xing": "0"}),
}

SUBTYPES = {
    ".flac": "PCM_16",
    ".ogg": "VORBIS",
    ".mp3": "MPEG_LAYER_III",
    ".au": "PCM_16",
    ".caf": "PCM_16",
    ".w64": "PCM_16",
}


def write(path: Path, wave_SC: np.ndarray, rate_hz: int, *, subtype: str = "PCM_16") -> Path:
    """Write [sample, channel] floats, or [sample], as what the longest known suffix says; returns the path."""
    wave_SC = np.asarray(wave_SC, np.float32)
    wave_SC = wave_SC if wave_SC.ndim == 2 else wave_SC[:, None]
    suffix = max((s for s in (*ENCODERS, *SUBTYPES, ".wav") if path.name.endswith(s)), key=len)
    if suffix in ENCODERS:
        encode(path, wave_SC, rate_hz, *ENCODERS[suffix])
    else:
        with soundfile.SoundFile(path, "w", rate_hz, wave_SC.shape[1], SUBTYPES.get(suffix, subtype)) as file:
            for first in range(0, len(wave_SC), BLOCK):  # libsndfile crashes on long blocks of vorbis
                file.write(wave_SC[first : first + BLOCK])
    return path


def encode(path: Path, wave_SC: np.ndarray, rate_hz: int, codec: str, kind: str, options: dict) -> None:
    """Through PyAV, with time stamps, so that the container can state the encoder's delay."""
    layout = {1: "mono", 2: "stereo", 6: "5.1", 16: "hexadecagonal"}[wave_SC.shape[1]]
    mapping = {"mapping_family": "255"} if codec == "libopus" and wave_SC.shape[1] > 8 else {}
    with av.open(str(path), "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout, options=mapping)
        fit = av.AudioResampler(stream.codec_context.format or "fltp", layout, rate_hz)
        block = stream.codec_context.frame_size or BLOCK
        for first in range(0, len(wave_SC), block):
            samples = np.ascontiguousarray(wave_SC[first : first + block]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate_hz, first, Fraction(1, rate_hz)
            for fitted in fit.resample(frame):
                container.mux(stream.encode(fitted))
        container.mux(stream.encode(None))


def babble(seconds: float, rate_hz: int, *, level: float = 0.2, seed: int = 0) -> np.ndarray:
    """Noise below 2 kHz whose loudness wanders: every second of it can be told from every other."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate_hz)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    spectrum[np.fft.rfftfreq(count, 1 / rate_hz) > 2_000] = 0
    wave_S = np.fft.irfft(spectrum, count)
    knots = np.arange(0, seconds + 1, 0.5)
    loudness_S = np.interp(np.arange(count) / rate_hz, knots, rng.uniform(0.2, 1, len(knots)))
    return (level * wave_S / np.abs(wave_S).max() * loudness_S).astype(np.float32)


def lag(wave_S: np.ndarray, reference_S: np.ndarray) -> int:
    """By how many samples `wave_S` comes after `reference_S`."""
    size = 2 * max(len(wave_S), len(reference_S))
    both = np.fft.irfft(np.fft.rfft(wave_S, size) * np.conj(np.fft.rfft(reference_S, size)))
    best = int(both.argmax())
    return best if best < size // 2 else best - size
