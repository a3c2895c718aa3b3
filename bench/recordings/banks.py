"""Readers of recordings that lie in banks: SoundFonts, Festival's diphone groups, Qt resources, zip archives.

libsndfile and FFmpeg open none of these. Waves come back as float32 in -1 to 1, with their rate.
"""

import io
import itertools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

SUSTAIN_SECONDS = 1.5  # a looped note is played for so long

# Operators of a SoundFont's generators (SoundFont 2.04, section 8.1.2).
INSTRUMENT, KEY_RANGE, SEMITONES, CENTS, SAMPLE_ID, LOOP_MODE, ROOT_KEY = 41, 43, 51, 52, 53, 54, 58
MIDDLE_C = 60
RIGHT_CHANNEL = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """One recorded note of a SoundFont: `program` as in General MIDI (0 to 127), `key` 60 is middle C."""

    program: int
    key: int
    name: str
    wave_S: np.ndarray
    rate_hz: int


MELODIC_BANK, DRUM_BANK = 0, 128


def read_soundfont(path: Path, bank: int = MELODIC_BANK) -> Iterator[Note]:
    """Yield each sample of a bank's presets once, of a stereo pair the left one.

    It plays the key of its range next to middle C: in many banks a sample's own rate gives another pitch.
    """
    chunks = _soundfont_chunks(path.read_bytes())
    samples_S = np.frombuffer(chunks[b"smpl"], "<i2")
    headers = list(struct.iter_unpack("<20s5IBbHH", chunks[b"shdr"]))
    presets = list(struct.iter_unpack("<20s3H3I", chunks[b"phdr"]))
    instruments = list(struct.iter_unpack("<20sH", chunks[b"inst"]))

    seen = set()
    for (_, program, its_bank, first, *_), (_, _, _, last, *_) in itertools.pairwise(presets):
        if its_bank != bank:
            continue
        for preset_zone in _zones(chunks, b"pbag", b"pgen", first, last):
            if INSTRUMENT not in preset_zone:
                continue
            (_, begin), (_, end) = instruments[preset_zone[INSTRUMENT] :][:2]
            for zone in _zones(chunks, b"ibag", b"igen", begin, end):
                number = zone.get(SAMPLE_ID)
                if number is None or number in seen:
                    continue
                seen.add(number)
                name, start, stop, loop_start, loop_stop, rate_hz, pitch, _, _, kind = headers[number]
                if kind == RIGHT_CHANNEL or stop <= start:
                    continue
                wave_S = samples_S[start:stop].astype(np.float32) / 32_768
                high, low = divmod(zone.get(KEY_RANGE, 127 << 8), 256)
                key = min(max(MIDDLE_C, low), high)
                semitones = key - zone.get(ROOT_KEY, pitch) + _signed(zone.get(SEMITONES, 0))
                played_hz = round(rate_hz * 2 ** ((semitones + _signed(zone.get(CENTS, 0)) / 100) / 12))
                if zone.get(LOOP_MODE, 0) & 1:
                    wave_S = _sustain(wave_S, loop_start - start, loop_stop - start, played_hz)
                yield Note(
                    program=program,
                    key=key,
                    name=name.split(b"\0")[0].decode("latin-1").strip(),
                    wave_S=wave_S,
                    rate_hz=played_hz,
                )


def _soundfont_chunks(data: bytes) -> dict[bytes, bytes]:
    """The chunks of all three lists of a SoundFont by name."""
    chunks, at = {}, 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"LIST":
            at += 12  # its chunks follow
            continue
        chunks[name] = data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    return chunks


def _zones(
    chunks: dict[bytes, bytes], bags: bytes, generators: bytes, first: int, last: int
) -> Iterator[dict[int, int]]:
    """Yield the generators of zones `first` to `last`, those of a leading global zone included."""
    general: dict[int, int] = {}
    for zone in range(first, last):
        begin, _, end, _ = struct.unpack_from("<4H", chunks[bags], 4 * zone)
        mine = dict(struct.iter_unpack("<2H", chunks[generators][4 * begin : 4 * end]))
        if zone == first and not {INSTRUMENT, SAMPLE_ID} & mine.keys():
            general = mine
        yield general | mine


def _signed(amount: int) -> int:
    return amount - 65_536 if amount >= 32_768 else amount


