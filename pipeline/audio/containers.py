"""Container: what a file is by its first bytes, whatever it is called, and what its header says of its length."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import SEEK_END
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from pipeline.audio.byte_window import ByteWindow
from pipeline.audio.sources import SoundInput
from pipeline.errors import AudioError

ReadableFile = BinaryIO | ByteWindow

HEAD_BYTES = 4096

UNKNOWN_WAV_BYTES = (
    0x7FFF_F000  # a wav size from here up was never filled in: sox writes this, ffmpeg 2^32 - 1
)

UNKNOWN_W64_BYTES = 2**42  # the same of a w64 (FFmpeg writes 2^63 - 1); ext4 cannot even seek beyond 2^44

MAX_RIFF_CHUNKS = 1000  # a file of zeros would go on for ever

LIBSNDFILE_TAGS = (1, 3, 6, 7, 0xFFFE)  # PCM, float, A-law, mu-law, extensible; ADPCM and mp3 in wav: PyAV


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioContainer:
    """One kind of file, and what its header states.

    demuxer FFmpeg's name of it, given outright: probing could take a text for a playlist and follow its links
    length  what FFmpeg's duration is: declared by the header, found at the end of what is there (so it cannot
            show that anything is missing), or guessed from the bit rate (so it means nothing)
    """

    suffixes: tuple[str, ...]
    demuxer: str
    uses_libsndfile: bool = False  # decode with libsndfile instead
    is_seekable: bool = False  # has time stamps to find a second by, without decoding what lies before
    length_kind: Literal["declared", "found", "guessed"] = "declared"
    declared_frames: int | None = None  # where the decoder would hide it

    def is_misnamed(self, name: str) -> bool:
        """True where the extension names another kind of file; an unknown one or none names nothing."""
        return Path(name).suffix.lower() in CONTAINER_SUFFIXES - set(self.suffixes)


CONTAINER_KINDS = {
    "wav": AudioContainer(suffixes=(".wav", ".wave"), demuxer="wav", uses_libsndfile=True),
    "flac": AudioContainer(suffixes=(".flac",), demuxer="flac", uses_libsndfile=True),
    "mp3": AudioContainer(suffixes=(".mp3", ".mp2"), demuxer="mp3"),
    "aac": AudioContainer(suffixes=(".aac",), demuxer="aac", length_kind="guessed"),
    "ogg": AudioContainer(
        suffixes=(".ogg", ".oga", ".opus", ".spx", ".ogv"),
        demuxer="ogg",
        length_kind="found",
        is_seekable=True,
    ),
    "mp4": AudioContainer(
        suffixes=(".m4a", ".mp4", ".m4v", ".m4b", ".mov", ".3gp", ".3g2"), demuxer="mov", is_seekable=True
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
    "mpegts": AudioContainer(suffixes=(".ts",), demuxer="mpegts", length_kind="found"),
    "mpeg": AudioContainer(suffixes=(".mpg", ".mpeg"), demuxer="mpeg", length_kind="found"),
    "amr": AudioContainer(suffixes=(".amr",), demuxer="amr", length_kind="guessed"),
    "ac3": AudioContainer(suffixes=(".ac3",), demuxer="ac3", length_kind="guessed"),
    "wavpack": AudioContainer(suffixes=(".wv",), demuxer="wv"),
}

CONTAINER_SUFFIXES = {suffix for kind in CONTAINER_KINDS.values() for suffix in kind.suffixes}

CONTAINER_SIGNATURES = (  # offset, bytes, kind
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
)


def recognise_container(sound: SoundInput) -> AudioContainer:
    """The container of a sound; AudioError missing where there is none, unreadable where it is no known one."""
    try:
        with open_from_start(sound) as file:
            head, tagged = read_after_tags(file)
            container = match_signature(head, file) or (mp3_container(head) if tagged and head else None)
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise AudioError(reason, f"cannot be read ({error.strerror})") from None
    if container is None:
        raise AudioError("unreadable", f"{describe_unknown_head(head)}, no known audio; fetch it again")
    return container


@contextmanager
def open_from_start(sound: SoundInput) -> Iterator[ReadableFile]:
    """The sound from its first byte on, with a place of its own: a sound may be open twice at a time."""
    if isinstance(sound, Path):
        if not sound.is_file():
            raise AudioError("missing", f"{describe_absence(sound)}; fetch it, or correct its path")
        with sound.open("rb") as file:
            yield file
    else:
        yield (
            sound.duplicate()
            if isinstance(sound, ByteWindow)
            else ByteWindow(sound.getbuffer(), 0, sound.getbuffer().nbytes)
        )


def describe_absence(path: Path) -> str:
    """Why there is no file at a path."""
    if path.is_symlink():
        return f"a link to {str(path.readlink())!a}, where there is no file"
    return "a folder, not a file" if path.is_dir() else "no such file"


def read_after_tags(file: ReadableFile) -> tuple[bytes, bool]:
    """The first bytes after ID3 tags (pictures may make them megabytes long), and whether there was one."""
    position, head = 0, file.read(HEAD_BYTES)
    while head[:3] == b"ID3" and len(head) >= 10:
        size = (head[6] & 127) << 21 | (head[7] & 127) << 14 | (head[8] & 127) << 7 | head[9] & 127
        position += 10 + size
        file.seek(position)
        head = file.read(HEAD_BYTES)
    return head, position > 0


def match_signature(head: bytes, file: ReadableFile) -> AudioContainer | None:
    """The kind by signature, completed from its header."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return wav_container(file, ">" if head[:4] == b"RIFX" else "<")
    for offset, signature, name in CONTAINER_SIGNATURES:
        if head.startswith(signature, offset):
            if name in ("w64", "caf"):
                return replace(
                    CONTAINER_KINDS[name],
                    declared_frames=read_w64_frames(file) if name == "w64" else read_caf_frames(file),
                )
            return flac_container(head) if name == "flac" else CONTAINER_KINDS[name]
    if head[:1] == b"G" and head[188:189] == b"G":
        return CONTAINER_KINDS["mpegts"]
    return mpeg_audio_container(head.lstrip(b"\0"))


