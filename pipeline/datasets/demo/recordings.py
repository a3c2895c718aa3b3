"""The real recordings of the demo corpus: download of three Debian packages, division into splits, and sounds.

`RECORDING_TABLE` has the AudioSet classes of each recording; they were derived from the file names.
"""

import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.datasets.demo.audio_files import read_recording
from pipeline.datasets.demo.synthesis import SYNTHESIS_RATE_HZ, DemoSound, add_event
from pipeline.errors import InputError

DEMO_SPLITS = ("balanced_train", "eval")

DEMO_EVAL_SHARE = 0.25

PACKAGE_COMMANDS = ("apt-get", "dpkg-deb")

PAUSE_SECONDS = (0.1, 1.5)  # between the repetitions of a short recording

# The authors and the licence of the recordings in each package.
PACKAGE_LICENCES = {
    "scratch": "CC BY-SA 3.0, (c) 2011 Massachusetts Institute of Technology (Scratch 1.4)",
    "sonic-pi-samples": "CC0 1.0, recordings of freesound.org users collected by Sonic Pi",
    "minetest-data": "CC BY-SA 3.0, the Minetest developers and contributors (doors: CC BY 3.0; tnt: CC0 1.0)",
}

MID_OF_CLASS_NAME = {
    "Baby cry, infant cry": "/t/dd00002",
    "Bark": "/m/05tny_",
    "Bass drum": "/m/0bm02",
    "Beatboxing": "/m/02cz_7",
    "Beep, bleep": "/m/02fs_r",
    "Bell": "/m/0395lw",
    "Bird": "/m/015p6",
    "Boom": "/m/07qqyl4",
    "Breaking": "/m/07pc8lb",
    "Burping, eructation": "/m/03q5_w",
    "Burst, pop": "/m/07qsvvw",
    "Car": "/m/0k4j",
    "Car passing by": "/t/dd00134",
    "Cash register": "/m/024dl",
    "Cat": "/m/01yrx",
    "Caw": "/m/07r5c2p",
    "Chicken, rooster": "/m/09b5t",
    "Choir": "/m/0l14jd",
    "Chop": "/m/07pczhz",
    "Clapping": "/m/0l15bq",
    "Clip-clop": "/m/07rv9rh",
    "Cough": "/m/01b_21",
    "Cowbell": "/m/0239kh",
    "Creak": "/m/07qh7jl",
    "Cricket": "/m/09xqv",
    "Crow": "/m/04s8yn",
    "Crowd": "/m/03qtwd",
    "Crowing, cock-a-doodle-doo": "/m/07qn5dc",
    "Cymbal": "/m/01qbl",
    "Didgeridoo": "/m/02bxd",
    "Dog": "/m/0bt9lr",
    "Door": "/m/02dgv",
    "Drip": "/m/07r5v4s",
    "Drum": "/m/026t6",
    "Drum kit": "/m/02hnl",
    "Drum machine": "/m/0cfdd",
    "Drum roll": "/m/02k_mr",
    "Duck": "/m/09ddx",
    "Explosion": "/m/014zdl",
    "Finger snapping": "/m/025_jnm",
    "Fire": "/m/02_41",
    "Glass": "/m/039jq",
    "Gong": "/m/0mbct",
    "Goose": "/m/0dbvp",
    "Guitar": "/m/0342h",
    "Hi-hat": "/m/03qtq",
    "Hip hop music": "/m/0glt670",
    "Honk": "/m/07qwf61",
    "Hoot": "/m/07r_80w",
    "Horse": "/m/03k3r",
    "Howl": "/m/07qf0zm",
    "Laughter": "/m/01j3sz",
    "Marimba, xylophone": "/m/0dwsp",
    "Meow": "/m/07qrkrw",
    "Motorcycle": "/m/04_sv",
    "Owl": "/m/09d5_",
    "Piano": "/m/05r5c",
    "Printer": "/m/01m4t",
    "Quack": "/m/07qdb04",
    "Rattle": "/m/07qn4z3",
    "Scratching (performance technique)": "/m/01hgjl",
    "Screaming": "/m/03qc9zr",
    "Sewing machine": "/m/0llzx",
    "Shatter": "/m/07rn7sz",
    "Singing": "/m/015lz1",
    "Sizzle": "/m/07p9k1k",
    "Snare drum": "/m/06rvn",
    "Sneeze": "/m/01hsr_",
    "Sound effect": "/m/0c1dj",
    "Splash, splatter": "/m/07rrlb6",
    "Stream": "/m/0j6m2",
    "Strum": "/m/07s0s5r",
    "Synthesizer": "/m/0l14qv",
    "Tabla": "/m/01p970",
    "Techno": "/m/07gxw",
    "Trumpet": "/m/07gql",
    "Typing": "/m/0316dw",
    "Walk, footsteps": "/m/07pbtc8",
    "Water": "/m/0838f",
    "Water tap, faucet": "/m/02jz0l",
    "Whoosh, swoosh, swish": "/m/07rqsjt",
    "Wood": "/m/083vt",
}

