"""Batches in, representations out: `ajepa.load("RUN").embed(["a.mp3"])`."""

TYPE_CHECKING = False  # true for type checkers, as in `typing`, whose import would be half of this one's time
if TYPE_CHECKING:
    from pathlib import Path

    from ajepa.embed.embedder import Embedder


def load(place: "str | Path", *, at: str | int = "last", **options: object) -> "Embedder":
    """Load the encoder of a run, an export or ORG/NAME on the hub, ready for sounds.

    `at` is the checkpoint of a run: last, best (by probe), init (random, before the first step), or the number of a
    kept step. `options` are those of `ajepa.embed.embedder.load`: device, pooling, layer, overlap. Torch is imported
    when this is called, so that `import ajepa` costs nothing.
    """
    from ajepa.embed.embedder import load

    return load(place, at=at, **options)
