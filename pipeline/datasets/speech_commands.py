"""Speech Commands (Warden 2018, arXiv 1804.03209): single words of about a second, a folder for each."""

from pathlib import Path

from pipeline.audio.sources import sounds
from pipeline.datasets.corpus import (
    Corpus,
    ListedClip,
    absolute_path_or_url,
    check_dataset_folder,
    compare_with_release,
    note_missing_files,
    plan_from_clips,
    read_list_text,
    sources_from_clips,
)
from pipeline.errors import InputError
from pipeline.labels.ontology import ClassList

SPEECH_COMMANDS_REQUIRED = ("validation_list.txt", "testing_list.txt")

SPLIT_LIST_FILES = {"validation": "validation_list.txt", "test": "testing_list.txt"}

NOISE_FOLDER = "_background_noise_"

SPEECH_COMMANDS_CLIP_SECONDS = 1.0

WORDS_IN_BOTH = (
    "bed bird cat dog down eight five four go happy house left marvin nine no "
    "off on one right seven sheila six stop three tree two up wow yes zero"
)

WORDS_ONLY_IN_V2 = "backward follow forward learn visual"

SPEECH_COMMANDS_WORDS = {
    "v1": sorted(WORDS_IN_BOTH.split()),
    "v2": sorted(f"{WORDS_IN_BOTH} {WORDS_ONLY_IN_V2}".split()),
}

SPEECH_COMMANDS_CLIP_COUNTS = {"v2": 105_829}


def speech_commands_corpus(root: Path | str, version: str = "v2") -> Corpus:
    """Speech Commands as unpacked: the folder that holds the words' folders and both lists; raises InputError.

    version  v1 (30 words, 0.01 in the archive's name) or v2 (35 words, 0.02): the task of telling all words apart

    Splits train, validation, test by the official lists; a clip is `<word>/<file>`, 1 s long. The long recordings
    in `_background_noise_` are no clips.
    """
    if version not in SPEECH_COMMANDS_WORDS:
        raise InputError(f"version {version!r}: expected {' or '.join(SPEECH_COMMANDS_WORDS)}")
    folder = Path(root)
    check_dataset_folder(folder, "Speech Commands", SPEECH_COMMANDS_REQUIRED)
    split_of = _read_split_lists(folder)
    there = [
        name
        for name in sounds(folder)
        if name.count("/") == 1 and not name.rpartition("/")[2].startswith("._")
    ]
    words = SPEECH_COMMANDS_WORDS[version]
    _refuse_other_version(folder, version, {name.partition("/")[0] for name in there})
    names = sorted({name for name in [*there, *split_of] if name.partition("/")[0] in words})
    clips = [
        ListedClip(
            clip_id=name.removesuffix(".wav"),
            path=str(folder / name),
            source=name,
            split=split_of.get(name, "train"),
            mids=(name.partition("/")[0],),
            end_seconds=SPEECH_COMMANDS_CLIP_SECONDS,
        )
        for name in names
    ]
    missing = note_missing_files(clips, folder) if clips else []
    if not clips:
        raise InputError(f"{folder}: no sounds in folders of its words, such as {words[0]}/; unpack it whole")
    noise = [name for name in there if name.startswith(f"{NOISE_FOLDER}/")]
    other = [name for name in there if name.partition("/")[0] not in [*words, NOISE_FOLDER]]
    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_from_clips(clips, files=len(there), unmatched=[*noise, *other]),
        classes=ClassList(mids=tuple(words), names=tuple(words)),
        dataset_settings={
            "dataset": "speech_commands",
            "root": absolute_path_or_url(root),
            "version": version,
        },
        clip_seconds=SPEECH_COMMANDS_CLIP_SECONDS,
        notes=(
            *missing,
            *_note_left_out(noise, "recordings of background noise"),
            *_note_left_out(other, f"files in folders that are no words of {version}"),
            *compare_with_release(
                [("clips", len(clips), SPEECH_COMMANDS_CLIP_COUNTS.get(version, len(clips)))]
            ),
        ),
    )


def _read_split_lists(folder: Path) -> dict[str, str]:
    """The split of every listed file; InputError where the lists disagree."""
    split_of: dict[str, str] = {}
    for split, name in SPLIT_LIST_FILES.items():
        for number, line in enumerate(read_list_text(folder / name).splitlines(), start=1):
            file = line.strip().removeprefix("./")
            if not file:
                continue
            if file.count("/") != 1:
                raise InputError(
                    f"{folder / name}: line {number}: expected word/file.wav, found {file[:60]!r}"
                )
            if split_of.setdefault(file, split) != split:
                raise InputError(
                    f"{folder / name}: line {number}: {file} is also in {SPLIT_LIST_FILES[split_of[file]]}"
                )
    return split_of


def _refuse_other_version(folder: Path, version: str, found_words: set[str]) -> None:
    """Refuse the other version: its words would be left out, or be classes without a clip."""
    both, only_v2 = set(WORDS_IN_BOTH.split()), set(WORDS_ONLY_IN_V2.split())
    if version == "v1" and found_words & only_v2:
        found = ", ".join(sorted(found_words & only_v2))
        raise InputError(f"{folder}: holds {found}, words of v2 only; ask for version v2")
    if version == "v2" and both <= found_words and not found_words & only_v2:
        raise InputError(
            f"{folder}: holds the words of v1 only, none of {WORDS_ONLY_IN_V2}; ask for version v1"
        )


def _note_left_out(names: list[str], description: str) -> list[str]:
    return [f"{len(names)} {description} left out, such as {names[0]}"] if names else []
