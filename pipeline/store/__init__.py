"""The feature store on disk. `pipeline.store.FeatureStore` reads one; `feature_store.py` documents every file in it."""

TYPE_CHECKING = False  # type checkers take it as true, as in `typing`, which is slow to import
if TYPE_CHECKING:
    from pipeline.store.feature_store import FeatureStore as FeatureStore


def __getattr__(name: str) -> object:
    """Import `FeatureStore` when it is first used, so that the files of this folder may import one another."""
    if name != "FeatureStore":
        raise AttributeError(f"module 'pipeline.store' has no attribute {name!r}")
    from pipeline.store.feature_store import FeatureStore

    return FeatureStore
