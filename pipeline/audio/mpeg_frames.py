"""Frames of mp3 and AAC (ADTS): where they begin, how many there are, and whether the length in a Xing frame is right.

Headers as in ISO 11172-3, 13818-3 and 13818-7; the Xing, Info and VBRI frames as encoders write them.
"""

import struct
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from pipeline.audio.byte_window import ReadableFile

CHUNK_BYTES = 2**20  # read at once

MIN_CHAIN_FRAMES = 3  # so many frames in a row are no accident

SEARCHED_BYTES = 2**20  # from the start of a file, for its first frame

MAX_FRAME_BYTES = 2**13  # an ADTS frame has at most so many

# Bit rates in kbit/s by their index, for layers 1, 2 and 3 of MPEG 1, then of MPEG 2 and 2.5.
BIT_RATES_KBPS = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}

SAMPLE_RATES_HZ = (44_100, 48_000, 32_000)  # of MPEG 1; half of it for MPEG 2, a quarter for 2.5

XING_OFFSETS = (13, 21, 36)  # of the word Xing or Info in a frame: after the header and side information

# A count of frames that differs by less from the frames that are there is right.
COUNT_TOLERANCE_FRAMES = 4


SIZE_TOLERANCE = 0.005  # of a file, for frames that are one byte longer than others

LARGEST_SURPLUS = 1.02  # of the size that a Xing frame states


class XingHeader(NamedTuple):
    """What the first frame of an mp3 states; None where it states nothing."""

    frames: int | None
    size_bytes: int | None


class FrameCount(NamedTuple):
    """The frames of an mp3.

    frames        number of frames, without Xing and Info frames
    is_cut        whether the last frame is incomplete
    part_offsets  where Xing and Info frames begin: each is the begin of a file that was joined
    """

    frames: int
    is_cut: bool
    part_offsets: tuple[int, ...]


