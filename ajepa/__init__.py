"""Batches in, representations out: `ajepa.load("RUN").embed(["a.mp3"])`."""

TYPE_CHECKING = False  # true for type checkers, as in `typing`, whose import would be half of this one's time
if TYPE_CHECKING:
    from pathlib import Path

    from ajepa.embed.embedder import Embedder


def load(place: "str | Path", *, at: str | int = "last", **how: object) -> "Embedder":
    """The encoder of a run, an export or ORG/NAME on the hub, ready for sounds (`ajepa.embed.embedder`).

    `at` is a run's checkpoint: last, best (by probe), or a step that is kept. All else is imported when this is
    called: `import ajepa` costs nothing, and torch is loaded by who needs it.
    """
    from ajepa.embed.embedder import load

    return load(place, at=at, **how)
