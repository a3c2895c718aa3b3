"""Containers: the kind of a sound file, recognised by its first bytes; where its sound begins; its length."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from os import SEEK_END
from pathlib import Path

from pipeline.audio.byte_window import ByteWindow, ReadableFile, SoundInput, file_identity, open_from_start
from pipeline.audio.container_kinds import CONTAINER_KINDS, CONTAINER_SIGNATURES, AudioContainer
from pipeline.audio.flac_frames import find_last_sample, read_stream_info
from pipeline.audio.header_lengths import (
    read_aiff_frames,
    read_au_share,
    read_caf_frames,
    read_riff_header,
    read_w64_frames,
)
from pipeline.audio.mpeg_frames import (
    SEARCHED_BYTES,
    count_mp3_frames,
    find_first_frame,
    id3_tag_bytes,
    is_count_right,
    is_size_as_stated,
    read_xing_header,
)
from pipeline.errors import AudioError

HEAD_BYTES = 4096  # read from the start of a file to recognise its container

CHUNK_BYTES = 2**17  # read at once to search a file

CACHED_CONTAINERS = (
    256  # files that are recognised once in a process, however many segments are cut from them
)

# Format tags of wav that libsndfile decodes: PCM, float, A-law, mu-law, extensible. ADPCM and mp3 are left to FFmpeg.
LIBSNDFILE_TAGS = (1, 3, 6, 7, 0xFFFE)

# Where in a file of some kinds these bytes stand, which are long enough to be looked for behind junk.
BURIED_SIGNATURES = (
    (0, b"fLaC\0\0\0\x22"),
    (0, b"OggS\0\x02"),
    (8, b"WAVEfmt "),
    (0, b"\x1aE\xdf\xa3"),
    (4, b"ftyp"),
)

OGG_FIRST_PAGE = b"OggS\0\x02"  # of a stream; the last byte is a flag

FLAC_START = b"fLaC\0\0\0\x22"

TS_SYNC = b"G"  # the first byte of every packet of MPEG-TS

# Sizes of these packets: plain, with a time before each as cameras write it, with parity behind each.
TS_PACKET_BYTES = (188, 192, 204)


def recognise_container(sound: SoundInput) -> AudioContainer:
    """The container of a sound. AudioError: missing if there is no file, unreadable if its kind is unknown."""
    try:
        if isinstance(sound, Path) and (identity := file_identity(sound)) is not None:
            return recognise_file(sound, identity)
        with open_from_start(sound) as file:
            return recognise_content(file)
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise AudioError(reason, f"cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=CACHED_CONTAINERS)
def recognise_file(path: Path, _identity: tuple[int, int, int]) -> AudioContainer:
    """The container of a file, remembered until the file changes."""
    with open_from_start(path) as file:
        return recognise_content(file)


def recognise_content(file: ReadableFile) -> AudioContainer:
    """The container of an open file; AudioError (unreadable) if its kind is unknown."""
    head, begin = read_after_tags(file)
    container = match_signature(head, file, begin)
    if container is None:
        container = find_buried_stream(file, begin)

    # Only mp3 files begin with an ID3 tag, so damage after the tag does not hide the kind.
    if container is None and begin and head:
        container = replace(CONTAINER_KINDS["mp3"], length_kind="guessed")
    if container is None:
        raise AudioError("unreadable", f"{describe_unknown_head(head)}, no known audio; fetch it again")
    return container


def read_after_tags(file: ReadableFile) -> tuple[bytes, int]:
    """The first bytes after ID3 and APE tags (pictures may make them megabytes long), and the offset of these bytes."""
    begin = 0
    head = file.read(HEAD_BYTES)
    while True:
        if head[:3] == b"ID3" and len(head) >= 10:
            begin += id3_tag_bytes(head)
        elif head[:8] == b"APETAGEX" and len(head) >= 32:
            begin += 32 + int.from_bytes(head[12:16], "little")
        else:
            return head, begin
        file.seek(begin)
        head = file.read(HEAD_BYTES)


def match_signature(head: bytes, file: ReadableFile, begin: int) -> AudioContainer | None:
    """The container that the signature names, with the facts of its header; None if no signature fits.

    `head` are the bytes at `begin`, where the tags end.
    """
    # A wav comes in four variants; RIFX is big-endian.
    content = file if not begin else window_from(file, begin)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return replace(wav_container(content, ">" if head[:4] == b"RIFX" else "<"), skip_bytes=begin)

    # Kinds with a signature of their own; some headers also declare a length.
    for offset, signature, name in CONTAINER_SIGNATURES:
        if head.startswith(signature, offset):
            return replace(container_with_facts(name, head, content), skip_bytes=begin)

    # MPEG-TS has packets of 188 bytes, each with the same first byte; cameras write a time of four bytes before each.
    if is_transport_stream(head):
        return CONTAINER_KINDS["mpegts"]
    if is_latm_stream(head):
        return CONTAINER_KINDS["loas"]

    # An mp3 or AAC may begin with zeros.
    zeros = len(head) - len(head.lstrip(b"\0"))
    return mpeg_audio_container(head[zeros:], file, begin + zeros, junk_bytes=0)


def container_with_facts(name: str, head: bytes, content: ReadableFile) -> AudioContainer:
    """The container of a kind, with the facts in the header of a file of this kind."""
    kind = CONTAINER_KINDS[name]
    if name == "w64":
        return replace(kind, declared_frames=read_w64_frames(content))
    if name == "caf":
        return replace(kind, declared_frames=read_caf_frames(content))
    if name == "au":
        return replace(kind, present_share=read_au_share(content))
    if name == "aiff":
        return replace(kind, declared_frames=read_aiff_frames(content))
    if name == "ogg":
        return replace(kind, parts=find_ogg_links(content))
    if name == "flac":
        return flac_container(content)
    if name == "ac3" and len(head) > 5 and head[5] >> 3 > 10:
        return CONTAINER_KINDS["eac3"]
    return kind


def flac_container(content: ReadableFile) -> AudioContainer:
    """A flac with its length by its last frame.

    FFmpeg decodes it if its header states too small a length or none, as encoders that write to a pipe leave it, which
    libsndfile reports as 2^63 - 1 samples. And if it states another size of frames than they have: libsndfile would
    not put them in their places.
    """
    # Several flacs that were joined.
    kind = CONTAINER_KINDS["flac"]
    starts = [0, *find_all(content, FLAC_START, len(FLAC_START))]
    if len(starts) > 1:
        return replace(kind, parts=parts_between(starts, content))

    info = read_stream_info(content)
    declared, measured = info.samples, find_last_sample(info, content)
    if info.contradicts_a_frame:
        kind = replace(kind, uses_libsndfile=False)
    if declared and measured in (None, declared):
        return kind
    if declared and measured is not None and measured < declared:
        return replace(kind, declared_frames=measured)
    if measured is None:
        return replace(kind, uses_libsndfile=False, length_kind="guessed")
    return replace(kind, uses_libsndfile=False, length_kind="found", declared_frames=measured)


def find_ogg_links(content: ReadableFile) -> tuple[tuple[int, int], ...]:
    """Offset and size of every link of a chained Ogg; none if it is not chained.

    A link begins with the first pages of its streams, one directly after the other.
    """
    starts = []
    next_page = -1
    for page in find_all(content, OGG_FIRST_PAGE, 0):
        if page != next_page:
            starts.append(page)
        content.seek(page + 26)
        segments = content.read(1)
        sizes = content.read(segments[0]) if segments else b""
        next_page = page + 27 + len(sizes) + sum(sizes)
    return parts_between(starts, content) if len(starts) > 1 else ()


def parts_between(starts: list[int], content: ReadableFile) -> tuple[tuple[int, int], ...]:
    """Offset and size of the parts that begin at `starts`; each ends where the next one begins."""
    stops = [*starts[1:], content.seek(0, SEEK_END)]
    return tuple((start, stop - start) for start, stop in zip(starts, stops, strict=True))


def find_all(content: ReadableFile, needle: bytes, begin: int) -> Iterator[int]:
    """Yield the offset of every occurrence of some bytes from `begin` on; the file is read in chunks."""
    position = begin
    while True:
        content.seek(position)
        chunk = content.read(CHUNK_BYTES)
        place = chunk.find(needle)
        while place >= 0:
            yield position + place
            place = chunk.find(needle, place + 1)
        if len(chunk) < CHUNK_BYTES:
            return
        position += CHUNK_BYTES - len(needle) + 1


def find_buried_stream(file: ReadableFile, begin: int) -> AudioContainer | None:
    """The container of a stream that begins inside a frame or behind junk; None if there is none."""
    file.seek(begin)
    content = file.read(SEARCHED_BYTES)

    # The first of the signatures that are long enough to be no accident.
    places = [content.find(signature) - offset for offset, signature in BURIED_SIGNATURES]
    found = min((place for place in places if place > 0), default=None)
    if found is not None:
        return match_signature(content[found : found + HEAD_BYTES], file, begin + found)

    # Frames of mp3 or AAC that follow each other.
    junk_bytes = find_first_frame(content)
    if junk_bytes is None:
        return None
    head = content[junk_bytes : junk_bytes + HEAD_BYTES]
    return mpeg_audio_container(head, file, begin + junk_bytes, junk_bytes=junk_bytes)


def mpeg_audio_container(
    head: bytes, file: ReadableFile, begin: int, *, junk_bytes: int
) -> AudioContainer | None:
    """An mp3 (or layer 2) or bare AAC whose first frame is at `begin`; None if it is neither."""
    # Both begin with the same eleven bits.
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None

    # The layer distinguishes them. For mp3, some values of layer, bit rate and sampling rate are not defined.
    skip_bytes = begin if junk_bytes else 0
    layer = head[1] >> 1 & 3
    if layer == 0:
        return replace(CONTAINER_KINDS["aac"], skip_bytes=skip_bytes) if head[1] & 0xF0 == 0xF0 else None
    if layer == 3 or head[2] >> 4 == 15 or head[2] >> 2 & 3 == 3:
        return None
    container = mp3_container(head, file, begin)
    return container if container.parts else replace(container, skip_bytes=skip_bytes)


def mp3_container(head: bytes, file: ReadableFile, begin: int) -> AudioContainer:
    """An mp3, whose length is guessed unless a Xing, Info or VBRI frame states it and the frames bear it out."""
    kind = CONTAINER_KINDS["mp3"]
    xing = read_xing_header(head)
    size_bytes = file.seek(0, SEEK_END) - begin
    if xing is not None and is_size_as_stated(xing, head, size_bytes):
        return kind
    count = count_mp3_frames(file, begin)

    # Joined files, each with such a frame.
    if len(count.part_offsets) > 1:
        return replace(kind, parts=parts_between([begin, *count.part_offsets[1:]], file))
    if xing is not None and is_count_right(xing, count, size_bytes):
        return kind
    return replace(kind, length_kind="guessed")


def wav_container(content: ReadableFile, byte_order: str) -> AudioContainer:
    """A wav with the frames that its header declares: libsndfile only reports the frames that are present."""
    kind = CONTAINER_KINDS["wav"]
    header = read_riff_header(content, byte_order)
    if header.format_tag not in LIBSNDFILE_TAGS:
        share = min(1.0, header.remaining_bytes / header.sound_bytes) if header.sound_bytes else 1.0
        return replace(kind, uses_libsndfile=False, length_kind="doubtful", present_share=share)

    # A size of 0 before sound: the writer was interrupted. libsndfile would find no sound.
    if header.is_unfinished:
        return replace(kind, uses_libsndfile=False, length_kind="guessed")
    if header.sound_bytes is None or not header.frame_bytes:
        return kind
    return replace(kind, declared_frames=header.sound_bytes // header.frame_bytes)


def is_transport_stream(head: bytes) -> bool:
    """Whether packets of MPEG-TS begin in the head: at its first byte, or somewhat later in a stream that was cut."""
    for begin, packet_bytes in ((0, 188), (4, 192)):
        if head[begin : begin + packet_bytes + 1 : packet_bytes] == TS_SYNC * 2:
            return True

    # Later, more packets are needed.
    for packet_bytes in TS_PACKET_BYTES:
        begin = head.find(TS_SYNC, 0, packet_bytes)
        while begin >= 0:
            if head[begin : begin + 4 * packet_bytes + 1 : packet_bytes] == TS_SYNC * 5:
                return True
            begin = head.find(TS_SYNC, begin + 1, packet_bytes)
    return False


def is_latm_stream(head: bytes) -> bool:
    """Whether the head begins with three frames of AAC in LATM."""
    position = 0
    for _ in range(3):
        if len(head) < position + 3 or head[position] != 0x56 or head[position + 1] & 0xE0 != 0xE0:
            return False
        position += 3 + ((head[position + 1] & 0x1F) << 8 | head[position + 2])
    return True


def window_from(file: ReadableFile, begin: int) -> ByteWindow:
    """The bytes of an open file from `begin` on, as a file."""
    if isinstance(file, ByteWindow):
        return file.tail(begin)
    return ByteWindow(file.fileno(), begin, max(0, file.seek(0, SEEK_END) - begin))


def describe_unknown_head(head: bytes) -> str:
    """Describe the first bytes of a file without a known signature, in a few words."""
    if not head:
        return "is empty"
    start = head[:40]
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return f"is text (begins {start.decode('ascii')!r})"
    return f"begins with the bytes {head[:8].hex(' ')}"
