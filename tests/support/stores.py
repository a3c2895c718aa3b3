"""Small stores: built from a folder, and compared byte by byte."""

import filecmp
from pathlib import Path

import polars as pl

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.audioset import audioset_corpus
from pipeline.datasets.corpus import Corpus


def corpus_in(folder: Path) -> Corpus:
    """What a folder of this shape holds."""
    segments = [folder / "a_train_segments.csv", folder / "eval_segments.csv"]
    return audioset_corpus([folder / "audio"], segments)


def build(folder: Path, out: Path, *, dtype: str = "float16", spec: str = "a-jepa", **how) -> pl.DataFrame:
    """Build `out` from a corpus of this folder's shape in this process; returns the manifest."""
    output = StoreOutput(path=out, spec=preset_mel_spec(spec), dtype=dtype)
    return build_store(corpus_in(folder), output, BuildOptions(**{"workers": 0} | how))


BUCKET = "ajepa-tests"


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
