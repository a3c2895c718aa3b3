"""Members of an uncompressed tar: their positions, read from the headers alone, and how to open a member."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.audio.byte_window import ByteWindow
from pipeline.errors import archive_error
from pipeline.object_store import is_remote_url, open_range_reader

COMPRESSED_TAR_ADVICE = "is compressed, so its members cannot be read; unpack it, or store it as a plain .tar"

TAR_BLOCK_BYTES = 512

END_BLOCK = bytes(TAR_BLOCK_BYTES)  # a block of zeros follows the last member

ZEROS_READ_BYTES = 2**16  # at a time, between tars that are joined

MAX_NAME_BYTES = 2**20  # of a name or a PAX header: a damaged size must not allocate gigabytes

# Types of member, by POSIX 1003.1 and GNU tar's manual.
REGULAR_TYPES = (b"0", b"\0", b"7")
LONG_NAME_TYPE = b"L"
LONG_LINK_TYPE = b"K"
HARD_LINK_TYPE = b"1"
PAX_TYPE = b"x"


class TarMember(NamedTuple):
    """A regular file in a tar: `size` bytes from `offset` on, some of which may be cut off."""

    name: str
    offset: int
    size: int


class TarReader:
    """Reads the members of a tar in order; of a damaged tar only those before the damage, which `fault` describes.

    One header is read at a time and the contents are skipped, so a tar of gigabytes costs as many small reads as
    it has members. Long names are read in GNU's form and in PAX's; bytes that are not UTF-8 are written as `\\xff`.
    A hard link is the member before it that it names. Tars that are joined end to end are read to the last one, as
    `tar --ignore-zeros` does. Symbolic links and sparse members are left out.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = path  # or a URL
        self.fault: str | None = None

    def read_members(self) -> Iterator[TarMember]:
        """Yield every member; then `fault` is set if the tar is damaged.

        OSError for a file that cannot be read, InputError for a URL.
        """
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
        """Walk from header to header; `read` takes a number of bytes and a position."""
        position = 0
        member_count = 0
        long_name = b""  # name of the next member
        long_link = b""  # name of the member that the next one is a link to
        pax: dict[bytes, bytes] = {}  # records of the next member
        places: dict[bytes, tuple[int, int]] = {}  # offset and size of every member, for links to it
        while True:
            # After the end mark another tar may follow.
            header = read(TAR_BLOCK_BYTES, position)
            if header == END_BLOCK:
                next_position = find_next_tar(read, position, file_bytes)
                if next_position is None:
                    return
                position = next_position
                continue
            if self._note_damage(header, position, member_count):
                return

            # A regular file too large for a header's digits has its size in the PAX records before it.
            kind = header[156:157]
            size = parse_header_number(header[124:136])
            if kind in REGULAR_TYPES and b"size" in pax:
                size = parse_digits(pax[b"size"], 10)
            if kind == HARD_LINK_TYPE:
                size = 0  # some programs write the size of the member that it is a link to
            is_name = kind in (LONG_NAME_TYPE, LONG_LINK_TYPE, PAX_TYPE)
            if size < 0 or (is_name and size > MAX_NAME_BYTES):
                self.fault = describe_tar_damage(position, member_count)
                return

            # A long name and PAX records belong to the next member, and to no other.
            content_position = position + TAR_BLOCK_BYTES
            if kind == LONG_NAME_TYPE:
                long_name = read(size, content_position).rstrip(b"\0")
            elif kind == LONG_LINK_TYPE:
                long_link = read(size, content_position).rstrip(b"\0")
            elif kind == PAX_TYPE:
                pax = parse_pax_records(read(size, content_position))
            else:
                # The place of its content: its own, or that of the member that it is a link to.
                name = pax.get(b"path") or long_name or name_in_header(header)
                place = None
                if kind == HARD_LINK_TYPE:
                    target = pax.get(b"linkpath") or long_link or header[157:257].partition(b"\0")[0]
                    place = places.get(target)
                elif kind in REGULAR_TYPES and not any(key.startswith(b"GNU.sparse") for key in pax):
                    place = (content_position, size)
                if place is None:
                    places.pop(name.rstrip(b"/"), None)  # a folder, say, in place of an earlier file
                else:
                    places[name] = place
                    member_count += 1
                    yield TarMember(name.decode(errors="backslashreplace"), *place)
                long_name = long_link = b""
                pax = {}

            # Contents fill whole blocks; the next header follows.
            position = content_position + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
            if content_position + size > file_bytes:
                self.fault = f"is cut short in its member {member_count:,}; fetch it again"
                return

    def _note_damage(self, header: bytes, position: int, member_count: int) -> bool:
        """Set `fault` if the block is not the header of a member; return whether it is set."""
        if header[:2] == b"\x1f\x8b" and not position:
            self.fault = COMPRESSED_TAR_ADVICE
        elif len(header) < TAR_BLOCK_BYTES and member_count:
            self.fault = (
                f"ends after {member_count:,} members without a tar's end mark; cut short? Fetch it again"
            )
        elif len(header) < TAR_BLOCK_BYTES or not has_valid_checksum(header):
            self.fault = describe_tar_damage(position, member_count)
            if not member_count:
                self.fault = "is no tar; fetch it again"
        return self.fault is not None


