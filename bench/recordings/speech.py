"""Speech: vowels and consonants by speaker, tones and rhymes by syllable, speakers by word."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from bench.recordings.banks import read_diphones
from bench.recordings.sounds import Roots, Sound, encode, sound_files

# Speech sounds, by speaker: diphones of Festival's voices.

ENGLISH = {"aa": "a", "eh": "e", "iy": "i", "ao": "o", "uw": "u"}
ITALIAN = {phone: phone[0] for phone in ("a", "a1", "e", "e1", "i", "i1", "o", "o1", "u", "u1")}
FINNISH = {phone: phone[0] for phone in ("a", "a:", "e", "e:", "i", "i:", "o", "o:", "u", "u:")}
CZECH = FINNISH

VOWEL_VOICES = {
    "festvox-kallpc16k": ENGLISH,
    "festvox-kdlpc16k": ENGLISH,
    "festvox-italp16k": ITALIAN,
    "festvox-itapc16k": ITALIAN,
    "festvox-suopuhe-lj": FINNISH,
    "festvox-suopuhe-mv": FINNISH,
}
CZECH_VOICES = ("festvox-czech-dita", "festvox-czech-krb", "festvox-czech-machac", "festvox-czech-ph")
CONSONANTS = (*"bdfghjklmnprstvz", "ch", "n~", "s~", "z~")


def find_vowels(roots: Roots) -> Iterator[Sound]:
    """A vowel between two equal consonants, joined from the diphones into it and out of it."""
    for package, vowels in VOWEL_VOICES.items():
        for (left, middle), wave_S, rate_hz in joined_diphones(roots(package), around=vowels):
            yield Sound(
                name=f"{package}/{left}-{middle}.wav".replace(":", "_"),
                label=vowels[middle],
                source=package,
                package=package,
                data=encode(wave_S, rate_hz),
            )


def find_consonants(roots: Roots) -> Iterator[Sound]:
    """A consonant between two equal vowels, joined from the diphones into it and out of it."""
    for package in CZECH_VOICES:
        for (left, middle), wave_S, rate_hz in joined_diphones(roots(package), around=CONSONANTS, of=CZECH):
            yield Sound(
                name=f"{package}/{left}-{middle}.wav".replace(":", "_"),
                label=middle,
                source=package,
                package=package,
                data=encode(wave_S, rate_hz),
            )


def joined_diphones(
    root: Path, *, around: Collection[str], of: Collection[str] | None = None
) -> Iterator[tuple[tuple[str, str], np.ndarray, int]]:
    """Yield `outer, middle`, wave and rate of `outer-middle` + `middle-outer`; outer is in `of`, or not in `around`."""

    def is_outer(phone: str) -> bool:
        return phone in of if of is not None else phone not in around

    def wanted(left: str, right: str) -> bool:
        return (left in around and is_outer(right)) or (right in around and is_outer(left))

    diphones, rate_hz = read_diphones(next(root.rglob("*.group")), wanted)
    for (outer, middle), into_S in sorted(diphones.items()):
        if middle in around and is_outer(outer) and (middle, outer) in diphones:
            yield (outer, middle), np.concatenate([into_S, diphones[middle, outer]]), rate_hz


# Mandarin syllables of two speakers, in folders named in bopomofo with the tone. From one speaker to the other nothing
# carries over (statistics and random encoders are at chance), so both are in both splits, with other syllables.

INITIALS = "ㄅㄆㄇㄈㄉㄊㄋㄌㄍㄎㄏㄐㄑㄒㄓㄔㄕㄖㄗㄘㄙ"


def mandarin_sounds(roots: Roots) -> Iterator[tuple[str, str, str, Path]]:
    """Yield initial, final, tone and file of each syllable; the first tone has no mark, the light one is left out."""
    for path in sound_files(roots("gcin-voice") / "usr/share/gcin-voice/ogg"):
        syllable, tone = re.fullmatch(r"(\D+)(\d?)", path.parent.name).groups()  # type: ignore[union-attr]
        final = syllable.lstrip(INITIALS)
        if tone != "1" and final:
            yield syllable.removesuffix(final), final, tone or "1", path


def find_tones(roots: Roots) -> Iterator[Sound]:
    for initial, final, tone, path in mandarin_sounds(roots):
        yield mandarin_sound(path, label=f"tone {tone}", source=initial + final)


def find_rhymes(roots: Roots) -> Iterator[Sound]:
    for initial, final, _, path in mandarin_sounds(roots):
        yield mandarin_sound(path, label=final, source=initial)


def mandarin_sound(path: Path, *, label: str, source: str) -> Sound:
    return Sound(
        name=f"{path.parent.name}/{path.name}",
        label=label,
        source=source,
        package="gcin-voice",
        data=path.read_bytes(),
    )


# Voices: who speaks, across words.


def find_voices(roots: Roots) -> Iterator[Sound]:
    for path in sound_files(roots("hedgewars-data") / "usr/share/games/hedgewars/Data/Sounds/voices"):
        yield Sound(
            name=f"{path.parent.name}/{path.name}",
            label=path.parent.name,
            source=path.stem,
            package="hedgewars-data",
            data=path.read_bytes(),
        )