# Class | another class : recordings. {a,b} means both a and b; `RECORDING_PATHS` has the rest of each path.
RECORDING_TABLE = """
Baby cry, infant cry: scratch/Human/BabyCry.mp3
Bark | Dog: scratch/Animal/Dog{1,2}.wav
Bass drum: sonic/bd_{808,ada,boom,fat,gas,haus,klub,pure,sone,tek,zome,zum}
    sonic/drum_bass_{hard,soft} sonic/drum_heavy_kick
Beatboxing: scratch/Music_Loops/HumanBeatbox{1,2}.mp3 scratch/Vocals/BeatBox{1,2}.wav
Beep, bleep: scratch/Electronic/ComputerBeeps{1,2}.wav sonic/elec_{beep,blip,blip2}
Bell: scratch/Effects/BellToll.wav sonic/perc_{bell,bell2}
Bird: scratch/Animal/Bird.wav
Boom: sonic/misc_cineboom
Breaking: mods/default/default_tool_breaks.{1,2,3}
Burping, eructation: sonic/misc_burp
Burst, pop: scratch/Effects/Pop.wav sonic/elec_pop
Car passing by | Car: scratch/Effects/CarPassing.wav
Cash register: sonic/perc_till
Choir: sonic/ambi_choir
Chop | Wood: mods/default/default_dig_choppy.{1,2,3}
Clapping: scratch/Percussion/HandClap.wav
Cough: scratch/Human/Cough-{female,male}.wav
Cowbell: sonic/drum_cowbell
Cricket: scratch/Animal/Cricket.wav scratch/Animal/Crickets.wav
Crow | Caw: sonic/misc_crow
Crowd: scratch/Human/PartyNoise.wav
Crowing, cock-a-doodle-doo | Chicken, rooster: scratch/Animal/Rooster.wav
Cymbal: scratch/Percussion/{CymbalCrash,RideCymbal}.wav
    sonic/drum_{cymbal_hard,cymbal_soft,splash_hard,splash_soft} sonic/elec_cymbal
Didgeridoo: scratch/Instruments/Dijjeridoo.mp3
Door: scratch/Effects/DoorClose.mp3 sonic/perc_door mods/doors/doors_{door,glass_door,steel_door}_{close,open}
Door | Creak: scratch/Effects/DoorCreak.wav
Drip: scratch/Effects/WaterDrop.mp3
Drum: sonic/drum_tom_{hi,mid,lo}_{hard,soft} scratch/Music_Loops/Drum.mp3
Drum kit: scratch/Music_Loops/DrumSet{1,2}.mp3 sonic/loop_{amen,amen_full,breakbeat}
Drum machine: scratch/Music_Loops/DrumMachine.mp3
Drum roll: sonic/drum_roll
Duck | Quack: scratch/Animal/Duck.wav
Explosion: mods/tnt/tnt_explode
Finger snapping: scratch/Human/FingerSnap.wav sonic/perc_{snap,snap2}
Fire: mods/fire/fire_fire.{1,2,3} mods/fire/fire_{large,small} mods/default/default_furnace_active
Gong: scratch/Percussion/Gong.wav
Goose | Honk: scratch/Animal/Goose.wav
Guitar: scratch/Music_Loops/GuitarChords{1,2}.mp3 sonic/guit_{e_fifths,e_slide,em9,harmonics}
Guitar | Strum: scratch/Instruments/GuitarStrum.wav
Hi-hat: sonic/drum_cymbal_{closed,open,pedal}
Hip hop music: scratch/Music_Loops/HipHop.mp3
Horse: scratch/Animal/Horse.wav
Horse | Clip-clop: scratch/Animal/HorseGallop.wav
Howl: scratch/Animal/WolfHowl.wav
Laughter: scratch/Human/Laugh-{female,male1,male2}.wav scratch/Human/Laugh-male3.mp3
Marimba, xylophone: scratch/Music_Loops/{Xylo1,Xylo2,Xylo3,xylo4}.mp3
Meow | Cat: scratch/Animal/{Kitten,Meow}.wav scratch/Animal/Cat.mp3
Motorcycle: scratch/Effects/MotorcyclePassing.wav
Owl | Hoot: scratch/Animal/Owl.wav
Piano: sonic/ambi_piano
Printer: sonic/loop_3d_printer
Rattle: scratch/Effects/Rattle.wav
Scratching (performance technique): sonic/vinyl_{backspin,rewind,scratch}
Screaming: scratch/Human/Scream-{female,male1}.wav scratch/Human/Scream-male2.mp3
Sewing machine: scratch/Effects/SewingMachine.mp3
Shatter | Glass: mods/default/default_break_glass.{1,2,3}
Singing: scratch/Vocals/Singer{1,2}.wav scratch/Vocals/{Sing-me-a-song,Hey-yay-hey}.mp3
Sizzle: mods/fire/fire_extinguish_flame.{1,2,3}
Snare drum: sonic/drum_snare_{hard,soft} sonic/sn_{dolf,dub,generic,zome} sonic/elec_snare
Sneeze: scratch/Human/Sneeze-{female,male}.wav
Sound effect: scratch/Electronic/{AlienCreak1,AlienCreak2,Laser1,Laser2,SpaceRipple,Spiral,Whoop,Zoop}.wav
Splash, splatter | Water: mods/default/default_water_footstep.{1,2,3}
Stream | Water: mods/env_sounds/env_sounds_water.{1,2,3,4}
Synthesizer: sonic/bass_{dnb_f,drop_c,hard_c,thick_c,trance_c,woodsy_c}
Tabla: sonic/tabla_{dhec,ghe1,ghe2,ghe3,ghe4,na,na_o,re,tas1,tas2,te1,te2,tun1,tun2} sonic/loop_tabla
Techno: scratch/Music_Loops/Techno{,2}.mp3
Trumpet: scratch/Instruments/Trumpet{1,2}.wav
Typing: scratch/Effects/Typing.mp3
Walk, footsteps: scratch/Human/Footsteps-1.wav scratch/Human/Footsteps-2.mp3
    mods/default/default_{grass,gravel,snow}_footstep.{1,2,3}
Water tap, faucet: scratch/Effects/WaterRunning.mp3
Whoosh, swoosh, swish: sonic/perc_{swash,swoosh} sonic/ambi_{swoosh,dark_woosh}
"""

