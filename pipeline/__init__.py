"""Sound files in, training batches out; knows nothing of models. `pipeline.FeatureStore` reads a store."""

TYPE_CHECKING = False  # true for type checkers, as in `typing`, whose import would be most of this one's time
if TYPE_CHECKING:
    from pipeline.store.feature_store import FeatureStore as FeatureStore


def __getattr__(name: str) -> object:
    """Import `FeatureStore` when it is asked for: `import pipeline` costs nothing."""
    if name != "FeatureStore":
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from pipeline.store.feature_store import FeatureStore

    return FeatureStore
