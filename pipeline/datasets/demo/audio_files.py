"""Write waveforms in the containers and codecs in which AudioSet is distributed, with the same bytes every time."""

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

CHANNEL_LAYOUTS = {1: "mono", 2: "stereo"}  # as FFmpeg names them

OGG_SERIAL = 1  # replaces the random serial number that libsndfile gives a stream


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoContainer:
    """A kind of audio file: its extension, its codec, its possible rates, and the library that writes it."""

    name: str
    extension: str
    codec: str  # as the library names it
    muxer: str = ""  # the name of FFmpeg's writer; empty: libsndfile writes
    rates_hz: tuple[int, ...] = FILE_RATES_HZ
    files_in_twenty: int = 1  # how many of 20 files of the demo corpus are of this kind
    options: dict[str, str] = field(default_factory=dict)  # of FFmpeg's encoder


# libsndfile writes the time of day into float wav, and a random serial number into ogg. FFmpeg in its bit-exact mode
# does neither, but only libsndfile encodes Vorbis in both stereo and mono: see `set_ogg_serial`.
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
        # The fast search takes less than half the time of the default search.
        options={"aac_coder": "fast"},
    ),
    DemoContainer(name="webm", extension="webm", codec="libopus", muxer="webm", rates_hz=FILE_RATES_HZ[:1]),
)

CONTAINERS_BY_NAME = {container.name: container for container in DEMO_CONTAINERS}

SOUNDFILE_FORMATS = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "ogg": "OGG"}

# The table for `bytes.translate` that reverses the bits of each byte.
BIT_REVERSED_BYTES = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def write_audio_file(path: Path, wave_SN: np.ndarray, container: DemoContainer, *, rate_hz: int) -> None:
    """Resample float32 `wave_SN` (sample, channel) from 48 kHz to `rate_hz`; write it with a peak up to -1 dBFS."""
    # Only waves above the ceiling are scaled, because the level of a quiet wave is part of the sound.
    wave_SN = soxr.resample(wave_SN, SYNTHESIS_RATE_HZ, rate_hz, quality="HQ")
    wave_SN *= PEAK_CEILING / max(np.abs(wave_SN).max(), PEAK_CEILING)

    if container.muxer:
        write_with_ffmpeg(path, wave_SN, container, rate_hz=rate_hz)
    else:
        file_format = SOUNDFILE_FORMATS[container.extension]
        soundfile.write(path, wave_SN, rate_hz, format=file_format, subtype=container.codec)
    if container.extension == "ogg":
        set_ogg_serial(path, serial=OGG_SERIAL)


def write_with_ffmpeg(path: Path, wave_SN: np.ndarray, container: DemoContainer, *, rate_hz: int) -> None:
    """Write a wave that is already at `rate_hz` with FFmpeg; the file has no random field and no date."""
    layout = CHANNEL_LAYOUTS[wave_SN.shape[1]]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave_SN.T), format="fltp", layout=layout)
    frame.sample_rate = rate_hz
    with av.open(path, "w", format=container.muxer, options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream(container.codec, rate=rate_hz, layout=layout, options=container.options)
        assert isinstance(stream, av.AudioStream)
        file.mux(stream.encode(frame))
        # The encoder gives its last packets when the stream ends.
        file.mux(stream.encode(None))


def set_ogg_serial(path: Path, *, serial: int) -> None:
    """Give an Ogg stream this serial number in place of a random one, page by page (RFC 3533, section 6)."""
    content = bytearray(path.read_bytes())
    start = 0
    while start < len(content):
        # A page: 27 bytes of header, the lengths of its segments, the segments.
        segment_count = content[start + 26]
        body_bytes = sum(content[start + 27 : start + 27 + segment_count])
        end = start + 27 + segment_count + body_bytes

        # The checksum is computed over the page with zeros in the checksum field.
        content[start + 14 : start + 18] = serial.to_bytes(4, "little")
        content[start + 22 : start + 26] = bytes(4)
        checksum = ogg_checksum(bytes(content[start:end]))
        content[start + 22 : start + 26] = checksum.to_bytes(4, "little")
        start = end
    path.write_bytes(content)


def ogg_checksum(page: bytes) -> int:
    """Return Ogg's CRC-32: zlib's polynomial with reversed bits, starting at 0 and without inversion."""
    # zlib inverts before and after its computation; inverting input and output undoes both.
    reflected = zlib.crc32(page.translate(BIT_REVERSED_BYTES), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def read_recording(path: Path) -> np.ndarray:
    """Read a file that libsndfile can decode, as mono float32 `wave_S` at 48 kHz."""
    wave_SN, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(wave_SN.mean(axis=1), rate_hz, SYNTHESIS_RATE_HZ, quality="HQ")