RECORDING_PATHS = {
    "scratch": ("scratch", "usr/share/scratch/Media/Sounds/{folder}/{name}"),
    "sonic": ("sonic-pi-samples", "usr/share/sonic-pi/samples/{name}.flac"),
    "mods": ("minetest-data", "usr/share/games/minetest/games/minetest_game/mods/{folder}/sounds/{name}.ogg"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageRecording:
    """One file of a package and its classes."""

    package: str
    path: str  # as the package unpacks it
    classes: tuple[
        str, ...
    ]  # class names; the first decides the group in which the recording is divided into splits


def list_recordings() -> Iterator[PackageRecording]:
    """Yield every recording of the table."""
    # An indented line continues the line above.
    lines = RECORDING_TABLE.replace("\n   ", "").strip().splitlines()
    for line in lines:
        classes, short_paths = line.split(": ")
        for short_path in short_paths.split():
            for full_path in expand_braces(short_path):
                start, *folders, name = full_path.split("/")
                package, template = RECORDING_PATHS[start]

                # The table has no spaces in paths, one folder has.
                folder = " ".join(folders).replace("Music_Loops", "Music Loops")
                path = template.format(folder=folder, name=name)
                yield PackageRecording(package=package, path=path, classes=tuple(classes.split(" | ")))


def expand_braces(text: str) -> list[str]:
    """Return the texts with one alternative of each `{a,b}`, in every combination."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    before = text[: match.start()]
    after = text[match.end() :]
    return [expanded for choice in match[1].split(",") for expanded in expand_braces(before + choice + after)]


def fetch_packages(folder: Path, *, quiet: bool | None) -> None:
    """Download the packages (49 MB) with apt and unpack each into `folder`/its name, without installing it."""
    # Check for missing commands before anything is downloaded.
    for command in PACKAGE_COMMANDS:
        if not shutil.which(command):
            raise InputError(
                f"{command}: not on this machine; --source debian needs Debian or Ubuntu, "
                "--source formula downloads nothing"
            )

    folder.mkdir(parents=True)
    for package in tqdm(PACKAGE_LICENCES, desc="fetch packages", unit="package", disable=quiet):
        run_package_command(["apt-get", "download", "--quiet", package], folder)
        (archive,) = folder.glob(f"{package}_*.deb")
        run_package_command(["dpkg-deb", "--extract", str(archive), package], folder)
        archive.unlink()


def run_package_command(command: list[str], folder: Path) -> None:
    """Run a command in a folder; if it fails, InputError with the last line of its error output."""
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if completed.returncode:
        complaint = (completed.stderr.strip() or f"exit status {completed.returncode}").splitlines()[-1]
        raise InputError(
            f"{' '.join(command)}: {complaint} (try apt-get update, or --source formula, which downloads nothing)"
        )


def copy_licences(packages: Path, folder: Path) -> None:
    """Copy the copyright file of each package, which names the author of each recording."""
    folder.mkdir()
    for package in PACKAGE_LICENCES:
        statement = packages / package / "usr/share/doc" / package / "copyright"
        shutil.copyfile(statement, folder / f"{package}.txt")


def split_recordings(
    rng: np.random.Generator, recordings: Sequence[PackageRecording]
) -> dict[str, tuple[PackageRecording, ...]]:
    """Return the recordings of each split: about a quarter of every class, at least one, for eval; the rest for train.

    A recording that is the only recording of all its classes is in both splits, so that neither split lacks the class.
    Every other recording is in one split only.
    """
    # The number of recordings with each class, and the recordings grouped by their first class.
    recordings_per_class = Counter(name for recording in recordings for name in recording.classes)
    recordings_by_class: defaultdict[str, list[PackageRecording]] = defaultdict(list)
    for recording in recordings:
        recordings_by_class[recording.classes[0]].append(recording)

    train: list[PackageRecording] = []
    evaluation: list[PackageRecording] = []
    for group in recordings_by_class.values():
        shuffled = [group[index] for index in rng.permutation(len(group))]

        # The group is the only recording of all its classes.
        if all(recordings_per_class[name] == 1 for name in group[0].classes):
            evaluation += group
            train += group
            continue

        eval_count = 0
        if len(group) > 1:
            eval_count = max(1, round(DEMO_EVAL_SHARE * len(group)))
        evaluation += shuffled[:eval_count]
        train += shuffled[eval_count:]
    return dict(zip(DEMO_SPLITS, (tuple(train), tuple(evaluation)), strict=True))


def load_recorded_sound(recording: PackageRecording, folder: Path) -> DemoSound:
    """Read the recording from its unpacked package; returns a sound with its classes."""
    path = folder / recording.package / recording.path
    if not path.exists():
        raise InputError(
            f"{path}: not in this release of {recording.package}, which Debian 12 has; use --source formula"
        )
    mids = tuple(MID_OF_CLASS_NAME[name] for name in recording.classes)
    make_wave = partial(repeat_with_gaps, read_recording(path))
    return DemoSound(name=f"{recording.package}/{recording.path}", mids=mids, make_wave=make_wave)


def repeat_with_gaps(wave_S: np.ndarray, rng: np.random.Generator, samples: int) -> np.ndarray:
    """Return `samples` samples: the beginning of a long recording, or a short recording repeated with pauses."""
    repeated_S = np.zeros(samples, dtype=np.float32)
    start = 0
    while start < samples:
        add_event(repeated_S, wave_S, start)
        start += len(wave_S) + int(SYNTHESIS_RATE_HZ * rng.uniform(*PAUSE_SECONDS))
    return repeated_S
