"""Clips in, batches out; knows nothing of models. `pipeline.FeatureStore` is `pipeline.store.FeatureStore`."""


def __getattr__(name: str) -> object:
    """The one name that users need, imported when it is asked for: `import pipeline` costs nothing."""
    if name != "FeatureStore":
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from pipeline.store import FeatureStore

    return FeatureStore
