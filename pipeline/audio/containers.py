"""Containers: the kind of a sound file, recognised by its first bytes, and the length that its header declares."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import SEEK_END
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from pipeline.audio.byte_window import ByteWindow, SoundInput
from pipeline.errors import AudioError

ReadableFile = BinaryIO | ByteWindow

HEAD_BYTES = 4096  # read from the start of a file to recognise its container

# A wav whose size is this or more was never finished: sox writes this size, FFmpeg writes 2^32 - 1.
UNKNOWN_WAV_BYTES = 0x7FFF_F000

# Likewise for w64, where FFmpeg writes 2^63 - 1; on ext4 no seek leads beyond 2^44.
UNKNOWN_W64_BYTES = 2**42

MAX_RIFF_CHUNKS = 1000  # stops the walk through a file of zeros, whose chunks never end

# Format tags of wav that libsndfile decodes: PCM, float, A-law, mu-law, extensible. ADPCM and mp3 are left to FFmpeg.
LIBSNDFILE_TAGS = (1, 3, 6, 7, 0xFFFE)


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioContainer:
    """One kind of sound file, with the facts that the header of a file states.

    demuxer          FFmpeg's name of the kind. FFmpeg is not left to probe: it could take a text for a playlist and
                     follow its links
    uses_libsndfile  True: libsndfile decodes the file; False: FFmpeg
    is_seekable      True: the file has time stamps, so a second is found without decoding the sound before it
    length_kind      source of FFmpeg's duration. declared: the header; found: the end of the file, so that a missing
                     end is not noticed; guessed: the bit rate, so that the duration is useless
    declared_frames  samples per channel that the header declares; None: unknown, or reported by the decoder anyway
    """

    suffixes: tuple[str, ...]
    demuxer: str
    uses_libsndfile: bool = False
    is_seekable: bool = False
    length_kind: Literal["declared", "found", "guessed"] = "declared"
    declared_frames: int | None = None

    def is_misnamed(self, name: str) -> bool:
        """Whether the extension of `name` belongs to another kind; an unknown extension belongs to none."""
        return Path(name).suffix.lower() in CONTAINER_SUFFIXES - set(self.suffixes)


CONTAINER_KINDS = {
    "wav": AudioContainer(suffixes=(".wav", ".wave", ".bwf", ".rf64"), demuxer="wav", uses_libsndfile=True),
    "flac": AudioContainer(suffixes=(".flac",), demuxer="flac", uses_libsndfile=True),
    "mp3": AudioContainer(suffixes=(".mp3", ".mp2", ".mpga"), demuxer="mp3"),
    "aac": AudioContainer(suffixes=(".aac", ".adts"), demuxer="aac", length_kind="guessed"),
    "ogg": AudioContainer(
        suffixes=(".ogg", ".oga", ".opus", ".spx", ".ogv", ".ogx"),
        demuxer="ogg",
        length_kind="found",
        is_seekable=True,
    ),
    "mp4": AudioContainer(
        suffixes=(".m4a", ".mp4", ".m4v", ".m4b", ".m4r", ".mov", ".qt", ".f4v", ".3gp", ".3g2"),
        demuxer="mov",
        is_seekable=True,
    ),
    "matroska": AudioContainer(
        suffixes=(".webm", ".mkv", ".mka", ".weba"), demuxer="matroska", is_seekable=True
    ),
    "aiff": AudioContainer(suffixes=(".aiff", ".aif", ".aifc"), demuxer="aiff"),
    "au": AudioContainer(suffixes=(".au", ".snd"), demuxer="au"),
    "caf": AudioContainer(suffixes=(".caf",), demuxer="caf"),
    "w64": AudioContainer(suffixes=(".w64",), demuxer="w64"),
    "avi": AudioContainer(suffixes=(".avi",), demuxer="avi"),
    "asf": AudioContainer(suffixes=(".wma", ".wmv", ".asf"), demuxer="asf"),
    "flv": AudioContainer(suffixes=(".flv",), demuxer="flv"),
    "mpegts": AudioContainer(suffixes=(".ts", ".mts", ".m2ts"), demuxer="mpegts", length_kind="found"),
    "mpeg": AudioContainer(suffixes=(".mpg", ".mpeg", ".vob"), demuxer="mpeg", length_kind="found"),
    "amr": AudioContainer(suffixes=(".amr", ".awb"), demuxer="amr", length_kind="guessed"),
    "ac3": AudioContainer(suffixes=(".ac3",), demuxer="ac3", length_kind="guessed"),
    "wavpack": AudioContainer(suffixes=(".wv",), demuxer="wv"),
    "tta": AudioContainer(suffixes=(".tta",), demuxer="tta"),
    "nist": AudioContainer(suffixes=(".sph", ".nist"), demuxer="nistsphere"),
    "voc": AudioContainer(suffixes=(".voc",), demuxer="voc", length_kind="guessed"),
    "ircam": AudioContainer(suffixes=(".sf", ".ircam"), demuxer="ircam", length_kind="guessed"),
}

CONTAINER_SUFFIXES = {suffix for kind in CONTAINER_KINDS.values() for suffix in kind.suffixes}

# Offset, bytes at this offset, kind.
CONTAINER_SIGNATURES = (
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (4, b"ftyp", "mp4"),
    (4, b"moov", "mp4"),
    (4, b"mdat", "mp4"),
    (4, b"wide", "mp4"),
    (4, b"free", "mp4"),
    (8, b"AIFF", "aiff"),
    (8, b"AIFC", "aiff"),
    (8, b"AVI ", "avi"),
    (0, b".snd", "au"),
    (0, b"caff", "caf"),
    (0, b"riff\x2e\x91\xcf\x11", "w64"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "asf"),
    (0, b"FLV\x01", "flv"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
    (0, b"#!AMR", "amr"),
    (0, b"\x0bw", "ac3"),
    (0, b"wvpk", "wavpack"),
    (0, b"TTA1", "tta"),
    (0, b"NIST_1A\n", "nist"),
    (0, b"Creative Voice File\x1a", "voc"),
    *((0, bytes((0x64, 0xA3, machine, 0)), "ircam") for machine in (1, 2, 3, 4)),
    *((0, bytes((0, machine, 0xA3, 0x64)), "ircam") for machine in (1, 2, 3, 4)),
)


def recognise_container(sound: SoundInput) -> AudioContainer:
    """The container of a sound. AudioError: missing if there is no file, unreadable if its kind is unknown."""
    try:
        with open_from_start(sound) as file:
            head, has_tag = read_after_tags(file)
            container = match_signature(head, file)
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise AudioError(reason, f"cannot be read ({error.strerror})") from None

    # Only mp3 files begin with an ID3 tag, so damage after the tag does not hide the kind.
    if container is None and has_tag and head:
        container = mp3_container(head)
    if container is None:
        raise AudioError("unreadable", f"{describe_unknown_head(head)}, no known audio; fetch it again")
    return container


@contextmanager
def open_from_start(sound: SoundInput) -> Iterator[ReadableFile]:
    """Open the sound at its first byte, with a position of its own: a sound may be open twice at the same time."""
    if isinstance(sound, Path):
        if not sound.is_file():
            raise AudioError("missing", f"{describe_absence(sound)}; fetch it, or correct its path")
        with sound.open("rb") as file:
            yield file
    elif isinstance(sound, ByteWindow):
        yield sound.duplicate()
    else:
        buffer = sound.getbuffer()
        yield ByteWindow(buffer, 0, buffer.nbytes)


def describe_absence(path: Path) -> str:
    """Why there is no file at a path, in a few words."""
    if path.is_symlink():
        return f"a link to {str(path.readlink())!a}, where there is no file"
    if path.is_dir():
        return "a folder, not a file"
    return "no such file"


def read_after_tags(file: ReadableFile) -> tuple[bytes, bool]:
    """The first bytes after ID3 tags (pictures may make them megabytes long), and whether there was a tag."""
    position = 0
    head = file.read(HEAD_BYTES)
    while head[:3] == b"ID3" and len(head) >= 10:
        # The size of a tag: four bytes of seven bits each, without the ten bytes of its header.
        size = (head[6] & 127) << 21 | (head[7] & 127) << 14 | (head[8] & 127) << 7 | head[9] & 127
        position += 10 + size
        file.seek(position)
        head = file.read(HEAD_BYTES)
    return head, position > 0


def match_signature(head: bytes, file: ReadableFile) -> AudioContainer | None:
    """The container that the signature names, with the facts of its header; None if no signature fits."""
    # A wav comes in four variants; RIFX is big-endian.
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return wav_container(file, ">" if head[:4] == b"RIFX" else "<")

    # Kinds with a signature of their own; some headers also declare a length.
    for offset, signature, name in CONTAINER_SIGNATURES:
        if head.startswith(signature, offset):
            kind = CONTAINER_KINDS[name]
            if name == "w64":
                return replace(kind, declared_frames=read_w64_frames(file))
            if name == "caf":
                return replace(kind, declared_frames=read_caf_frames(file))
            if name == "flac":
                return flac_container(head)
            return kind

    # MPEG-TS has packets of 188 bytes, each with the same first byte; cameras write a time of four bytes before each.
    for begin, packet_bytes in ((0, 188), (4, 192)):
        if head[begin : begin + 1] == head[begin + packet_bytes :][:1] == b"G":
            return CONTAINER_KINDS["mpegts"]

    # An mp3 or AAC may begin with zeros.
    return mpeg_audio_container(head.lstrip(b"\0"))


def flac_container(head: bytes) -> AudioContainer:
    """A flac; FFmpeg decodes it if its header states no length.

    Encoders that write to a pipe leave the number of samples at 0, which libsndfile reports as 2^63 - 1.
    """
    samples = int.from_bytes(head[18:26]) % 2**36
    if samples:
        return CONTAINER_KINDS["flac"]
    return replace(CONTAINER_KINDS["flac"], uses_libsndfile=False, length_kind="guessed")


def mpeg_audio_container(head: bytes) -> AudioContainer | None:
    """An mp3 (or layer 2) or bare AAC; None if it is neither."""
    # Both begin with the same eleven bits.
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None

    # The layer distinguishes them. For mp3, some values of layer, bit rate and sampling rate are not defined.
    layer = head[1] >> 1 & 3
    if layer == 0:
        return CONTAINER_KINDS["aac"] if head[1] & 0xF0 == 0xF0 else None
    if layer == 3 or head[2] >> 4 == 15 or head[2] >> 2 & 3 == 3:
        return None
    return mp3_container(head)


def mp3_container(head: bytes) -> AudioContainer:
    """An mp3, whose length is stated in a Xing, Info or VBRI frame, or guessed."""
    if any(name in head for name in (b"Xing", b"Info", b"VBRI")):
        return CONTAINER_KINDS["mp3"]
    return replace(CONTAINER_KINDS["mp3"], length_kind="guessed")


def wav_container(file: ReadableFile, byte_order: str) -> AudioContainer:
    """A wav with the frames that its header declares: libsndfile only reports the frames that are present."""
    header = read_riff_header(file, byte_order)
    if header.format_tag not in LIBSNDFILE_TAGS:
        return replace(CONTAINER_KINDS["wav"], uses_libsndfile=False)

    # A size of 0 before sound: the writer was interrupted. libsndfile would find no sound.
    if header.sound_bytes == 0 and header.remaining_bytes:
        return replace(CONTAINER_KINDS["wav"], uses_libsndfile=False, length_kind="guessed")
    if header.sound_bytes is None or not header.frame_bytes:
        return CONTAINER_KINDS["wav"]
    return replace(CONTAINER_KINDS["wav"], declared_frames=header.sound_bytes // header.frame_bytes)


class RiffHeader(NamedTuple):
    """The facts that the header of a wav states; a frame is one sample of every channel."""

    format_tag: int = 1
    frame_bytes: int = 0
    sound_bytes: int | None = None  # as declared; None if the header does not declare it
    remaining_bytes: int = 0  # from the start of the sound to the end of the file


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
            tag, frame_bytes = struct.unpack_from(f"{byte_order}H10xH", chunk, 8)
            header = header._replace(format_tag=tag, frame_bytes=frame_bytes)
        if name == b"ds64" and len(chunk) == 24:
            (sound_bytes,) = struct.unpack_from(f"{byte_order}8xQ", chunk, 8)
            header = header._replace(sound_bytes=sound_bytes)

        # Chunks begin at even bytes.
        position += 8 + size + size % 2
    return header._replace(sound_bytes=None)


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


def describe_unknown_head(head: bytes) -> str:
    """Describe the first bytes of a file without a known signature, in a few words."""
    if not head:
        return "is empty"
    start = head[:40]
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return f"is text (begins {start.decode('ascii')!r})"
    return f"begins with the bytes {head[:8].hex(' ')}"
