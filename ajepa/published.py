"""Published results: a table of facts with their sources, and the tasks that they are of."""

import csv
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from pipeline.datasets.speech_commands import WORDS
from pipeline.ontology import load_class_list
from pipeline.vocabularies import fsd50k_classes

TABLE = importlib.resources.files("manifests") / "published_results.csv"
EVAL_CLIPS = {  # what the official split lists, the folds together; manifests/README.md says where each was read
    "audioset-2m": 20_371,
    "audioset-20k": 20_371,
    "esc50": 2_000,
    "fsd50k": 10_231,
    "speech-commands-v1": 6_835,
    "speech-commands-v2": 11_005,
    "voxceleb1-sid": 8_251,
}
TRAIN_CLIPS = {"audioset-2m": 2_063_949, "audioset-20k": 22_160}  # both sets of AudioSet; the balanced one
CHECKED = ("source", "second hand", "no")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A number that others report; `value` in [0, 1], None or empty where the source does not say.

    checked  where the number was seen: at its source, on a page that quotes it, or (`no`) only in notes on the paper
    caution  why it is to be compared with care even where all else is equal
    """

    model: str
    parameters: int | None
    pretraining: str
    task: str
    protocol: str
    metric: str
    value: float
    classes: int | None
    eval_clips: int | None
    source: str
    where: str
    checked: str
    caution: str
    remark: str


@cache
def published() -> tuple[Published, ...]:
    """Every row of the table."""
    return tuple(_row(row) for row in csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))


def _row(told: dict[str, str]) -> Published:
    counts = {
        name: int(told[name]) if told[name] else None for name in ("parameters", "classes", "eval_clips")
    }
    return Published(**(told | counts | {"value": float(told["value"])}))  # type: ignore[arg-type]


def task_of(classes: Sequence[str], *, folds: int, train_clips: int) -> str | None:
    """The public task that a store's class ids are of; None: none of those in the table.

    AudioSet has two: with at most its balanced clips to train on it is `audioset-20k`.
    """
    if set(classes) == set(load_class_list().mids):
        return "audioset-20k" if train_clips <= TRAIN_CLIPS["audioset-20k"] else "audioset-2m"
    if set(classes) == set(fsd50k_classes().mids):
        return "fsd50k"
    for version, words in WORDS.items():
        if set(classes) == set(words):
            return f"speech-commands-{version}"
    return "esc50" if len(classes) == 50 and folds == 5 else None
