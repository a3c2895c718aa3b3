"""Tar: where the members of an uncompressed tar lie, from its headers alone."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.audio.byte_window import ByteWindow
from pipeline.errors import archive_error
from pipeline.object_store import is_remote_url, open_range_reader

TAR_BLOCK_BYTES = 512

END_BLOCK = bytes(TAR_BLOCK_BYTES)  # a block of zeros follows the last member

MAX_NAME_BYTES = 2**20  # of a name or of a PAX header; a damaged size must not be allocated

REGULAR_TYPES, LONG_NAME_TYPE, PAX_TYPE = (
    (b"0", b"\0", b"7"),
    b"L",
    b"x",
)  # types of member: POSIX 1003.1, GNU tar's manual


class TarMember(NamedTuple):
    """A regular file in a tar: `size` bytes from `offset` on, some of which may be cut off."""

    name: str
    offset: int
    size: int


class TarReader:
    """The members of a tar in their order; where it is damaged, those before the damage, and `fault` says so.

    One header is read at a time and the bytes of the members are sought over, so a tar of gigabytes costs as
    many small reads as it has members. Names may be GNU's or PAX's long ones; bytes that are no UTF-8 come
    out as `\\xff`. Links and sparse members are left out.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = path  # or a URL
        self.fault: str | None = None

    def read_members(self) -> Iterator[TarMember]:
        """Every member; afterwards `fault` is known. OSError where the file cannot be read, InputError at a URL."""
        if is_remote_url(self._path):
            with open_range_reader(str(self._path)) as (read, file_bytes):
                yield from self._parse_members(read, file_bytes)
            return
        file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield from self._parse_members(partial(os.pread, file), os.fstat(file).st_size)
        finally:
            os.close(file)

    def _parse_members(self, read: Callable[[int, int], bytes], file_bytes: int) -> Iterator[TarMember]:
        place, count, long_name, pax = 0, 0, b"", dict[bytes, bytes]()
        while (head := read(TAR_BLOCK_BYTES, place)) != END_BLOCK:
            if self._note_damage(head, place, count):
                return
            kind, size = head[156:157], parse_header_number(head[124:136])
            if kind in REGULAR_TYPES and b"size" in pax:
                size = parse_digits(pax[b"size"], 10)
            data = place + TAR_BLOCK_BYTES
            if size < 0 or (kind in (LONG_NAME_TYPE, PAX_TYPE) and size > MAX_NAME_BYTES):
                self.fault = f"is damaged at byte {place:,}; the {count:,} members before it are used"
                return
            if kind == LONG_NAME_TYPE:
                long_name = read(size, data).rstrip(b"\0")
            elif kind == PAX_TYPE:
                pax = parse_pax_records(read(size, data))
            else:
                sparse = any(key.startswith(b"GNU.sparse") for key in pax)
                if kind in REGULAR_TYPES and not sparse:
                    name = pax.get(b"path") or long_name or name_in_header(head)
                    count += 1
                    yield TarMember(name.decode(errors="backslashreplace"), data, size)
                long_name, pax = b"", {}
            place = data + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
            if data + size > file_bytes:
                self.fault = f"is cut short in its member {count:,}; fetch it again"
                return

    def _note_damage(self, head: bytes, position: int, member_count: int) -> bool:
        """Whether this is no header; notes what it is instead."""
        if head[:2] == b"\x1f\x8b" and not position:
            self.fault = "is compressed, so no member can be sought; unpack it, or store it as a plain .tar"
        elif len(head) < TAR_BLOCK_BYTES and member_count:
            self.fault = (
                f"ends after {member_count:,} members without a tar's end mark; cut short? Fetch it again"
            )
        elif len(head) < TAR_BLOCK_BYTES or not has_valid_checksum(head):
            where = f"is damaged at byte {position:,}; the {member_count:,} members before it are used"
            self.fault = where if member_count else "is no tar; fetch it again"
        return self.fault is not None


@contextmanager
def open_tar_member(path: Path, offset: int, size: int) -> Iterator[ByteWindow]:
    """A member's bytes; AudioError missing or unreadable where the tar cannot be opened."""
    with ExitStack() as stack:
        try:
            window = stack.enter_context(ByteWindow.open_range(path, offset, size))
        except OSError as error:
            raise archive_error(path, error) from None
        yield window


def has_valid_checksum(head: bytes) -> bool:
    """Whether a header has the checksum that it states; some old writers added signed bytes."""
    stated = parse_header_number(head[148:156])
    plain = sum(head) - sum(head[148:156]) + 8 * ord(" ")
    rest = head[:148] + head[156:]
    return stated == plain or stated == plain - 256 * sum(byte > 127 for byte in rest)


def parse_header_number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 where the first bit is set; -1 where it is neither."""
    if field[:1] >= b"\x80":
        return int.from_bytes(field[1:]) if field[0] == 0x80 else -1
    return parse_digits(field.strip(b" \0") or b"0", 8)


def parse_digits(text: bytes, base: int) -> int:
    """A number, -1 where it is none."""
    return int(text, base) if text.isdigit() and (base == 10 or not text.strip(b"01234567")) else -1


def name_in_header(head: bytes) -> bytes:
    """The name in a header itself, in the two parts of POSIX where it says so."""
    name = head[:100].partition(b"\0")[0]
    prefix = head[345:500].partition(b"\0")[0] if head[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def parse_pax_records(text: bytes) -> dict[bytes, bytes]:
    """The `length key=value` lines of a PAX header, up to the first that is none."""
    found = {}
    while text:
        length, _, _ = text.partition(b" ")
        line, text = text[: max(0, parse_digits(length, 10))], text[max(0, parse_digits(length, 10)) :]
        key, equals, value = line[len(length) + 1 :].removesuffix(b"\n").partition(b"=")
        if not equals:
            break
        found[key] = value
    return found
