"""A small store, built once for all tests, and the lists and files that it came from."""

import gc
import os
from pathlib import Path

import pytest
from bucket import serving_bucket
from corpus import write_corpus
from stores import build

from pipeline.labels.label_sets import propagate_store_labels
from pipeline.store.feature_store import FeatureStore

# Processors differ: some have bf16 in hardware. A test that depends on the precision names it; the others, and the
# processes that they start, compute in fp32 everywhere.
os.environ["AJEPA_PRECISION"] = os.environ.get("AJEPA_TEST_PRECISION", "fp32")

# Tests start a hundred processes. Each compiles what it imports of this project again where Python may not keep it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="session")
def store_path(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "tiny.zarr"
    build(corpus, out)
    propagate_store_labels(out)
    return out


@pytest.fixture(scope="session")
def other_store_path(tmp_path_factory) -> Path:
    """A smaller store of the same kind, of other clips."""
    folder = tmp_path_factory.mktemp("other")
    build(write_corpus(folder / "corpus", clips=24), folder / "other.zarr")
    propagate_store_labels(folder / "other.zarr")
    return folder / "other.zarr"


@pytest.fixture(scope="session")
def uint8_store_path(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "tiny-uint8.zarr"
    build(corpus, out, dtype="uint8")
    return out


@pytest.fixture(scope="session")
def store(store_path) -> FeatureStore:
    return FeatureStore.open(store_path)


@pytest.fixture(scope="module")
def bucket_server():
    """An S3 server for the tests of a file; its address."""
    pytest.importorskip("moto.server", reason="moto is the S3 server of these tests")
    with serving_bucket() as address:
        yield address


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the end-to-end tests first: they take minutes on one worker, while the other one does the rest."""
    items.sort(key=lambda item: "test_end_to_end" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out what has been imported: a million objects of PyTorch, at every collection."""
    gc.freeze()
