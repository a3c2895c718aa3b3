"""Waveforms written into the containers and codecs that AudioSet is found in, the same bytes every time."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

from pipeline.datasets.demo.synthesis import SYNTHESIS_RATE_HZ

PEAK_CEILING = 0.89  # -1 dBFS: leaves room for what a lossy codec adds

FILE_RATES_HZ = (48_000, 44_100, 32_000, 22_050, 16_000, 11_025, 8_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoContainer:
    """A kind of audio file: who writes it, its extension, its codec, the rates it may hold.

    `muxer` names FFmpeg's writer; empty means libsndfile. `share` is its number in every twenty files.
    """

    name: str
    extension: str
    codec: str
    muxer: str = ""
    rates_hz: tuple[int, ...] = FILE_RATES_HZ
    files_in_twenty: int = 1
    options: dict[str, str] = field(default_factory=dict)


# libsndfile stamps the time of day into float wav; FFmpeg, told to be bit-exact, does not, and neither numbers
# the streams of ogg and webm at random. Only libsndfile encodes Vorbis in stereo and mono: see `renumber`.
DEMO_CONTAINERS = (
    DemoContainer(name="wav-16", extension="wav", codec="PCM_16", files_in_twenty=5),
    DemoContainer(name="wav-24", extension="wav", codec="PCM_24"),
    DemoContainer(name="wav-float", extension="wav", codec="pcm_f32le", muxer="wav", files_in_twenty=2),
    DemoContainer(name="flac", extension="flac", codec="PCM_16", files_in_twenty=4),
    DemoContainer(name="vorbis", extension="ogg", codec="VORBIS", files_in_twenty=2),
    DemoContainer(
        name="mp3", extension="mp3", codec="MPEG_LAYER_III", rates_hz=FILE_RATES_HZ[:5], files_in_twenty=2
    ),
    DemoContainer(name="opus", extension="opus", codec="libopus", muxer="ogg", rates_hz=FILE_RATES_HZ[:1]),
    DemoContainer(
        name="m4a",
        extension="m4a",
        codec="aac",
        muxer="ipod",
        rates_hz=FILE_RATES_HZ[:5],
        files_in_twenty=2,
        options={"aac_coder": "fast"},  # less than half the time of the default search
    ),
    DemoContainer(name="webm", extension="webm", codec="libopus", muxer="webm", rates_hz=FILE_RATES_HZ[:1]),
)

CONTAINERS_BY_NAME = {each.name: each for each in DEMO_CONTAINERS}

SOUNDFILE_FORMATS = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "ogg": "OGG"}

BIT_REVERSED_BYTES = bytes(
    int(f"{byte:08b}"[::-1], 2) for byte in range(256)
)  # each byte with its bits reversed


def write_audio_file(path: Path, wave_SN: np.ndarray, container: DemoContainer, *, rate_hz: int) -> None:
    """Write float32 `wave_SN` (sample, channel), given at 48 kHz, resampled to `rate_hz` and at most -1 dBFS."""
    wave_SN = soxr.resample(wave_SN, SYNTHESIS_RATE_HZ, rate_hz, quality="HQ")
    wave_SN *= PEAK_CEILING / max(np.abs(wave_SN).max(), PEAK_CEILING)
    if container.muxer:
        write_with_ffmpeg(path, wave_SN, container, rate_hz=rate_hz)
    else:
        kind = SOUNDFILE_FORMATS[container.extension]
        soundfile.write(path, wave_SN, rate_hz, format=kind, subtype=container.codec)
    if container.extension == "ogg":
        set_ogg_serial(path, serial=1)


def write_with_ffmpeg(path: Path, wave_SN: np.ndarray, container: DemoContainer, *, rate_hz: int) -> None:
    """Write a wave, already at `rate_hz`, through FFmpeg, with no random or dated field in the file."""
    layout = {1: "mono", 2: "stereo"}[wave_SN.shape[1]]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave_SN.T), format="fltp", layout=layout)
    frame.sample_rate = rate_hz
    with av.open(path, "w", format=container.muxer, options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream(container.codec, rate=rate_hz, layout=layout, options=container.options)
        assert isinstance(stream, av.AudioStream)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def set_ogg_serial(path: Path, *, serial: int) -> None:
    """Give an Ogg stream this serial number in place of a random one, page by page (RFC 3533, section 6)."""
    old, new, at = path.read_bytes(), bytearray(), 0
    while at < len(old):
        segments = old[at + 26]
        end = at + 27 + segments + sum(old[at + 27 : at + 27 + segments])
        page = (
            old[at : at + 14]
            + serial.to_bytes(4, "little")
            + old[at + 18 : at + 22]
            + bytes(4)
            + old[at + 26 : end]
        )
        new += page[:22] + ogg_checksum(page).to_bytes(4, "little") + page[26:]
        at = end
    path.write_bytes(new)


def ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32: zlib's polynomial with all bits the other way round, begun at 0 and not inverted."""
    reflected = zlib.crc32(page.translate(BIT_REVERSED_BYTES), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def read_recording(path: Path) -> np.ndarray:
    """A recording that libsndfile knows as mono float32 `wave_S` at 48 kHz."""
    wave_SN, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(wave_SN.mean(axis=1), rate_hz, SYNTHESIS_RATE_HZ, quality="HQ")
