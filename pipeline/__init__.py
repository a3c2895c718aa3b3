"""Turn sound files into training batches; this package needs no model. `pipeline.FeatureStore` reads a store."""

TYPE_CHECKING = False  # type checkers take it as true, as in `typing`, which is slow to import
if TYPE_CHECKING:
    from pipeline.store.feature_store import FeatureStore as FeatureStore


def __getattr__(name: str) -> object:
    """Import `FeatureStore` when it is first used, so that `import pipeline` stays fast."""
    if name != "FeatureStore":
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from pipeline.store.feature_store import FeatureStore

    return FeatureStore
