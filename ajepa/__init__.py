"""Batches in, representations out: `ajepa.load("RUN").embed(["a.mp3"])`."""

TYPE_CHECKING = False  # true for type checkers, as in `typing`, whose import would be half of this one's time
if TYPE_CHECKING:
    from pathlib import Path

    from ajepa.embed.embedder import Embedder
    from ajepa.model.pooling import EncoderLayer, PoolingName

    __version__: str

__all__ = ["__version__", "load"]


def load(
    place: "str | Path",
    *,
    at: str | int = "last",
    device: str = "auto",
    pooling: "PoolingName | None" = None,
    layer: "EncoderLayer | str | None" = None,
    overlap: float = 0.5,
) -> "Embedder":
    """Load the encoder of a run, an export or ORG/NAME on the hub, ready for sounds.

    `at` is the checkpoint of a run: last, best (by probe), init (random, before the first step), or the number of a
    kept step. `pooling` and `layer` are those that probes found best when the run was trained, unless others are asked
    for; `overlap` is the share of a window that the next one repeats (`ajepa.embed.embedder.Embedder`). Torch is
    imported when this is called, so that `import ajepa` costs nothing.
    """
    from ajepa.embed.embedder import load

    return load(place, at=at, device=device, pooling=pooling, layer=layer, overlap=overlap)


def __getattr__(name: str) -> object:
    """Look the version up when it is asked for: the import that finds it takes longer than this package's own."""
    if name != "__version__":
        raise AttributeError(f"module 'ajepa' has no attribute {name!r}")
    from importlib.metadata import version

    return version("ajepa")
