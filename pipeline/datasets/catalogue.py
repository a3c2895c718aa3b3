"""Every dataset by name: what `asked` in a store's build.json names, and how to make its corpus again."""

from collections.abc import Callable
from typing import Any

from pipeline.corpus import Corpus
from pipeline.datasets.audioset import audioset
from pipeline.errors import InputError

DATASETS: dict[str, Callable[..., Corpus]] = {"audioset": audioset}


def corpus_of(asked: dict[str, Any]) -> Corpus:
    """The corpus that `Corpus.asked` tells of, as the folders and lists are now; raises InputError."""
    values = dict(asked)
    name = values.pop("dataset", None)
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is unknown; there are: {', '.join(DATASETS)}")
    return DATASETS[name](**values)
