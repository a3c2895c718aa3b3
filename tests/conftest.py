"""A small store, built once for all tests, and the lists and files that it came from."""

from pathlib import Path

import polars as pl
import pytest
from corpus import write_corpus

from pipeline.build import Build, build_store
from pipeline.datasets.audioset import audioset
from pipeline.labels import propagate_labels
from pipeline.melspec import mel_spec
from pipeline.store import FeatureStore


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def build(corpus: Path, out: Path, *, workers: int = 0, dtype: str = "float16", **policy) -> pl.DataFrame:
    """Build `out` from a corpus of this folder's shape; returns the manifest."""
    wish = Build(spec=mel_spec("a-jepa"), dtype=dtype, workers=workers, **policy)
    segments = [corpus / "a_train_segments.csv", corpus / "eval_segments.csv"]
    return build_store(audioset([corpus / "audio"], segments), out, wish)


@pytest.fixture(scope="session")
def store_path(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "tiny.zarr"
    build(corpus, out)
    propagate_labels(out)
    return out


@pytest.fixture(scope="session")
def uint8_store_path(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "tiny-uint8.zarr"
    build(corpus, out, dtype="uint8")
    return out


@pytest.fixture(scope="session")
def store(store_path) -> FeatureStore:
    return FeatureStore.open(store_path)