def _sustain(wave_S: np.ndarray, loop_start: int, loop_stop: int, rate_hz: int) -> np.ndarray:
    """Repeat the loop until the note lasts; a loop outside the wave changes nothing."""
    samples = int(SUSTAIN_SECONDS * rate_hz)
    if len(wave_S) >= samples or not 0 <= loop_start < loop_stop <= len(wave_S):
        return wave_S
    loop_S = wave_S[loop_start:loop_stop]
    head_S = wave_S[:loop_stop]
    turns = -(-(samples - len(head_S)) // len(loop_S))
    return np.concatenate([head_S, *[loop_S] * max(turns, 0)])[:samples]


def read_diphones(
    path: Path, is_wanted: Callable[[str, str], bool]
) -> tuple[dict[tuple[str, str], np.ndarray], int]:
    """Return a voice's wanted diphones by their two phones, and the rate in Hz; from a `.group` file.

    The file holds what linear prediction left over, and its coefficients at each pitch mark: the filter
    gives back the recording.
    """
    data = path.read_bytes()
    header, _, body = data.partition(b"EST_Header_End\n")
    entries = re.search(rb"NumEntries\s+(\d+)", header)
    if not entries:
        raise ValueError(f"{path}: no NumEntries in the header of a diphone group")
    lines = body.split(b"\n", int(entries[1]))
    units = lines.pop()

    diphones, rate_hz = {}, 0
    for line in lines:
        name, track_at, sound_at, _ = line.split()
        left, _, right = name.decode("latin-1").partition("-")
        if not is_wanted(left, right):
            continue
        residual_S, rate_hz = soundfile.read(io.BytesIO(units[int(sound_at) :]), dtype="float32")
        times_P, coefficients_PK = _read_track(units[int(track_at) : int(sound_at)])
        marks_P = np.round(times_P * rate_hz).astype(int)
        diphones[left, right] = _filter(residual_S, marks_P, coefficients_PK)
    return diphones, rate_hz


def _read_track(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Times in seconds and prediction coefficients of each pitch mark, the gain left out."""
    header, _, body = data.partition(b"EST_Header_End\n")
    fields = dict(line.split(None, 1) for line in header.splitlines() if b" " in line)
    frames, channels = int(fields[b"NumFrames"]), int(fields[b"NumChannels"])
    rows_PN = np.frombuffer(body, "<f4", frames * (channels + 2)).reshape(frames, channels + 2)
    return rows_PN[:, 0], rows_PN[:, 3:]  # time, break, gain, coefficients


def _filter(residual_S: np.ndarray, marks_P: np.ndarray, coefficients_PK: np.ndarray) -> np.ndarray:
    """Run the prediction filter; each mark's coefficients hold up to the next mark's middle."""
    order = coefficients_PK.shape[1]
    wave_S = np.zeros(len(residual_S) + order)
    owner_S = np.searchsorted((marks_P[1:] + marks_P[:-1]) // 2, np.arange(len(residual_S)), side="right")
    backward_PK = coefficients_PK[:, ::-1].astype(np.float64)
    for sample, owner in enumerate(owner_S):
        past_K = wave_S[sample : sample + order]
        wave_S[sample + order] = residual_S[sample] + backward_PK[owner] @ past_K
    return wave_S[order:].astype(np.float32)


def read_qt_resource(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each file of a compiled Qt resource that is stored uncompressed."""
    data = path.read_bytes()
    magic, version, tree, contents, names = struct.unpack_from(">4s4i", data)
    if magic != b"qres":
        raise ValueError(f"{path}: begins with {magic!r}, expected a Qt resource's qres")
    entry_bytes = 22 if version >= 2 else 14

    def walk(entry: int, folder: str) -> Iterator[tuple[str, bytes]]:
        at = tree + entry * entry_bytes
        name_at, flags = struct.unpack_from(">iH", data, at)
        letters = struct.unpack_from(">H", data, names + name_at)[0]
        name = data[names + name_at + 6 :][: 2 * letters].decode("utf-16-be") if entry else ""
        if flags & 2:
            count, first = struct.unpack_from(">2i", data, at + 6)
            for child in range(first, first + count):
                yield from walk(child, f"{folder}{name}/")
        elif not flags & 5:  # 1: zlib, 4: zstd
            begin = contents + struct.unpack_from(">i", data, at + 10)[0]
            size = struct.unpack_from(">i", data, begin)[0]
            yield folder + name, data[begin + 4 : begin + 4 + size]

    yield from walk(0, "")


def read_zip(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each file of a zip archive, such as a game's .pk3, in the order of names."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith("/"):
                yield name, archive.read(name)
