"""Chunks of sound in an AVI: time is their number, so an empty chunk stands for sound that is missing.

Programs that record or cut write an empty chunk where they have no sound; FFmpeg counts only those that are not empty.
"""

import struct

from pipeline.audio.byte_window import ReadableFile

MAX_CHUNKS = 10**7  # of a film of many days; stops the walk through a damaged file

STREAM_HEADER_BYTES = 48


def number_sound_chunks(file: ReadableFile, stream_index: int) -> dict[int, int] | None:
    """The number of every chunk of a stream of sound, by the offset of its sound; None if no chunk is empty.

    None, too, if the stream counts time in bytes and not in chunks.
    """
    name = f"{stream_index:02d}wb".encode()
    numbers: dict[int, int] = {}
    headers = 0
    has_empty_chunk = False
    position = 0
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        chunk = file.read(8 + STREAM_HEADER_BYTES)
        if len(chunk) < 8:
            break
        kind, size = struct.unpack_from("<4sI", chunk)

        # Lists are entered; their heads have four bytes more.
        if kind in (b"RIFF", b"LIST"):
            position += 12
            continue
        if kind == b"strh":
            if headers == stream_index and any(chunk[52:56]):
                return None
            headers += 1
        if kind == name:
            numbers[position + 8] = len(numbers)
            has_empty_chunk |= size == 0
        position += 8 + size + size % 2
    return numbers if has_empty_chunk else None
