"""Corpus: what stores are built from: which clip is row i, where its sound lies, what the classes are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.locators import Sources
from pipeline.ontology import ClassList


def place_of(path: Path | str) -> str:
    """A path as `Corpus.asked` holds it: the same from any folder; URLs stay as they are."""
    return str(path) if "://" in str(path) else str(Path(path).absolute())


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What a dataset's own folders and lists come to; made by one function a dataset, in `pipeline/datasets/`.

    plan     columns of `pipeline.manifest.PLAN_SCHEMA`, `mids` (lists of class ids) and `duplicate` (why the row does
             not count, or null), in an order that depends on the lists alone
    asked    JSON values from which `pipeline.datasets.catalogue.corpus_of` makes the same corpus again; key `dataset`
    clip_seconds  length of a row; None where the mel spec decides
    notes    sentences that whoever builds should read, such as lines of a list that were left out
    """

    plan: pl.DataFrame
    sources: Sources
    classes: ClassList
    asked: dict[str, Any]
    clip_seconds: float | None = None
    notes: tuple[str, ...] = ()
