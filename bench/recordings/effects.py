"""Cries by game figure, effects by game, and things that sound by collection."""

from collections.abc import Iterator
from pathlib import Path

from bench.recordings.banks import read_qt_resource, read_zip
from bench.recordings.sounds import Roots, Sound, first_match, sound_files

# Cries of game figures, by figure.

CRIES = {
    "death": r"^death",
    "pain": r"^pain",
    "jump": r"^jump",
    "taunt": r"^taunt",
    "gasp": r"^(gasp|drown)",
    "fall": r"^falling",
}


def find_cries(roots: Roots) -> Iterator[Sound]:
    archive = next(roots("openarena-081-players").rglob("*.pk3"))
    for name, data in read_zip(archive):
        path = Path(name)
        label = first_match(CRIES, path.stem) if path.suffix.lower() == ".wav" else None
        if label:
            yield Sound(
                name=f"{path.parent.name}/{path.stem}.wav",
                label=label,
                source=path.parent.name,
                package="openarena-081-players",
                data=data,
            )


# Sounds of games, by game.

EFFECTS = {
    "none": r"music|theme|tunes",
    "footstep": r"footstep|\bsteps?\b|steps|foot_(left|right)|crouch|walk",
    "explosion": r"expl|\bexp\b|boom|nuke|bomb\b|shockwave|(small|medium|large|xlarge)$",
    "impact": r"impact|bodyimpact|hit|thud|\bland|break|clank|ricoch|\bric\d|bounce|collision|broken",
    "voice": r"death|hurt|pain|scream|injured|/die|deadman|moan|laugh|cry-|yessir|affirm|selected|movout|tarconf",
    "animal": r"bark|growl|snarl|chirp|gull|\bdogs?\d|/dog|cow|moo\b|sheep|rooster|bird|frog|wolf|hawk|bees|bats"
    r"|chitter|cricket",
    "gun": r"gun|shot|pistol|rifle|smg|hmg|bolter|needler|cannon|machg|laser|plasma|railg|m16|[a-z]{2}-fire|launch"
    r"|missile",
    "engine": r"engine|tank|diesel|hover|/jet|helicopter|f16|f18|cessna|t38|apache|hev(idle|mov|start)|machine"
    r"|generator|vehicle|unitsound",
    "nature": r"fire|flame|wind|water|rain|thunder|ocean|lava|lightning|embers|splash|burn",
    "interface": r"click|clic\b|beep|select|menu|pick|popup|/ui/|flag|message|msg|item|grab|power|talk|/ok\b|cancel"
    r"|error",
}
GAMES = (
    *("ufoai-sound", "openarena-data", "teeworlds-data", "warmux-data", "bzflag-data"),
    *("btanks-data", "lugaru-data", "netpanzer-data", "scorched3d-data"),
)


def find_effects(roots: Roots) -> Iterator[Sound]:
    for package in GAMES:
        for name, data in game_sounds(roots(package)):
            label = first_match(EFFECTS, "/".join(Path(name).parts[-3:]))
            if label and label != "none":
                yield Sound(name=f"{package}/{name}", label=label, source=package, package=package, data=data)


def game_sounds(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the names below the folder of sounds and bytes, those in archives too."""
    for path in sound_files(root):
        yield path.relative_to(root).as_posix(), path.read_bytes()
    for archive in sorted(root.rglob("*.pk3")):
        for name, data in read_zip(archive):
            if name.endswith((".wav", ".ogg")):
                yield name, data


# Kinds of thing that sounds: a vocabulary game's noises, another's instruments and animals.

THINGS = {
    "bird": """albatross bird birdchirp1 birdchirp2 birdchirp3 birdchirp4 birdchirp5 birdchirp6 birds1 birds2 booby
        chickens crane crow duck eagle-owl emu flamingo goose guinea_fowl gull1 gull2 gull4 gull5 heron iora owl
        pelican pheasant quail quetzal rooster sparrow stork vulture wood_grouse""",
    "beast": """bear calf cat chimpanzee chinchilla cow cows deer dog dog2 dog3 elephant ferret foal giant_panda
        giraffe hamster hedgehog horse hyena jaguar jerboa koala lion little_monkey lynx moo moose mouse otter pig
        porcupine raccoon rhinoceros sheep squirrel tiger wallaby wolf yak zebra LRBark_1_LA_cut LRBark_3_LA_cut""",
    "machine": """airplane apache_1 bicycle carhorn1 carhorn2 cessna excavator f16_1 f18_1 helicopter jet quadrocopter
        robot rocket security_camera t38 tank tractor train wagon LRStartAndStopCarEngine1LACut
        LRTrain_slowing_down_01_LA_cut""",
    "wind instrument": """accordion aeoline bagpipes clarinet dulzaina flute flute_traversiere hand_organ harmonica
        horn kazoo natural_horn ney oboe organ pipe quena recorder rozhok saxophone squeezebox trombone trumpet tuba
        washint western_concert_flute whistle xun yobel zhaleyka zurna""",
    "strings": """banjo cello electric_guitar erhu gamba grand_piano guitar guitar_melody guitar_son1 guitar_son2
        guitar_son3 guitar_son4 harp lute piano rabel ukulele violin yangqin youhikko yueqin zither""",
    "percussion": """bass_drum bongo castanets changu cuica cymbal cymbals drum_kit drums hang maracas ratchet
        slit_drum snare_drum spoons tambourine timpani triangle xylophone LRBuddhist_gong_05_LA""",
}
RESOURCES = ("explore_farm_animals", "instruments", "memory-sound")


def find_things(roots: Roots) -> Iterator[Sound]:
    label_of = {word: label for label, words in THINGS.items() for word in words.split()}
    for path in sound_files(next(roots("qabcs-data").rglob("noises"))):
        if label := label_of.get(path.stem):
            yield Sound(
                name=f"qabcs/{path.name}",
                label=label,
                source="qabcs",
                package="qabcs-data",
                data=path.read_bytes(),
            )
    for path in sound_files(roots("scorched3d-data")):
        if label := label_of.get(path.stem):
            yield Sound(
                name=f"scorched3d/{path.name}",
                label=label,
                source="scorched3d",
                package="scorched3d-data",
                data=path.read_bytes(),
            )
    folder = roots("gcompris-qt-data") / "usr/share/gcompris-qt/rcc"
    for resource in RESOURCES:
        for name, data in read_qt_resource(folder / f"{resource}.rcc"):
            path = Path(name)
            label = label_of.get(path.stem)
            if path.suffix == ".ogg" and label:
                yield Sound(
                    name=f"gcompris/{path.name}",
                    label=label,
                    source="gcompris",
                    package="gcompris-qt-data",
                    data=data,
                )
