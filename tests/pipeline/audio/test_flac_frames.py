"""Headers of flac frames, against RFC 9639 and against what is none."""

import io

import numpy as np
import pytest
import soundfile

from pipeline.audio.flac_frames import (
    FrameHeader,
    crc8,
    parse_frame_header,
    parse_stream_info,
    read_stream_info,
)

INFO = parse_stream_info(b"fLaC" + bytes(4) + (4_096).to_bytes(2) * 2 + bytes(14))

# RFC 9639, table 14: the sizes that have a code.
SIZES = {1: 192, 2: 576, 3: 1_152, 4: 2_304, 5: 4_608} | {8 + place: 256 << place for place in range(8)}


def frame_header(size_code: int, number: int, rest: bytes = b"", *, counts_samples: bool = False) -> bytes:
    """The header of a frame at 44.1 kHz with a number under 128."""
    content = bytes([0xFF, 0xF8 | counts_samples, size_code << 4 | 9, 0x08, number]) + rest
    return content + bytes([crc8(content)])


@pytest.mark.parametrize("size_code", SIZES)
def test_a_size_is_read_by_its_code(size_code):
    assert parse_frame_header(frame_header(size_code, 3), 0, INFO) == FrameHeader(3 * 4_096, SIZES[size_code])


def test_a_size_without_a_code_follows_the_number():
    assert parse_frame_header(frame_header(6, 0, b"\x63"), 0, INFO) == FrameHeader(0, 100)
    assert parse_frame_header(frame_header(7, 0, b"\x03\xe7"), 0, INFO) == FrameHeader(0, 1_000)


def test_a_stream_of_frames_of_many_sizes_counts_samples():
    content = frame_header(8, 77, counts_samples=True)
    assert parse_frame_header(content, 0, INFO) == FrameHeader(77, 256)


def test_what_is_no_header_is_none():
    """Whatever bytes follow the two of a frame's begin; a checksum of eight bits lets one in 256 pass."""
    rng = np.random.default_rng(0)
    passed = 0
    for _ in range(20_000):
        content = b"\xff" + bytes([0xF8 | rng.integers(2)]) + rng.bytes(int(rng.integers(16)))
        passed += parse_frame_header(content, 0, INFO) is not None
    assert passed < 200


def test_a_file_is_cut_anywhere():
    """Blocks of metadata that reach beyond the end, and no frame."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(10_000), 8_000, format="FLAC")
    content = file.getvalue()
    for size in range(26, len(content)):
        assert read_stream_info(io.BytesIO(content[:size])).block_samples == 4_096
