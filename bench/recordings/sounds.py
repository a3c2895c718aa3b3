"""A labelled recording, and what the finders of a task share."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

Roots = Callable[[str], Path]  # the folder of an unpacked package


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """A labelled recording as the bytes of a sound file; all sounds of a source share a split."""

    name: str  # unique in its task, with the extension
    label: str
    source: str
    package: str
    data: bytes


def first_match(rules: dict[str, str], text: str) -> str | None:
    """The first label whose pattern is found in the lower-case text."""
    return next((label for label, pattern in rules.items() if re.search(pattern, text.lower())), None)


def encode(wave_S: np.ndarray, rate_hz: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.clip(wave_S, -1, 1), rate_hz, subtype="PCM_16", format="WAV")
    return file.getvalue()


def sound_files(root: Path) -> list[Path]:
    """Regular sound files below a folder in the order of their names."""
    endings = {".wav", ".flac", ".ogg", ".aiff", ".wv"}
    return [path for path in sorted(root.rglob("*")) if path.suffix in endings and path.is_file()]
