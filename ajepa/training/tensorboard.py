"""Metrics as TensorBoard reads them: an event file for each time that a run is carried on.

Written by hand because TensorBoard's own writer holds events back in a thread for two minutes, which a kill
loses, and brings a web server along. The format: records of (length, its checksum, bytes, their checksum),
each a protobuf `Event`.
"""

import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import google_crc32c

EVENT_FILE_VERSION = b"brain.Event:2"

VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # protobuf's wire types

SESSION_START = b"\x08\x01"  # SessionLog(status=START): drop what older files have of this step and later


class EventFileWriter:
    """A new event file in `folder`, whose steps begin with `first`; what is older and later does not count."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names; two in a nanosecond there are not
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._append_record(_encode_field(3, BYTES, EVENT_FILE_VERSION))
        if first_step > 1:
            self._append_record(_encode_field(2, VARINT, first_step) + _encode_field(7, BYTES, SESSION_START))

    def write_scalars(self, step: int, line: dict[str, Any]) -> None:
        """The numbers of a line of metrics, each a curve of its own name."""
        values = b"".join(
            _encode_field(
                1, BYTES, _encode_field(1, BYTES, name.encode()) + _encode_field(2, FLOAT, float(value))
            )
            for name, value in line.items()
            if isinstance(value, int | float) and name != "step"
        )
        self._append_record(_encode_field(2, VARINT, step) + _encode_field(5, BYTES, values))

    def _append_record(self, event: bytes) -> None:
        """One record, in a single write."""
        event = _encode_field(1, DOUBLE, time.time()) + event
        length = struct.pack("<Q", len(event))
        with self.path.open("ab") as handle:
            handle.write(length + _masked_crc32c(length) + event + _masked_crc32c(event))


def _masked_crc32c(content: bytes) -> bytes:
    """CRC-32C, rotated and shifted as in TFRecord files."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _encode_field(number: int, kind: int, value: Any) -> bytes:
    """A field of a protobuf message."""
    tag = _encode_varint(number << 3 | kind)
    if kind == VARINT:
        return tag + _encode_varint(value)
    if kind == BYTES:
        return tag + _encode_varint(len(value)) + value
    return tag + struct.pack("<d" if kind == DOUBLE else "<f", value)


def _encode_varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the highest bit says that more follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(encoded) + bytes([value])
