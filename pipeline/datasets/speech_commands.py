"""Speech Commands (Warden 2018, arXiv 1804.03209): single words of about a second, a folder for each."""

from pathlib import Path

from pipeline.audio.sources import sounds
from pipeline.datasets.corpus import (
    Corpus,
    Listed,
    check_layout,
    counted,
    place_of,
    plan_of,
    present,
    sources_of,
    text_of,
)
from pipeline.errors import InputError
from pipeline.labels.ontology import ClassList

NEEDED = ("validation_list.txt", "testing_list.txt")

LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}

NOISE = "_background_noise_"

CLIP_SECONDS = 1.0

BOTH = (
    "bed bird cat dog down eight five four go happy house left marvin nine no "
    "off on one right seven sheila six stop three tree two up wow yes zero"
)

ONLY_V2 = "backward follow forward learn visual"

WORDS = {"v1": sorted(BOTH.split()), "v2": sorted(f"{BOTH} {ONLY_V2}".split())}

OFFICIAL = {"v2": 105_829}


def speech_commands(root: Path | str, version: str = "v2") -> Corpus:
    """Speech Commands as unpacked: the folder that holds the words' folders and both lists; raises InputError.

    version  v1 (30 words, 0.01 in the archive's name) or v2 (35 words, 0.02): the task of telling all words apart

    Splits train, validation, test by the official lists; a clip is `<word>/<file>`, 1 s long. The long recordings
    in `_background_noise_` are no clips.
    """
    if version not in WORDS:
        raise InputError(f"version {version!r}: expected {' or '.join(WORDS)}")
    folder = Path(root)
    check_layout(folder, "Speech Commands", NEEDED)
    split_of = _split_of(folder)
    there = [
        name
        for name in sounds(folder)
        if name.count("/") == 1 and not name.rpartition("/")[2].startswith("._")
    ]
    words = WORDS[version]
    _check_version(folder, version, {name.partition("/")[0] for name in there})
    names = sorted({name for name in [*there, *split_of] if name.partition("/")[0] in words})
    clips = [
        Listed(
            clip_id=name.removesuffix(".wav"),
            path=str(folder / name),
            source=name,
            split=split_of.get(name, "train"),
            mids=(name.partition("/")[0],),
            end_seconds=CLIP_SECONDS,
        )
        for name in names
    ]
    missing = present(clips, folder) if clips else []
    if not clips:
        raise InputError(f"{folder}: no sounds in folders of its words, such as {words[0]}/; unpack it whole")
    noise = [name for name in there if name.startswith(f"{NOISE}/")]
    other = [name for name in there if name.partition("/")[0] not in [*words, NOISE]]
    return Corpus(
        plan=plan_of(clips),
        sources=sources_of(clips, files=len(there), unmatched=[*noise, *other]),
        classes=ClassList(mids=tuple(words), names=tuple(words)),
        asked={"dataset": "speech_commands", "root": place_of(root), "version": version},
        clip_seconds=CLIP_SECONDS,
        notes=(
            *missing,
            *_left_out(noise, "recordings of background noise"),
            *_left_out(other, f"files in folders that are no words of {version}"),
            *counted([("clips", len(clips), OFFICIAL.get(version, len(clips)))]),
        ),
    )


def _split_of(folder: Path) -> dict[str, str]:
    """The split of every listed file; InputError where the lists disagree."""
    split_of: dict[str, str] = {}
    for split, name in LISTS.items():
        for number, line in enumerate(text_of(folder / name).splitlines(), start=1):
            file = line.strip().removeprefix("./")
            if not file:
                continue
            if file.count("/") != 1:
                raise InputError(
                    f"{folder / name}: line {number}: expected word/file.wav, found {file[:60]!r}"
                )
            if split_of.setdefault(file, split) != split:
                raise InputError(f"{folder / name}: line {number}: {file} is also in {LISTS[split_of[file]]}")
    return split_of


def _check_version(folder: Path, version: str, there: set[str]) -> None:
    """Refuse the other version: its words would be left out, or be classes without a clip."""
    both, only_v2 = set(BOTH.split()), set(ONLY_V2.split())
    if version == "v1" and there & only_v2:
        found = ", ".join(sorted(there & only_v2))
        raise InputError(f"{folder}: holds {found}, words of v2 only; ask for version v2")
    if version == "v2" and both <= there and not there & only_v2:
        raise InputError(f"{folder}: holds the words of v1 only, none of {ONLY_V2}; ask for version v1")


def _left_out(names: list[str], what: str) -> list[str]:
    return [f"{len(names)} {what} left out, such as {names[0]}"] if names else []
