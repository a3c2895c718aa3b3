"""Every dataset by name: what `asked` in a store's build.json names, and how to make its corpus again."""

from collections.abc import Callable
from typing import Any

from pipeline.datasets.audioset import audioset_corpus
from pipeline.datasets.corpus import Corpus
from pipeline.datasets.esc50 import esc50_corpus
from pipeline.datasets.folder import folder_corpus
from pipeline.datasets.fsd50k import fsd50k_corpus
from pipeline.datasets.speech_commands import speech_commands_corpus
from pipeline.errors import InputError

DATASETS: dict[str, Callable[..., Corpus]] = {
    "audioset": audioset_corpus,
    "folder": folder_corpus,
    "esc50": esc50_corpus,
    "speech_commands": speech_commands_corpus,
    "fsd50k": fsd50k_corpus,
}


def recreate_corpus(dataset_settings: dict[str, Any]) -> Corpus:
    """The corpus that `Corpus.asked` tells of, as the folders and lists are now; raises InputError."""
    values = dict(dataset_settings)
    name = values.pop("dataset", None)
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is unknown; there are: {', '.join(DATASETS)}")
    return DATASETS[name](**values)
