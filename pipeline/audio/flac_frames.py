"""Frames of flac: the place of each by its own header, and the number of samples by the last frame.

A header with a wrong number of samples contradicts the last frame. The format is that of RFC 9639.
"""

import struct
from functools import cache
from os import SEEK_END
from typing import NamedTuple

from pipeline.audio.byte_window import ReadableFile

SIGNATURE_BYTES = 4

BLOCK_HEAD_BYTES = 4  # of a block of metadata: whether it is the last, its kind and its size

STREAM_INFO_BYTES = 26  # that a flac begins with, up to the number of its samples

FRAME_HEADER_BYTES = 16  # at most

# Samples of a frame by their code in its header.
CODED_SIZES = {
    1: 192,
    **{code: 576 << (code - 2) for code in range(2, 6)},
    **{code: 256 << (code - 8) for code in range(8, 16)},
}

SMALL_TAIL_BYTES = 2**13  # for tags after the last frame

MAX_TAIL_BYTES = 2**18  # read at the end of a file whose header states no size of frames

ID3V1_BYTES = 128  # of a tag at the end of a file

CRC8_POLYNOMIAL = 0x07

CRC16_POLYNOMIAL = 0x8005


class StreamInfo(NamedTuple):
    """What the first block of a flac states; a size or number of 0 is unknown.

    block_samples        of a frame, the largest
    has_one_size         whether the smallest frame is as large
    contradicts_a_frame  whether the first frame is not, and so all others: `block_samples` is that of the first frame
    """

    block_samples: int
    has_one_size: bool
    max_frame_bytes: int
    rate_hz: int
    samples: int
    contradicts_a_frame: bool = False


class FrameHeader(NamedTuple):
    """The header of a frame: the number of its first sample, and how many it has."""

    first_sample: int
    samples: int


def find_last_sample(info: StreamInfo, file: ReadableFile) -> int | None:
    """The number of samples up to the last frame of a flac; None if its end is damaged or missing."""
    file_bytes = file.seek(0, SEEK_END)
    tail_bytes = min(file_bytes, MAX_TAIL_BYTES)
    if info.max_frame_bytes:
        tail_bytes = min(tail_bytes, info.max_frame_bytes + SMALL_TAIL_BYTES)
    file.seek(file_bytes - tail_bytes)
    tail = file.read(tail_bytes)

    # The last header in the file is most likely that of its last frame.
    place = len(tail)
    while (place := tail.rfind(b"\xff", 0, place)) >= 0:
        header = parse_frame_header(tail, place, info)
        if header is None:
            continue
        end_sample = header.first_sample + header.samples
        if end_sample == info.samples or is_whole_frame(tail, place):
            return end_sample
    return None


def read_stream_info(file: ReadableFile) -> StreamInfo:
    """The facts of the first block of a file, and the size of its first frame, which some headers contradict."""
    file.seek(0)
    info = parse_stream_info(file.read(STREAM_INFO_BYTES))

    # The first frame follows the last block of metadata.
    position = SIGNATURE_BYTES
    is_last = False
    while not is_last:
        file.seek(position)
        block_head = file.read(BLOCK_HEAD_BYTES)
        if len(block_head) < BLOCK_HEAD_BYTES:
            return info
        is_last = block_head[0] >= 0x80
        position += BLOCK_HEAD_BYTES + int.from_bytes(block_head[1:])
    file.seek(position)
    header = parse_frame_header(file.read(FRAME_HEADER_BYTES), 0, info)
    if header is None or header.samples == info.block_samples:
        return info
    return info._replace(block_samples=header.samples, contradicts_a_frame=info.has_one_size)


def parse_stream_info(head: bytes) -> StreamInfo:
    """The facts of the first block, which follows four bytes of signature and four of its own header."""
    (bits,) = struct.unpack(">Q", head[18:26].ljust(8, b"\0"))
    return StreamInfo(
        block_samples=int.from_bytes(head[10:12]),
        has_one_size=head[8:10] == head[10:12],
        max_frame_bytes=int.from_bytes(head[15:18]),
        rate_hz=bits >> 44,
        samples=bits % 2**36,
    )


def parse_frame_header(content: bytes, place: int, info: StreamInfo) -> FrameHeader | None:
    """The header of a frame at a place; None if there is none, by its checksum."""
    if content[place : place + 1] != b"\xff" or content[place + 1 : place + 2] not in (b"\xf8", b"\xf9"):
        return None
    content = content[place : place + FRAME_HEADER_BYTES].ljust(FRAME_HEADER_BYTES, b"\0")
    place = 0
    has_sample_number = content[place + 1] & 1
    size_code = content[place + 2] >> 4
    rate_code = content[place + 2] & 15
    if size_code == 0 or rate_code == 15:
        return None

    # The number of the frame or sample, coded as UTF-8 codes letters.
    coded = decode_number(content, place + 4)
    if coded is None:
        return None
    number, position = coded

    # Sizes and rates that have no code follow.
    samples = CODED_SIZES.get(size_code, 0)
    if size_code in (6, 7):
        size_bytes = size_code - 5
        samples = 1 + int.from_bytes(content[position : position + size_bytes])
        position += size_bytes
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if position >= len(content) or crc8(content[place:position]) != content[position]:
        return None
    first_sample = number if has_sample_number else number * info.block_samples
    return FrameHeader(first_sample, samples)


def decode_number(content: bytes, position: int) -> tuple[int, int] | None:
    """The number that begins at a position, and the position behind it; None if the bytes code no number."""
    first = content[position]
    if first < 0x80:
        return first, position + 1
    length = 8 - (first ^ 0xFF).bit_length()
    rest = content[position + 1 : position + length]
    if not 2 <= length <= 7 or len(rest) < length - 1 or any(byte & 0xC0 != 0x80 for byte in rest):
        return None
    number = first & (0x7F >> length)
    for byte in rest:
        number = number << 6 | byte & 0x3F
    return number, position + length


def is_whole_frame(tail: bytes, place: int) -> bool:
    """Whether the bytes from a place to the end of a file, or to the tag there, are one frame, by its checksum."""
    if tail[-ID3V1_BYTES:][:3] == b"TAG":
        tail = tail[:-ID3V1_BYTES]
    crc = 0
    table = crc16_table()
    for byte in tail[place:]:
        crc = (crc << 8 & 0xFFFF) ^ table[crc >> 8 ^ byte]
    return crc == 0


def crc8(content: bytes) -> int:
    """The checksum of a frame's header."""
    crc = 0
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 & 0xFF ^ (CRC8_POLYNOMIAL if crc & 0x80 else 0)
    return crc


@cache
def crc16_table() -> tuple[int, ...]:
    """What each byte does to the checksum of a frame."""
    table = []
    for byte in range(256):
        crc = byte << 8
        for _ in range(8):
            crc = crc << 1 & 0xFFFF ^ (CRC16_POLYNOMIAL if crc & 0x8000 else 0)
        table.append(crc)
    return tuple(table)
