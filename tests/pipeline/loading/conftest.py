"""The small store, once for each dtype."""

import pytest

from pipeline.store.feature_store import FeatureStore


@pytest.fixture(scope="session", params=["float16", "uint8"])
def any_store(request) -> FeatureStore:
    fixture = {"float16": "store_path", "uint8": "uint8_store_path"}[request.param]
    return FeatureStore.open(request.getfixturevalue(fixture))