def flac_container(head: bytes) -> AudioContainer:
    """Encoders that write to a pipe leave the number of samples 0; libsndfile then offers 2^63 - 1."""
    samples = int.from_bytes(head[18:26]) % 2**36
    return (
        CONTAINER_KINDS["flac"]
        if samples
        else replace(CONTAINER_KINDS["flac"], uses_libsndfile=False, length_kind="guessed")
    )


def mpeg_audio_container(head: bytes) -> AudioContainer | None:
    """mp3 (or layer 2) and bare AAC begin with the same sync word; the layer bits tell them apart."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    layer = head[1] >> 1 & 3
    if layer == 0:
        return CONTAINER_KINDS["aac"] if head[1] & 0xF0 == 0xF0 else None
    if layer == 3 or head[2] >> 4 == 15 or head[2] >> 2 & 3 == 3:
        return None
    return mp3_container(head)


def mp3_container(head: bytes) -> AudioContainer:
    """An mp3 states its length in a Xing, Info or VBRI frame, or not at all."""
    stated = any(name in head for name in (b"Xing", b"Info", b"VBRI"))
    return CONTAINER_KINDS["mp3"] if stated else replace(CONTAINER_KINDS["mp3"], length_kind="guessed")


def wav_container(file: ReadableFile, byte_order: str) -> AudioContainer:
    """A wav with the frames its header declares: libsndfile only tells how many there are."""
    header = read_riff_header(file, byte_order)
    if header.format_tag not in LIBSNDFILE_TAGS:
        return replace(CONTAINER_KINDS["wav"], uses_libsndfile=False)
    if header.sound_bytes == 0 and header.remaining_bytes:  # the writer died; libsndfile would see no sound
        return replace(CONTAINER_KINDS["wav"], uses_libsndfile=False, length_kind="guessed")
    if header.sound_bytes is None or not header.frame_bytes:
        return CONTAINER_KINDS["wav"]
    return replace(CONTAINER_KINDS["wav"], declared_frames=header.sound_bytes // header.frame_bytes)


class RiffHeader(NamedTuple):
    """`sound_bytes` as declared, None where the header does not know; `rest_bytes` are there from `data` on."""

    format_tag: int = 1
    frame_bytes: int = 0
    sound_bytes: int | None = None
    remaining_bytes: int = 0


def read_riff_header(file: ReadableFile, byte_order: str) -> RiffHeader:
    """Walk the chunks of a wav up to the sound."""
    found = RiffHeader()
    position = 12
    for _ in range(MAX_RIFF_CHUNKS):
        file.seek(position)
        chunk = file.read(24)
        if len(chunk) < 8:
            break
        name, size = struct.unpack_from(f"{byte_order}4sI", chunk)
        if name == b"data":
            rest_bytes = file.seek(0, SEEK_END) - position - 8
            known = size if size < UNKNOWN_WAV_BYTES else found.sound_bytes
            return found._replace(sound_bytes=known, remaining_bytes=rest_bytes)
        if name == b"fmt " and len(chunk) == 24:
            tag, frame_bytes = struct.unpack_from(f"{byte_order}H10xH", chunk, 8)
            found = found._replace(format_tag=tag, frame_bytes=frame_bytes)
        if name == b"ds64" and len(chunk) == 24:  # the 64-bit size of an RF64
            found = found._replace(sound_bytes=struct.unpack_from(f"{byte_order}8xQ", chunk, 8)[0])
        position += 8 + size + size % 2
    return found._replace(sound_bytes=None)


def read_w64_frames(file: ReadableFile) -> int | None:
    """The frames that a w64 declares; FFmpeg tells only how many are there. Chunks are named by 16 bytes."""
    position, frame_bytes = 40, 0
    for _ in range(MAX_RIFF_CHUNKS):
        file.seek(position)
        chunk = file.read(40)
        if len(chunk) < 40:
            break
        size = int.from_bytes(chunk[16:24], "little")
        if chunk[:4] == b"data":
            return (size - 24) // frame_bytes if frame_bytes and 24 <= size < UNKNOWN_W64_BYTES else None
        if chunk[:4] == b"fmt ":
            frame_bytes = int.from_bytes(chunk[36:38], "little")
        position = min(position + max(24, size + -size % 8), UNKNOWN_W64_BYTES)
    return None


def read_caf_frames(file: ReadableFile) -> int | None:
    """The frames that a caf of constant packets declares; FFmpeg tells only how many are there."""
    position, packet_bytes, packet_frames = 8, 0, 0
    for _ in range(MAX_RIFF_CHUNKS):
        file.seek(position)
        chunk = file.read(36)
        if len(chunk) < 12:
            break
        size = int.from_bytes(chunk[4:12], signed=True)
        if chunk[:4] == b"data":  # begins with 4 bytes that are no sound; -1: up to the end of the file
            return (size - 4) // packet_bytes * packet_frames if packet_bytes and size >= 4 else None
        if chunk[:4] == b"desc" and len(chunk) == 36:
            packet_bytes, packet_frames = struct.unpack(">II", chunk[28:36])
        position = min(position + 12 + max(0, size), UNKNOWN_W64_BYTES)
    return None


def describe_unknown_head(head: bytes) -> str:
    """What a file without a known signature looks like to a human."""
    if not head:
        return "is empty"
    start = head[:40]
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return f"is text (begins {start.decode('ascii')!r})"
    return f"begins with the bytes {head[:8].hex(' ')}"
