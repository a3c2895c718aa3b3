"""Lengths that headers declare: of wav, AIFF, w64, caf and flac, held against the bytes that are there.

Decoders report the samples that are present, so that only the header shows what is missing. Some writers fill in a
wrong length, which the bytes contradict.
"""

import struct
from os import SEEK_END
from typing import NamedTuple

from pipeline.audio.byte_window import ReadableFile

# A wav whose size is this or more was never finished: sox writes this size, FFmpeg writes 2^32 - 1.
UNKNOWN_WAV_BYTES = 0x7FFF_F000

# Likewise for w64, where FFmpeg writes 2^63 - 1; on ext4 no seek leads beyond 2^44.
UNKNOWN_W64_BYTES = 2**42

MAX_RIFF_CHUNKS = 1000  # stops the walk through a file of zeros, whose chunks never end


class RiffHeader(NamedTuple):
    """The facts that the header of a wav states; a frame is one sample of every channel."""

    format_tag: int = 1
    frame_bytes: int = 0
    sound_bytes: int | None = None  # as declared; None if the header does not declare it
    remaining_bytes: int = 0  # from the start of the sound to the end of the file

    @property
    def is_unfinished(self) -> bool:
        """Whether sound follows a size that leaves no room for one sample."""
        return self.sound_bytes is not None and self.sound_bytes < self.frame_bytes <= self.remaining_bytes


def read_riff_header(file: ReadableFile, byte_order: str) -> RiffHeader:
    """Read the chunks of a wav up to the sound and return the facts that they state."""
    header = RiffHeader()
    position = 12
    for _ in range(MAX_RIFF_CHUNKS):
        file.seek(position)
        chunk = file.read(24)
        if len(chunk) < 8:
            break
        name, size = struct.unpack_from(f"{byte_order}4sI", chunk)

        # The sound: the last chunk to read. If its size was never filled in, `ds64` may state it.
        if name == b"data":
            remaining_bytes = file.seek(0, SEEK_END) - position - 8
            sound_bytes = size if size < UNKNOWN_WAV_BYTES else header.sound_bytes
            return header._replace(sound_bytes=sound_bytes, remaining_bytes=remaining_bytes)

        # The sample format, and in an RF64 the size of the sound in 64 bits.
        if name == b"fmt " and len(chunk) == 24:
            tag, channels, block_bytes, bits = struct.unpack_from(f"{byte_order}HH8xHH", chunk, 8)
            frame_bytes = resolve_frame_bytes(channels, block_bytes, bits)
            header = header._replace(format_tag=tag, frame_bytes=frame_bytes)
        if name == b"ds64" and len(chunk) == 24:
            (sound_bytes,) = struct.unpack_from(f"{byte_order}8xQ", chunk, 8)
            header = header._replace(sound_bytes=sound_bytes)

        # Chunks begin at even bytes.
        position += 8 + size + size % 2
    return header._replace(sound_bytes=None)


def resolve_frame_bytes(channels: int, block_bytes: int, bits: int) -> int:
    """The bytes of one sample of every channel, as libsndfile takes them: by the bits, unless each sample has a margin.

    Some recorders write a BlockAlign of one channel, or of one byte.
    """
    sample_bytes = (bits + 7) // 8
    has_margin = bits == 24 and block_bytes == 4 * channels
    if sample_bytes in (1, 2, 3, 4, 8) and not has_margin:
        return channels * sample_bytes
    return block_bytes


def read_w64_frames(file: ReadableFile) -> int | None:
    """The frames that a w64 declares, None if it declares none: FFmpeg only reports the frames that are present."""
    position = 40
    frame_bytes = 0
    for _ in range(MAX_RIFF_CHUNKS):
        file.seek(position)
        chunk = file.read(40)
        if len(chunk) < 40:
            break

        # The head of a chunk: a name of 16 bytes, of which four suffice, and a size that includes the head's 24 bytes.
        name = chunk[:4]
        size = int.from_bytes(chunk[16:24], "little")
        if name == b"data":
            if not frame_bytes or not 24 <= size < UNKNOWN_W64_BYTES:
                return None
            return (size - 24) // frame_bytes
        if name == b"fmt ":
            frame_bytes = int.from_bytes(chunk[36:38], "little")

        # Chunks begin at multiples of eight bytes. A damaged size is cut to the range of a seek.
        position = min(position + max(24, size + -size % 8), UNKNOWN_W64_BYTES)
    return None


def read_caf_frames(file: ReadableFile) -> int | None:
    """The frames that a caf of constant packets declares, else None: FFmpeg only reports the frames present."""
    position = 8
    packet_bytes = 0
    packet_frames = 0
    for _ in range(MAX_RIFF_CHUNKS):
        file.seek(position)
        chunk = file.read(36)
        if len(chunk) < 12:
            break

        # Four other bytes precede the sound. A size of -1 means that the sound extends to the end of the file.
        name = chunk[:4]
        size = int.from_bytes(chunk[4:12], signed=True)
        if name == b"data":
            if not packet_bytes or size < 4:
                return None
            return (size - 4) // packet_bytes * packet_frames
        if name == b"desc" and len(chunk) == 36:
            packet_bytes, packet_frames = struct.unpack(">II", chunk[28:36])
        position = min(position + 12 + max(0, size), UNKNOWN_W64_BYTES)
    return None


def read_au_share(file: ReadableFile) -> float:
    """The share of the declared bytes of sound that an au has; 1 if it declares none."""
    file.seek(0)
    offset, size = struct.unpack(">II", file.read(12).ljust(12, b"\0")[4:])
    present_bytes = max(0, file.seek(0, SEEK_END) - offset)
    return present_bytes / size if present_bytes < size < UNKNOWN_WAV_BYTES else 1.0


# Bytes of a sample by the compression of an AIFF-C; "" stands for an AIFF, whose samples are as wide as it states.
AIFF_SAMPLE_BYTES = {
    b"NONE": 0,
    b"sowt": 0,
    b"twos": 0,
    b"in24": 3,
    b"in32": 4,
    b"fl32": 4,
    b"FL32": 4,
    b"fl64": 8,
    b"FL64": 8,
}


def read_aiff_frames(file: ReadableFile) -> int | None:
    """The frames in the sound chunk of an AIFF, whatever number its header states; None if the chunk has no size."""
    file.seek(0)
    is_aifc = file.read(12)[8:] == b"AIFC"
    position = 12
    frame_bytes = 0
    for _ in range(MAX_RIFF_CHUNKS):
        file.seek(position)
        chunk = file.read(30)
        if len(chunk) < 16:
            break

        # The format: channels, frames, bits, rate, and the compression of an AIFF-C.
        name = chunk[:4]
        size = int.from_bytes(chunk[4:8])
        if name == b"COMM" and len(chunk) == 30:
            channels, bits = struct.unpack_from(">H4xH", chunk, 8)
            compression = chunk[26:30] if is_aifc else b"NONE"
            sample_bytes = AIFF_SAMPLE_BYTES.get(compression)
            if sample_bytes is None:
                return None
            frame_bytes = channels * (sample_bytes or (bits + 7) // 8)

        # The sound, behind an offset and a block size of four bytes each.
        if name == b"SSND":
            offset = int.from_bytes(chunk[8:12])
            if not frame_bytes or not 8 + offset < size < UNKNOWN_WAV_BYTES:
                return None
            return (size - 8 - offset) // frame_bytes
        position += 8 + size + size % 2
    return None
