"""Speech Commands (Warden 2018, arXiv 1804.03209): single words of about a second, a folder for each word."""

from pathlib import Path
from typing import Any

from pipeline.audio.folder_walk import walk_sound_files
from pipeline.datasets.corpus import (
    SHOWN_LINE_LETTERS,
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
from pipeline.datasets.sound_folder import MACOS_NOTE_PREFIX
from pipeline.errors import InputError
from pipeline.labels.ontology import ClassList
from pipeline.messages import suggest_known

SPLIT_LIST_FILES = {"validation": "validation_list.txt", "test": "testing_list.txt"}

SPEECH_COMMANDS_REQUIRED = tuple(SPLIT_LIST_FILES.values())

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

SPEECH_COMMANDS_CLIP_COUNTS = {"v2": 105_829}  # clips in the official release


def speech_commands_corpus(root: Path | str, version: str = "v2") -> Corpus:
    """Return the corpus of the unpacked Speech Commands in the folder `root`; raises InputError.

    root     folder that contains the folders of the words and both official lists
    version  v1 (30 words, archive name with 0.01) or v2 (35 words, archive name with 0.02); every word is a class

    The splits train, validation and test are those of the official lists. A clip is 1 s long; its id is
    `<word>/<file>`. The long recordings in `_background_noise_` are not clips.
    """
    if version not in SPEECH_COMMANDS_WORDS:
        raise InputError(f"version {version!r} is unknown; {suggest_known(version, SPEECH_COMMANDS_WORDS)}")

    # The sounds in the folder and in the lists.
    folder = Path(root)
    check_dataset_folder(folder, "Speech Commands", SPEECH_COMMANDS_REQUIRED)
    split_by_name = _read_split_lists(folder)
    found_names = _find_sounds_in_folders(folder)
    _refuse_other_version(folder, version, {_word_of(name) for name in found_names})

    # The clips: all found or listed files in the folder of a word.
    words = SPEECH_COMMANDS_WORDS[version]
    clip_names = sorted(name for name in {*found_names, *split_by_name} if _word_of(name) in words)
    clips = [
        ListedClip(
            clip_id=name.removesuffix(".wav"),
            path=str(folder / name),
            source=name,
            split=split_by_name.get(name, "train"),
            mids=(_word_of(name),),
            end_seconds=SPEECH_COMMANDS_CLIP_SECONDS,
        )
        for name in clip_names
    ]
    if not clips:
        raise InputError(f"{folder}: no sounds in folders of its words, such as {words[0]}/; unpack it whole")

    # The sounds that do not become clips.
    noise_names = [name for name in found_names if _word_of(name) == NOISE_FOLDER]
    other_names = [name for name in found_names if _word_of(name) not in [*words, NOISE_FOLDER]]
    official_count = SPEECH_COMMANDS_CLIP_COUNTS.get(version, len(clips))
    return Corpus(
        plan=plan_from_clips(clips),
        sources=sources_from_clips(clips, files=len(found_names), unmatched=[*noise_names, *other_names]),
        classes=ClassList(mids=tuple(words), names=tuple(words)),
        dataset_settings=speech_commands_settings(root, version),
        clip_seconds=SPEECH_COMMANDS_CLIP_SECONDS,
        notes=(
            *note_missing_files(clips, folder),
            *_note_left_out(noise_names, "recordings of background noise"),
            *_note_left_out(other_names, f"files in folders that are no words of {version}"),
            *compare_with_release([("clips", len(clips), official_count)]),
        ),
    )


def speech_commands_settings(root: Path | str, version: str = "v2") -> dict[str, Any]:
    """Return the `Corpus.dataset_settings` of `speech_commands_corpus` with these arguments."""
    return {"dataset": "speech_commands", "root": absolute_path_or_url(root), "version": version}


def _word_of(name: str) -> str:
    """Return the folder of `<word>/<file>`."""
    return name.partition("/")[0]


def _find_sounds_in_folders(folder: Path) -> list[str]:
    """Return the sounds in the folders as `<word>/<file>`, without the metadata files that macOS adds."""
    return [
        name
        for name in walk_sound_files(folder)
        if name.count("/") == 1 and not name.rpartition("/")[2].startswith(MACOS_NOTE_PREFIX)
    ]


def _read_split_lists(folder: Path) -> dict[str, str]:
    """Return the split of every listed file; InputError if the lists disagree."""
    split_by_name: dict[str, str] = {}
    for split, list_file in SPLIT_LIST_FILES.items():
        path = folder / list_file
        for line_number, line in enumerate(read_list_text(path).splitlines(), start=1):
            name = line.strip().removeprefix("./")
            if not name:
                continue
            if name.count("/") != 1:
                raise InputError(
                    f"{path}: line {line_number}: expected word/file.wav, found {name[:SHOWN_LINE_LETTERS]!r}; "
                    "fetch it again"
                )

            # A file in two splits would be used for both training and testing.
            other_split = split_by_name.setdefault(name, split)
            if other_split != split:
                raise InputError(
                    f"{path}: line {line_number}: {name} is also in {SPLIT_LIST_FILES[other_split]}; "
                    "fetch both again"
                )
    return split_by_name


def _refuse_other_version(folder: Path, version: str, found_words: set[str]) -> None:
    """Raise InputError for the other version: its words would be left out, or be classes without a clip."""
    found_only_v2 = found_words & set(WORDS_ONLY_IN_V2.split())
    # v1 is requested, but the folder contains v2.
    if version == "v1" and found_only_v2:
        raise InputError(
            f"{folder}: holds {', '.join(sorted(found_only_v2))}, words of v2 only; ask for version v2"
        )

    # v2 is requested, but the folder contains v1: all words of v1 and none of the others.
    if version == "v2" and not found_only_v2 and found_words >= set(WORDS_IN_BOTH.split()):
        raise InputError(
            f"{folder}: holds the words of v1 only, none of {WORDS_ONLY_IN_V2}; ask for version v1"
        )


def _note_left_out(names: list[str], description: str) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {description} left out, such as {names[0]}"]
