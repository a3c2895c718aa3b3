"""Sounds whose every second is a tone of its own, written with holes, late starts and joins; and what is heard of them.

Second k is a sine of 400 + 40 k Hz, so that what was decoded tells which seconds of the sound it is.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.audio.decode import AudioPolicy, ClipAudio, load_clip_audio
from pipeline.audio.sources import SoundLocator

BASE_HZ, STEP_HZ = 400.0, 40.0

SILENT = "."

Span = tuple[float, float]


def tone_seconds(count: int, rate_hz: int, *, first: int = 0, channels: int = 1) -> np.ndarray:
    """Seconds [first, first + count), as float32 `[sample, channel]`."""
    second_S = np.repeat(np.arange(first, first + count), rate_hz)
    phase_S = 2 * np.pi * np.cumsum((BASE_HZ + STEP_HZ * second_S) / rate_hz)
    wave_S = (0.3 * np.sin(phase_S)).astype(np.float32)
    return np.repeat(wave_S[:, None], channels, axis=1)


def heard_seconds(wave_S: np.ndarray, rate_hz: int) -> list[int | str]:
    """The number of the tone in the middle of every second, or `.` where there is silence."""
    heard: list[int | str] = []
    for second in range(round(len(wave_S) / rate_hz + 0.01)):
        middle_S = wave_S[round((second + 0.3) * rate_hz) : round((second + 0.7) * rate_hz)]
        if not len(middle_S) or np.sqrt((middle_S**2).mean()) < 1e-3:
            heard.append(SILENT)
            continue
        power_N = np.abs(np.fft.rfft(middle_S * np.hanning(len(middle_S)), 4 * len(middle_S)))
        hz = power_N.argmax() * rate_hz / (4 * len(middle_S))
        heard.append(round((hz - BASE_HZ) / STEP_HZ))
    return heard


def decode(
    path: Path,
    start_seconds: float = 0.0,
    end_seconds: float = 100.0,
    *,
    exact: bool | None = None,
    policy: AudioPolicy = AudioPolicy(),
) -> ClipAudio:
    """The segment of a file; AudioError if it cannot be used."""
    locator = SoundLocator(path=str(path), source=path.name, exact=exact)
    return load_clip_audio(locator, start_seconds=start_seconds, end_seconds=end_seconds, policy=policy)


def heard(path: Path, start_seconds: float = 0.0, end_seconds: float = 100.0, **settings) -> list[int | str]:
    """What is heard of a segment."""
    clip = decode(path, start_seconds, end_seconds, **settings)
    return heard_seconds(clip.wave_S, clip.rate_hz)


def write_stream(
    path: Path,
    wave_SC: np.ndarray,
    rate_hz: int,
    codec: str,
    kind: str,
    *,
    holes: Sequence[Span] = (),
    late_seconds: float = 0.0,
    video_seconds: float = 0.0,
    jumps: Sequence[Span] = (),
    bit_rate: int = 64_000,
    sample_format: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode a wave as FFmpeg does, and change the time stamps or leave out packets.

    holes          spans of the sound, in seconds, whose packets are left out
    late_seconds   how much later than 0 the sound begins
    video_seconds  length of a film beside the sound, which begins at 0; 0: none
    jumps          (second, by how much the stamps from there on are moved)
    """
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[wave_SC.shape[1]]
    with av.open(str(path), "w", format=kind, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        stream.bit_rate = bit_rate
        if sample_format is not None:
            stream.codec_context.format = sample_format
        film = None
        if video_seconds:
            film = container.add_stream("mpeg4", rate=10)
            film.width = film.height = 64
            film.pix_fmt = "yuv420p"
        packets = [(packet, True) for packet in encode_packets(stream, wave_SC, rate_hz, layout)]
        if film is not None:
            packets += [(packet, False) for packet in encode_film(film, video_seconds)]
        packets.sort(key=lambda item: moved_seconds(*item, late_seconds))
        for packet, is_sound in packets:
            if is_sound:
                seconds = float(packet.pts * packet.time_base)
                if any(begin <= seconds < end for begin, end in holes):
                    continue
                move = late_seconds + sum(by for begin, by in jumps if seconds >= begin)
                packet.pts += round(move / packet.time_base)
                packet.dts = packet.pts
            container.mux(packet)
    return path


def moved_seconds(packet: av.Packet, is_sound: bool, late_seconds: float) -> float:
    """Where a packet stands among those of the other stream."""
    return float(packet.dts * packet.time_base) + late_seconds * is_sound


def encode_packets(stream, wave_SC: np.ndarray, rate_hz: int, layout: str) -> list[av.Packet]:
    """All packets of a sound."""
    context = stream.codec_context
    context.open()
    resampler = av.AudioResampler(context.format or "fltp", layout, rate_hz)
    block = context.frame_size or 1024
    packets = []
    for first in range(0, len(wave_SC), block):
        samples = np.ascontiguousarray(wave_SC[first : first + block]).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, first, Fraction(1, rate_hz)
        for fitted in resampler.resample(frame):
            packets += stream.encode(fitted)
    return packets + stream.encode(None)


def encode_film(stream, seconds: float) -> list[av.Packet]:
    """All packets of a black film of ten pictures a second."""
    packets = []
    for number in range(round(10 * seconds)):
        frame = av.VideoFrame(64, 64, "yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, 10)
        packets += stream.encode(frame)
    return packets + stream.encode(None)
