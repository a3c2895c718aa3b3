"""Turn sound files into training batches; this package needs no model. `pipeline.FeatureStore` reads a store."""

TYPE_CHECKING = False  # type checkers take it as true, as in `typing`, which is slow to import
if TYPE_CHECKING:
    from pipeline.loading.batches import open_batches as open_batches
    from pipeline.store.feature_store import FeatureStore as FeatureStore

    __version__: str

__all__ = ["FeatureStore", "__version__", "open_batches"]


def __getattr__(name: str) -> object:
    """Import a name when it is first used, so that `import pipeline` stays fast."""
    if name == "FeatureStore":
        from pipeline.store.feature_store import FeatureStore

        return FeatureStore
    if name == "open_batches":
        from pipeline.loading.batches import open_batches

        return open_batches
    if name == "__version__":
        from importlib.metadata import version

        return version("ajepa")
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
