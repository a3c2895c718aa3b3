"""Ten-second clips in AudioSet's shape, mixed of real recordings in Debian packages, for `bench/real_recordings.py`.

A clip holds one to three recordings of different classes over faint noise, short ones in a loop. A recording occurs
in one split only: every fourth of a class in eval. Its labels follow its name, not a listener. `LICENCES` says what
each package's copyright file says of its sounds.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from pipeline.audio.decode import load_clip_audio
from pipeline.audio.sources import SoundLocator
from pipeline.errors import InputError
from pipeline.labels.ontology import load_class_list

SEED = 0
CLIPS = 2_018  # a fifth of them in eval
SECONDS, RATE_HZ = 10, 32_000
LONGEST_SECONDS = 30.0  # of a recording that is read
SPEECH_WEIGHT = 40.0  # so that a third of the clips has it; other classes weigh up to 2.4
SPLITS = ("balanced_train", "eval")

LICENCES = {
    "freeciv-data": "GPL-2+",
    "klettres-data": "GPL-2+",
    "ktuberling-data": "GPL-2+, some CC-BY and CC0",
    "libreoffice-common": "MPL-2.0",
    "lincity-ng-data": "GPL-2+ or CC-BY-SA-2.0",
    "minetest-data": "CC-BY-SA-3.0, some CC-BY-3.0",
    "scratch": "CC-BY-SA-3.0",
    "sonic-pi-samples": "CC0, some CC-BY-SA-4.0",
    "tuxpaint-stamps-default": "GPL-2",
    "wesnoth-1.16-data": "GPL-2+",
}

# What a path holds in lower case, and the classes of such a recording; the first rule that fits decides.
RULES = (
    (r"_desc_|klettres|ktuberling/sounds|symbols/(math|alphabets)|audio-channel", ("Speech",)),
    (r"/music/|/tunes?/|preview|button|checkbox|magic|miss", ()),
    (
        r"cuckoo|blackbird|lark\b|birds?\d?\.|green[13]\.|parklandplane",
        ("Bird", "Bird vocalization, bird call, bird song"),
    ),
    (r"crow\.|firewasteland", ("Crow", "Caw")),
    (r"\bowl|powersolar3", ("Owl", "Hoot")),
    (r"rooster|ambient/morning", ("Chicken, rooster", "Crowing, cock-a-doodle-doo")),
    (r"\bhen\.|farm3", ("Chicken, rooster", "Cluck")),
    (r"turkey\.", ("Turkey", "Gobble")),
    (r"goose|gander|parklandlake1", ("Goose", "Honk")),
    (r"duck|drake\.ogg|parklandlake2", ("Duck", "Quack")),
    (r"monument3", ("Pigeon, dove",)),
    (r"cricket|ambient/night|grasshopper", ("Cricket", "Insect")),
    (r"bee\.|hornet", ("Bee, wasp, etc.", "Insect")),
    (r"mosquito|tip1", ("Mosquito", "Insect")),
    (r"tip3", ("Fly, housefly", "Insect")),
    (r"frog|green2|water1\.wav", ("Frog", "Croak")),
    (r"wolf-growl", ("Growling", "Dog")),
    (r"wolfhowl", ("Howl", "Canidae, dogs, wolves")),
    (r"/dogs?\d?\.|shanty[45]", ("Dog", "Bark")),
    (r"meow|kitten|/cat\.|blackcat", ("Cat", "Meow")),
    (r"cats/(lion|tiger)|drake-hit|gryphon-hit", ("Roaring cats (lions, tigers)", "Roar")),
    (r"/cow|bull\.|organicfarm2", ("Cattle, bovinae", "Moo")),
    (r"sheep|farm1", ("Sheep", "Bleat")),
    (r"goat", ("Goat", "Bleat")),
    (r"/pig", ("Pig", "Oink")),
    (r"gallop|canter|dirttrack2", ("Horse", "Clip-clop")),
    (r"/horse", ("Horse", "Neigh, whinny")),
    (r"hiss", ("Hiss", "Snake")),
    (r"whale", ("Whale vocalization",)),
    (r"babycry", ("Baby cry, infant cry",)),
    (r"laugh", ("Laughter",)),
    (r"scream", ("Screaming",)),
    (r"cough|health2", ("Cough",)),
    (r"sneeze", ("Sneeze",)),
    (r"snor|shanty1", ("Snoring",)),
    (r"burp", ("Burping, eructation",)),
    (r"fingersnap|perc_snap", ("Finger snapping",)),
    (r"handclap", ("Clapping",)),
    (r"applause|croud3", ("Applause", "Crowd")),
    (r"partynoise|marketfull|residentialmed2", ("Hubbub, speech noise, speech babble",)),
    (r"school[13]", ("Children playing", "Speech")),
    (r"(human|dwarf|elf|goblin|lich|troll|ogre).*(hit|die)|groan", ("Wail, moan",)),
    (r"singer|oooo|sing-me|hey-yay", ("Singing", "Music")),
    (r"beatbox", ("Beatboxing", "Music")),
    (r"choir", ("Choir", "Music")),
    (r"(water|inh2o)_?footstep|splash\.|inh2o|plunge", ("Splash, splatter", "Water")),
    (r"footstep|foot3", ("Walk, footsteps",)),
    (r"glass_(?!door|foot|hum|rub)|break_glass|pottery1", ("Glass", "Shatter")),
    (r"creak", ("Creak", "Door")),
    (r"door|gate_|chest_", ("Door",)),
    (r"expl|tnt_expl|cineboom", ("Explosion",)),
    (r"lrgcan|medcan|mortar", ("Artillery fire", "Explosion")),
    (r"mgbar|mgheavy|gunshot|thunderstick", ("Gunshot, gunfire",)),
    (r"thover", ("Helicopter", "Aircraft")),
    (r"lightning|thunder|rocket3", ("Thunder",)),
    (r"campfire|fire_|fire3|flame|bow.*fire", ("Fire", "Crackle")),
    (r"rain\b", ("Rain",)),
    (r"env_sounds_water|waterrunning|ripples|water\.", ("Water", "Stream")),
    (r"waterdrop|drip", ("Drip", "Water")),
    (r"toilet|residentialmed1", ("Toilet flush", "Water")),
    (r"rumble|wind\b", ("Wind",)),
    (r"trafic|carpassing", ("Traffic noise, roadway noise", "Car")),
    (r"motorcycle", ("Motorcycle",)),
    (r"railtrain|/train", ("Train",)),
    (r"firetruck|firestation3|health4", ("Siren",)),
    (r"xing_ped", ("Vehicle horn, car horn, honking",)),
    (r"vacuum", ("Vacuum cleaner",)),
    (r"sewing|industrylight1", ("Sewing machine",)),
    (r"typing", ("Typing",)),
    (r"camera", ("Camera",)),
    (r"hammer|windmill2|blacksmith", ("Hammer",)),
    (r"dig_choppy|axe|hatchet", ("Chop", "Wood")),
    (r"tools/saw", ("Sawing",)),
    (r"clock|residentiallow2", ("Clock", "Tick-tock")),
    (r"beeps?\d?\.|blip|elec_ping|health1", ("Beep, bleep",)),
    (r"belltoll|/bell\.|perc_bell|elec_bell|residentiallowlow1", ("Bell",)),
    (r"doorbell|residentiallow3", ("Doorbell",)),
    (r"water4\.wav|phone", ("Telephone",)),
    (r"gong", ("Gong",)),
    (r"trumpet|horn-\d|fanfare", ("Trumpet", "Brass instrument", "Music")),
    (r"cello", ("Cello", "Music")),
    (r"violin|stringaccent", ("Violin, fiddle", "Music")),
    (r"tabla", ("Tabla", "Drum")),
    (r"guit", ("Guitar", "Music")),
    (r"xylo", ("Marimba, xylophone", "Music")),
    (r"piano", ("Piano", "Music")),
    (r"dijjeridoo", ("Didgeridoo", "Music")),
    (r"bass_[a-z]+_", ("Bass guitar", "Music")),
    (r"cymbal|drum_splash|ride", ("Cymbal",)),
    (r"snare|/sn_", ("Snare drum", "Drum")),
    (r"/bd_|kick|drum_bass", ("Bass drum", "Drum")),
    (r"cowbell", ("Cowbell",)),
    (r"shaker|rattle", ("Rattle (instrument)",)),
    (r"drumset|drummachine|loop_(amen|break|compus|mehackit)|beat", ("Drum kit", "Music")),
    (r"drum|tom\b", ("Drum",)),
    (r"ambi_|loop_|music loops|elec_|glitch_", ("Music", "Synthesizer")),
)


class Pool:
    """Recordings by the first of their classes, in two splits that share none."""

    def __init__(self, roots: Callable[[str], Path]) -> None:
        self.names: dict[Path, tuple[str, ...]] = {}
        self.packages: dict[Path, str] = {}
        by_class = defaultdict(list)
        for package in sorted(LICENCES):
            root = roots(package)
            for path in sorted(root.rglob("*")):
                if path.suffix.lower() not in {".wav", ".ogg", ".oga", ".flac", ".mp3"} or not path.is_file():
                    continue
                name = f"/{path.relative_to(root).as_posix().lower()}"
                names = next((names for pattern, names in RULES if re.search(pattern, name)), ())
                if names:
                    self.names[path] = names
                    self.packages[path] = package
                    by_class[names[0]].append(path)
        self.by_class: dict[str, dict[str, list[Path]]] = {split: {} for split in SPLITS}
        for name, paths in sorted(by_class.items()):
            order = np.random.default_rng([SEED, len(paths)]).permutation(len(paths))
            for split in SPLITS:
                mine = [paths[i] for place, i in enumerate(order) if (place % 4 == 1) == (split == "eval")]
                if mine:
                    self.by_class[split][name] = mine

    def draw(self, split: str, rng: np.random.Generator) -> list[Path]:
        """One to three recordings of different classes; classes of many recordings come somewhat more often."""
        by_class = self.by_class[split]
        weights = np.array(
            [
                SPEECH_WEIGHT if name == "Speech" else min(len(paths), 6) ** 0.5
                for name, paths in by_class.items()
            ]
        )
        count = rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15])
        names = rng.choice(list(by_class), size=count, replace=False, p=weights / weights.sum())
        return [by_class[name][rng.integers(len(by_class[name]))] for name in names]


def write_corpus(roots: Callable[[str], Path], folder: Path, table: Path) -> list[Path]:
    """Write `audio/SPLIT/ID.flac` and return the segments lists of both splits, in AudioSet's form.

    The table, CSV, has a row for each recording in a clip: clip, split, package and path below the package's root.
    """
    pool = Pool(roots)
    classes = load_class_list()
    mid_of = dict(zip(classes.names, classes.mids, strict=True))

    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    rows = [("clip", "split", "package", "path")]
    for clip in range(CLIPS):
        rng = np.random.default_rng([SEED, clip])
        split = "eval" if clip % 5 == 4 else "balanced_train"
        paths = pool.draw(split, rng)
        path = folder / "audio" / split / f"real{clip:07}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, mix(paths, rng), RATE_HZ, subtype="PCM_16")
        mids = sorted({mid_of[name] for source in paths for name in pool.names[source]})
        for source in paths:
            package = pool.packages[source]
            rows.append((path.stem, split, package, source.relative_to(roots(package)).as_posix()))
        lines[split].append(f'{path.stem}, 0.000, {SECONDS:.3f}, "{",".join(mids)}"')

    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    lists = []
    for split in SPLITS:
        lists.append(folder / f"{split}_segments.csv")
        text = "# YTID, start_seconds, end_seconds, positive_labels\n" + "\n".join(lines[split]) + "\n"
        lists[-1].write_text(text, encoding="utf-8")
    return lists


def mix(paths: list[Path], rng: np.random.Generator) -> np.ndarray:
    """Sum the recordings at levels of -14 to -2 dB; a short one returns after pauses of 0.1 to 1.5 s."""
    samples = SECONDS * RATE_HZ
    mix_S = 10 ** (rng.uniform(-62, -38) / 20) * rng.standard_normal(samples)
    for path in paths:
        wave_S = read(path)
        part_S = np.zeros(samples)
        if len(wave_S) >= samples:
            start = rng.integers(len(wave_S) - samples + 1)
            part_S = wave_S[start : start + samples]
        else:
            at = int(rng.uniform(0, min(samples - len(wave_S), 2 * RATE_HZ)))
            while at < samples:
                piece_S = wave_S[: samples - at]
                part_S[at : at + len(piece_S)] = piece_S
                at += len(wave_S) + int(rng.uniform(0.1, 1.5) * RATE_HZ)
        mix_S += 10 ** (rng.uniform(-14, -2) / 20) * part_S
    return mix_S / max(np.abs(mix_S).max(), 1.0)


def read(path: Path) -> np.ndarray:
    """The recording in mono, its peak at 1; nothing of a file that cannot be used."""
    try:
        audio = load_clip_audio(SoundLocator.from_path(path), start_seconds=0.0, end_seconds=LONGEST_SECONDS)
    except InputError:
        return np.zeros(1)
    wave_S = audio.resample_wave(RATE_HZ)
    return wave_S / max(np.abs(wave_S).max(), 1e-9)
