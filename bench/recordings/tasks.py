"""Probe tasks of short labelled recordings in Debian packages; split by kit, speaker, instrument, game or word.

`TASKS` lists them, `LICENCES` what each package's copyright file says of its sounds. Tasks of the group heldout are for
a last look: nothing is tuned on them. None of these packages is among those of `mixtures.py`.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.recordings.effects import GAMES, find_cries, find_effects, find_things
from bench.recordings.music import BANKS, find_drums, find_instruments, find_octaves, find_percussion
from bench.recordings.sounds import Roots, Sound
from bench.recordings.speech import (
    CZECH_VOICES,
    VOWEL_VOICES,
    find_consonants,
    find_rhymes,
    find_tones,
    find_voices,
    find_vowels,
)

LICENCES = {
    "btanks-data": "GPL with an exception",
    "bzflag-data": "LGPL-2.1 or MPL",
    "csound-soundfont": "public domain",
    "festvox-czech-dita": "GPL-2+",
    "festvox-czech-krb": "GPL-2+",
    "festvox-czech-machac": "GPL-2+",
    "festvox-czech-ph": "GPL-2+",
    "festvox-italp16k": "GPL-2+",
    "festvox-itapc16k": "GPL-2+",
    "festvox-kallpc16k": "free to use and distribute (as X11)",
    "festvox-kdlpc16k": "free to use and distribute (as X11)",
    "festvox-suopuhe-lj": "LGPL-2.1+",
    "festvox-suopuhe-mv": "LGPL-2.1+",
    "fluid-soundfont-gm": "MIT",
    "gcin-voice": "speaker 3: GPL-3 or LGPL-3; speaker 5: CC-BY-3.0",
    "gcompris-qt-data": "GPL-3+, some CC-BY-SA, drum kit Sampling Plus",
    "hedgewars-data": "GFDL-1.3",
    "hydrogen-data": "GPL-2+",
    "hydrogen-drumkits": "by kit: GPL-2, GPL-2+, CC-BY-SA-3.0, CC-BY-3.0 (rumpf), CC0 (Audiophob)",
    "lmms-common": "GPL-2+",
    "lugaru-data": "CC-BY-SA-3.0",
    "netpanzer-data": "GPL-2+",
    "openarena-081-players": "GPL-2 or GPL-2+",
    "openarena-data": "GPL-2+",
    "qabcs-data": "GPL-3+",
    "scorched3d-data": "GPL-2+",
    "teeworlds-data": "CC-BY-SA-3.0",
    "timgm6mb-soundfont": "GPL-2",
    "ufoai-sound": "GPL-2+, some CC-BY-3.0",
    "warmux-data": "GPL-2+",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Sounds of a few packages, labelled; `is_eval` says of a source whether it is held out from training."""

    name: str
    group: str  # dev or heldout
    packages: tuple[str, ...]
    find: Callable[[Roots], Iterator[Sound]]
    is_eval: Callable[[str], bool]
    clip_seconds: float
    most_train: int  # sounds of a class, drawn by a hash of their names
    most_eval: int


def among(*sources: str) -> Callable[[str], bool]:
    return lambda source: source in sources


def one_in(count: int) -> Callable[[str], bool]:
    """Every `count`-th source on average, by a hash of its name."""
    return lambda source: hashlib.sha256(source.encode()).digest()[0] % count == 0


TASKS = (
    Task(
        name="drums",
        group="dev",
        packages=("hydrogen-data", "hydrogen-drumkits", "lmms-common"),
        find=find_drums,
        is_eval=among(
            "The Black Pearl 1.0",
            "Millo_MultiLayered2",
            "BJA_Pacific",
            "ElectricEmpireKit",
            "rumpf_kit_z01_h2",
        ),
        clip_seconds=2.0,
        most_train=120,
        most_eval=60,
    ),
    Task(
        name="vowels",
        group="dev",
        packages=tuple(VOWEL_VOICES),
        find=find_vowels,
        is_eval=among("festvox-itapc16k", "festvox-suopuhe-lj"),
        clip_seconds=1.0,
        most_train=160,
        most_eval=80,
    ),
    Task(
        name="instruments",
        group="dev",
        packages=BANKS,
        find=find_instruments,
        is_eval=among("timgm6mb-soundfont"),
        clip_seconds=2.0,
        most_train=90,
        most_eval=50,
    ),
    Task(
        name="voices",
        group="dev",
        packages=("hedgewars-data",),
        find=find_voices,
        is_eval=one_in(3),
        clip_seconds=2.0,
        most_train=60,
        most_eval=60,
    ),
    Task(
        name="effects",
        group="dev",
        packages=GAMES,
        find=find_effects,
        is_eval=among("ufoai-sound"),
        clip_seconds=3.0,
        most_train=70,
        most_eval=40,
    ),
    Task(
        name="things",
        group="dev",
        packages=("qabcs-data", "gcompris-qt-data", "scorched3d-data"),
        find=find_things,
        is_eval=among("gcompris", "scorched3d"),
        clip_seconds=4.0,
        most_train=100,
        most_eval=50,
    ),
    Task(
        name="octaves",
        group="dev",
        packages=("fluid-soundfont-gm",),
        find=find_octaves,
        is_eval=among("piano", "brass", "flute", "mallets"),
        clip_seconds=2.0,
        most_train=100,
        most_eval=50,
    ),
    Task(
        name="consonants",
        group="heldout",
        packages=CZECH_VOICES,
        find=find_consonants,
        is_eval=among("festvox-czech-krb", "festvox-czech-machac"),
        clip_seconds=1.0,
        most_train=40,
        most_eval=40,
    ),
    Task(
        name="tones",
        group="heldout",
        packages=("gcin-voice",),
        find=find_tones,
        is_eval=one_in(3),
        clip_seconds=1.0,
        most_train=180,
        most_eval=90,
    ),
    Task(
        name="rhymes",
        group="heldout",
        packages=("gcin-voice",),
        find=find_rhymes,
        is_eval=among(*"ㄅㄉㄏㄐㄔㄗ", ""),
        clip_seconds=1.0,
        most_train=28,
        most_eval=14,
    ),
    Task(
        name="cries",
        group="heldout",
        packages=("openarena-081-players",),
        find=find_cries,
        is_eval=one_in(2),
        clip_seconds=2.0,
        most_train=60,
        most_eval=20,
    ),
    Task(
        name="percussion",
        group="heldout",
        packages=BANKS,
        find=find_percussion,
        is_eval=among("csound-soundfont", "timgm6mb-soundfont"),
        clip_seconds=2.0,
        most_train=60,
        most_eval=30,
    ),
)
