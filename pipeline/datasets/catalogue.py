"""Every dataset by name: what `asked` in a store's build.json names, and how to make its corpus again."""

from collections.abc import Callable
from typing import Any

from pipeline.datasets.audioset import audioset
from pipeline.datasets.corpus import Corpus
from pipeline.datasets.esc50 import esc50
from pipeline.datasets.folder import folder
from pipeline.datasets.fsd50k import fsd50k
from pipeline.datasets.speech_commands import speech_commands
from pipeline.errors import InputError

DATASETS: dict[str, Callable[..., Corpus]] = {
    "audioset": audioset,
    "folder": folder,
    "esc50": esc50,
    "speech_commands": speech_commands,
    "fsd50k": fsd50k,
}


def corpus_of(asked: dict[str, Any]) -> Corpus:
    """The corpus that `Corpus.asked` tells of, as the folders and lists are now; raises InputError."""
    values = dict(asked)
    name = values.pop("dataset", None)
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is unknown; there are: {', '.join(DATASETS)}")
    return DATASETS[name](**values)
