"""Small stores: built from a folder, and compared byte by byte."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from pipeline import object_store
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.audioset import audioset_corpus
from pipeline.datasets.corpus import Corpus

if TYPE_CHECKING:  # processes that build stores import this file, and no pytest
    import pytest


def corpus_in(folder: Path) -> Corpus:
    """What a folder of this shape holds."""
    segments = [folder / "a_train_segments.csv", folder / "eval_segments.csv"]
    return audioset_corpus([folder / "audio"], segments)


def build(folder: Path, out: Path, *, dtype: str = "float16", spec: str = "a-jepa", **how) -> pl.DataFrame:
    """Build `out` from a corpus of this folder's shape in this process; returns the manifest."""
    output = StoreOutput(path=out, spec=preset_mel_spec(spec), dtype=dtype)
    return build_store(corpus_in(folder), output, BuildOptions(**{"workers": 0} | how))


def point_at_no_server(patch: pytest.MonkeyPatch) -> None:
    """Let requests go to a port where nobody listens, each twice with short waits instead of for a minute."""
    patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    patch.setattr(object_store, "RETRY_WAIT_SECONDS", (0.0,))
    patch.setattr(object_store, "REQUEST_ATTEMPTS", 2)

    # Clients are kept by the address of their server: one with these settings must not outlive the test.
    patch.setattr(object_store, "_s3_filesystem", object_store._s3_filesystem.__wrapped__)


TOLD_OF_THE_RUN = {
    "build.json",
    "sources.parquet",
}  # times and paths: the files that may differ between equal stores


def files_of(store: Path) -> set[str]:
    return {str(p.relative_to(store)) for p in store.rglob("*") if p.is_file()} - TOLD_OF_THE_RUN


def assert_same_bytes(one: Path, other: Path) -> None:
    assert files_of(one) == files_of(other)
    differing = filecmp.cmpfiles(one, other, sorted(files_of(one)), shallow=False)[1:]
    assert differing == ([], [])