def find_next_tar(read: Callable[[int, int], bytes], position: int, file_bytes: int) -> int | None:
    """The position of the next header after the zeros at `position`; None if there is none."""
    while position < file_bytes:
        blocks = read(ZEROS_READ_BYTES, position)
        content = len(blocks) - len(blocks.lstrip(b"\0"))
        if content < len(blocks):
            position += content // TAR_BLOCK_BYTES * TAR_BLOCK_BYTES
            header = read(TAR_BLOCK_BYTES, position)
            return position if len(header) == TAR_BLOCK_BYTES and has_valid_checksum(header) else None
        if not blocks:
            return None
        position += len(blocks)
    return None


@contextmanager
def open_tar_member(path: Path, offset: int, size: int) -> Iterator[ByteWindow]:
    """Open the bytes of a member; AudioError (missing or unreadable) if the tar cannot be opened."""
    # Only errors of opening are translated: one that the caller raises inside the block passes through.
    with ExitStack() as stack:
        try:
            window = stack.enter_context(ByteWindow.open_range(path, offset, size))
        except OSError as error:
            raise archive_error(path, error) from None
        yield window


def describe_tar_damage(position: int, member_count: int) -> str:
    """The position of the damage and the members that are used, as the end of a sentence."""
    return f"is damaged at byte {position:,}; the {member_count:,} members before it are used"


def has_valid_checksum(header: bytes) -> bool:
    """Whether a header has the checksum that it states: a sum of unsigned bytes or, in old tars, of signed ones."""
    stated = parse_header_number(header[148:156])

    # The checksum field itself counts as eight spaces.
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    rest = header[:148] + header[156:]
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in rest)


def parse_header_number(field: bytes) -> int:
    """The number in a header's field: octal digits, or base 256 (GNU) if the first bit is set; -1 if it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    if field[:1] > b"\x80":
        return -1
    return parse_digits(field.strip(b" \0") or b"0", 8)


def parse_digits(text: bytes, base: int) -> int:
    """The number that a text of digits stands for, base 8 or 10; -1 if the text is no number."""
    is_number = text.isdigit() and (base == 10 or not text.strip(b"01234567"))
    return int(text, base) if is_number else -1


def name_in_header(header: bytes) -> bytes:
    """The name that a header itself contains; in a POSIX header a prefix may precede it."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        return prefix + b"/" + name
    return name


def parse_pax_records(text: bytes) -> dict[bytes, bytes]:
    """The `length key=value` lines of a PAX header, up to the first line of another form."""
    records = {}
    while text:
        # The length counts the whole line, with its own digits and the line break.
        digits = text.partition(b" ")[0]
        length = max(0, parse_digits(digits, 10))
        line = text[:length]
        text = text[length:]

        key, equals_sign, value = line[len(digits) + 1 :].removesuffix(b"\n").partition(b"=")
        if not equals_sign:
            break
        records[key] = value
    return records
