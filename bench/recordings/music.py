"""Drum hits by kit, and notes of instruments by sound bank."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from bench.recordings.banks import DRUM_BANK, Note, read_soundfont
from bench.recordings.sounds import Roots, Sound, encode, first_match, sound_files

# Drums, by kit.

DRUM_LABELS = {
    "rim": r"rim|side ?stick|stick|rs_",
    "hat": r"hat|hh|^ho_",
    "kick": r"kick|bass ?drum|\bbd|^k_",
    "snare": r"snare|snr|\bsn|sd_|sr_",
    "tom": r"tom|\btm|^t\d_|^ft_",
    "cymbal": r"crash|ride|splash|china|cymbal|\brd|^cc_|^rc_",
    "clap": r"clap",
    "bell": r"bell|agogo|\bcb|\bbl",
}


def find_drums(roots: Roots) -> Iterator[Sound]:
    """Drum hits; what a kit calls an instrument decides, and else the name of the file."""
    for package in ("hydrogen-data", "hydrogen-drumkits"):
        for kit in sorted((roots(package) / "usr/share/hydrogen/data/drumkits").iterdir()):
            for instrument in ElementTree.parse(kit / "drumkit.xml").iter():
                if instrument.tag.rpartition("}")[2] != "instrument":
                    continue
                texts = [(part.tag.rpartition("}")[2], part.text or "") for part in instrument.iter()]
                names = [text for tag, text in texts if tag == "name"]
                for file in [text for tag, text in texts if tag == "filename"]:
                    label = first_match(DRUM_LABELS, names[0]) or first_match(DRUM_LABELS, Path(file).stem)
                    if label and (kit / file).is_file():
                        yield Sound(
                            name=f"{kit.name}/{file}",
                            label=label,
                            source=kit.name,
                            package=package,
                            data=(kit / file).read_bytes(),
                        )
    for path in sound_files(roots("lmms-common") / "usr/share/lmms/samples/drums"):
        if label := first_match(DRUM_LABELS, path.stem):
            yield Sound(
                name=f"lmms/{path.name}",
                label=label,
                source="lmms",
                package="lmms-common",
                data=path.read_bytes(),
            )


# Programs of General MIDI (from 0) that sound alike.
INSTRUMENTS = {
    "piano": range(0, 4),
    "mallets": range(9, 14),
    "organ": range(16, 21),
    "guitar": range(24, 29),
    "bass": range(32, 36),
    "bowed": (*range(40, 45), 48, 49),
    "brass": range(56, 61),
    "reed": range(64, 72),
    "flute": range(72, 80),
}
BANKS = ("fluid-soundfont-gm", "csound-soundfont", "timgm6mb-soundfont")


def find_notes(roots: Roots, package: str) -> Iterator[tuple[str, str, Note]]:
    """Yield the name, the instrument and the note of the bank's samples of one of the instruments."""
    for number, note in enumerate(read_soundfont(next(roots(package).rglob("*.sf2")))):
        for instrument, programs in INSTRUMENTS.items():
            if note.program in programs:
                yield f"{package}/{number:04}.wav", instrument, note


def find_instruments(roots: Roots) -> Iterator[Sound]:
    for package in BANKS:
        for name, instrument, note in find_notes(roots, package):
            data = encode(note.wave_S, note.rate_hz)
            yield Sound(name=name, label=instrument, source=package, package=package, data=data)


def find_octaves(roots: Roots) -> Iterator[Sound]:
    package = BANKS[0]
    for name, instrument, note in find_notes(roots, package):
        yield Sound(
            name=name,
            label=f"octave {note.key // 12 - 1}",
            source=instrument,
            package=package,
            data=encode(note.wave_S, note.rate_hz),
        )


# Keys of General MIDI's drum kits.
PERCUSSION = {
    "kick": (35, 36),
    "snare": (38, 40),
    "hat": (42, 44, 46),
    "tom": (41, 43, 45, 47, 48, 50),
    "cymbal": (49, 51, 52, 53, 55, 57, 59),
    "clap": (39,),
    "skin": range(60, 67),  # bongos, congas, timbales
    "metal": (54, 56, 67, 68, 80, 81),  # tambourine, cowbell, agogos, triangles
    "wood": (37, 75, 76, 77),  # side stick, claves, blocks
    "shaken": (58, 69, 70, 82, 73, 74),
}


def find_percussion(roots: Roots) -> Iterator[Sound]:
    for package in BANKS:
        for number, note in enumerate(read_soundfont(next(roots(package).rglob("*.sf2")), DRUM_BANK)):
            for label, keys in PERCUSSION.items():
                if note.key in keys:
                    yield Sound(
                        name=f"{package}/drum{number:04}.wav",
                        label=label,
                        source=package,
                        package=package,
                        data=encode(note.wave_S, note.rate_hz),
                    )
