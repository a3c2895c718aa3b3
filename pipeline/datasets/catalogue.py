"""All datasets by name, and the function that makes a corpus again from the settings in a store's build.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.datasets.audioset import audioset_corpus
from pipeline.datasets.corpus import Corpus
from pipeline.datasets.esc50 import esc50_corpus
from pipeline.datasets.folder import folder_corpus
from pipeline.datasets.fsd50k import FSD50K_AUDIO_FOLDERS, GROUND_TRUTH_FOLDER, fsd50k_corpus
from pipeline.datasets.hub import recreate_hub_corpus
from pipeline.datasets.speech_commands import SPEECH_COMMANDS_REQUIRED, speech_commands_corpus
from pipeline.errors import InputError
from pipeline.messages import suggest_known

DATASETS: dict[str, Callable[..., Corpus]] = {
    "audioset": audioset_corpus,
    "folder": folder_corpus,
    "esc50": esc50_corpus,
    "speech_commands": speech_commands_corpus,
    "fsd50k": fsd50k_corpus,
    "hub": recreate_hub_corpus,
}


def recreate_corpus(dataset_settings: dict[str, Any]) -> Corpus:
    """Make the corpus of these `Corpus.dataset_settings` again from its current files; raises InputError."""
    options = dict(dataset_settings)
    name = options.pop("dataset", None)
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is unknown; {suggest_known(str(name), DATASETS)}")
    return DATASETS[name](**options)


def list_files(dataset_settings: dict[str, Any]) -> list[Path]:
    """Return the lists and tables that decide the plan of a corpus with these settings; none if only its files do."""
    root = Path(dataset_settings.get("root", ""))
    match dataset_settings.get("dataset"):
        case "audioset":
            return [Path(path) for path in dataset_settings["segments"]]
        case "folder":
            return [Path(dataset_settings["table"])] if dataset_settings["table"] else []
        case "esc50":
            return [root / "meta" / "esc50.csv"]
        case "speech_commands":
            return [root / name for name in SPEECH_COMMANDS_REQUIRED]
        case "fsd50k":
            names = ("vocabulary", *FSD50K_AUDIO_FOLDERS)
            return [root / GROUND_TRUTH_FOLDER / f"{name}.csv" for name in names]
        case _:
            return []  # of a corpus that was made in Python