@cache
def mp3_frame_sizes() -> dict[bytes, int]:
    """The size in bytes of a frame, by the first three bytes of its header."""
    sizes = {}
    for second in range(0xE0, 0x100):
        # Two bits each: the version (0: 2.5, 2: 2, 3: 1) and the layer (3: 1, 2: 2, 1: 3).
        version_bits = second >> 3 & 3
        layer = 4 - (second >> 1 & 3)
        if version_bits == 1 or layer == 4:
            continue
        divisor = {3: 1, 2: 2, 0: 4}[version_bits]
        rates_kbps = BIT_RATES_KBPS[min(divisor, 2), layer]
        for third in range(256):
            bit_rate_index = third >> 4
            sample_rate_index = third >> 2 & 3
            if not 0 < bit_rate_index < 15 or sample_rate_index == 3:
                continue
            rate_hz = SAMPLE_RATES_HZ[sample_rate_index] // divisor
            bit_rate = 1000 * rates_kbps[bit_rate_index - 1]
            padding = third >> 1 & 1
            if layer == 1:
                size = 4 * (12 * bit_rate // rate_hz + padding)
            else:
                samples = 576 if layer == 3 and divisor > 1 else 1152
                size = samples // 8 * bit_rate // rate_hz + padding
            sizes[bytes((0xFF, second, third))] = size
    return sizes


def frame_size(content: bytes, position: int) -> int:
    """The size of the mp3 or ADTS frame at a position; 0 if none begins there."""
    header = content[position : position + 6]
    if len(header) < 6 or header[0] != 0xFF:
        return 0
    size = mp3_frame_sizes().get(header[:3], 0)
    if size:
        return size

    # ADTS: twelve ones, layer 0, a defined sampling rate, and a size of 13 bits.
    if header[1] & 0xF6 == 0xF0 and header[2] >> 2 & 15 < 13:
        size = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
        return size if size > 7 else 0
    return 0


def find_first_frame(content: bytes) -> int | None:
    """The offset of the first mp3 or ADTS frame that is followed by others of its kind; None if there is none."""
    position = content.find(b"\xff")
    while position >= 0:
        if is_chain_of_frames(content, position):
            return position
        position = content.find(b"\xff", position + 1)
    return None


def is_chain_of_frames(content: bytes, position: int) -> bool:
    """Whether MIN_CHAIN_FRAMES frames of the same version, layer and sampling rate begin at a position."""
    first = content[position : position + 3]
    for _ in range(MIN_CHAIN_FRAMES):
        size = frame_size(content, position)
        same_kind = content[position + 1 : position + 2] == first[1:2]
        if not size or not same_kind or content[position + 2] & 0x0C != first[2] & 0x0C:
            return False
        position += size
    return True


def read_xing_header(frame: bytes) -> XingHeader | None:
    """The counts in a Xing, Info or VBRI frame; None if the frame is none of these."""
    for offset in XING_OFFSETS:
        if frame[offset : offset + 4] in (b"Xing", b"Info") and len(frame) >= offset + 16:
            (flags,) = struct.unpack_from(">I", frame, offset + 4)
            values = list(struct.unpack_from(">2I", frame, offset + 8))
            frames = values.pop(0) if flags & 1 else None
            return XingHeader(frames, values.pop(0) if flags & 2 else None)
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        size_bytes, frames = struct.unpack_from(">2I", frame, 46)
        return XingHeader(frames, size_bytes)
    return None


def count_mp3_frames(file: ReadableFile, begin: int) -> FrameCount:
    """Walk over all frames of an mp3 from the first one on, over tags and junk between them."""
    sizes = mp3_frame_sizes()
    frames = 0
    part_offsets = []
    is_cut = False
    position = begin
    while True:
        # A chunk of the file: all frames that lie in it as a whole.
        file.seek(position)
        content = file.read(CHUNK_BYTES)
        is_last = len(content) < CHUNK_BYTES
        stop = len(content) if is_last else len(content) - MAX_FRAME_BYTES
        offset = 0
        for name in (b"Xing", b"Info"):
            part_offsets += [position + place for place in find_xing_frames(content, name)]
        while offset + 4 <= stop:
            size = sizes.get(content[offset : offset + 3])
            if size:
                offset += size
                frames += 1
                continue
            found = skip_between_frames(content, offset)
            if found is None:
                offset = stop if is_last else max(offset, stop)
                break
            offset = found
        if is_last:
            is_cut = offset > len(content)
            break
        position += min(offset, len(content))
    parts = sorted(set(part_offsets))
    return FrameCount(frames - len(parts), is_cut, tuple(parts))


def find_xing_frames(content: bytes, name: bytes) -> Iterator[int]:
    """Yield the begin of every frame that has this word where Xing and Info frames have it, after zeros only."""
    place = content.find(name)
    while place >= 0:
        for offset in XING_OFFSETS:
            begin = place - offset
            if begin < 0 or content[begin : begin + 3] not in mp3_frame_sizes():
                continue
            if not any(content[begin + 4 : place]):
                yield begin
                break
        place = content.find(name, place + 4)


def skip_between_frames(content: bytes, offset: int) -> int | None:
    """The offset of the next frame behind a tag or junk; None if no frame follows."""
    if content[offset : offset + 3] == b"ID3" and len(content) >= offset + 10:
        return offset + id3_tag_bytes(content[offset : offset + 10])
    if content[offset : offset + 8] == b"APETAGEX" and len(content) >= offset + 32:
        (size, _, flags) = struct.unpack_from("<3I", content, offset + 12)
        return offset + size + (32 if flags >> 29 & 1 else 0)
    if content[offset : offset + 3] == b"TAG":
        return offset + 128

    # Junk: the next frame that others follow.
    position = content.find(b"\xff", offset + 1)
    while position >= 0:
        if is_chain_of_frames(content, position):
            return position
        position = content.find(b"\xff", position + 1)
    return None


def id3_tag_bytes(head: bytes) -> int:
    """The size of an ID3 tag with its ten bytes of header: four bytes of seven bits each."""
    return 10 + ((head[6] & 127) << 21 | (head[7] & 127) << 14 | (head[8] & 127) << 7 | head[9] & 127)


def is_count_right(xing: XingHeader, count: FrameCount, size_bytes: int) -> bool:
    """Whether to believe the length in a Xing frame: the frames bear it out, or the end of the file is missing.

    `size_bytes` is the size of the file from the Xing frame on.
    """
    if xing.frames is None:
        return False

    # FFmpeg guesses the length of a file that is larger than stated.
    if xing.size_bytes is not None and size_bytes > LARGEST_SURPLUS * xing.size_bytes + MAX_FRAME_BYTES:
        return False
    if abs(xing.frames - count.frames) <= COUNT_TOLERANCE_FRAMES:
        return True
    lacks_bytes = xing.size_bytes is not None and xing.size_bytes > size_bytes + MAX_FRAME_BYTES
    return xing.frames > count.frames and (count.is_cut or lacks_bytes)


def is_size_as_stated(xing: XingHeader, head: bytes, size_bytes: int) -> bool:
    """Whether the file has the size of the stated number of frames, all as large as its second one.

    Then no frame needs to be counted: most files of a constant bit rate are so.
    """
    first_bytes = frame_size(head, 0)
    frame_bytes = frame_size(head, first_bytes) if first_bytes else 0
    if not xing.frames or not frame_bytes:
        return False
    return abs(xing.frames * frame_bytes - size_bytes) <= SIZE_TOLERANCE * size_bytes + 2 * frame_bytes
