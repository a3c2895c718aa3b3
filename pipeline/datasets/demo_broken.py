"""The demo corpus's few broken and odd inputs: one of each kind, and what a build must make of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.datasets.demo_clips import Clip
from pipeline.datasets.demo_files import CONTAINERS

UNKNOWN_MID = "/m/0unknown"
HTML = "<!DOCTYPE html>\n<html><body><h1>429 Too Many Requests</h1></body></html>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What is wrong, how it must come out (good, unlisted, or a reason to fail), and in which container it is."""

    name: str
    expected: str
    what: str
    container: str = ""
    extension: str = ""  # where it is not the container's own


SHORTENED = "a wav whose header declares 2.5 times what is there"
WEB_PAGE = "the web page that a refused download leaves, named .m4a"
TWICE = "an id for the second time in one list, with other labels: the first row counts"
BOTH = "an id of the eval list in the train list too: the eval row counts"

# Beside the good clips: these rows and files come on top of the number asked for.
EXTRA_FILES = (
    Kind(name="empty_file", expected="unreadable", what="a file of 0 bytes", container="wav-16"),
    Kind(name="truncated_wav", expected="truncated", what=SHORTENED, container="wav-16"),
    Kind(name="html_as_m4a", expected="unreadable", what=WEB_PAGE, container="m4a"),
    Kind(name="missing_file", expected="missing", what="a row without a file", container="flac"),
    Kind(name="digital_silence", expected="silent", what="ten seconds of zeros", container="flac"),
    Kind(name="nan_float", expected="non_finite", what="a float wav with NaN in it", container="wav-float"),
    Kind(name="unlisted_file", expected="unlisted", what="a file that no list names", container="flac"),
)
EXTRA_ROWS = (
    Kind(name="duplicate_id", expected="duplicate", what=TWICE),
    Kind(name="in_both_lists", expected="duplicate", what=BOTH),
)
# Among the good clips: usable, only odd.
ODD_CLIPS = (
    Kind(
        name="wrong_extension", expected="good", what="a flac named .wav", container="flac", extension="wav"
    ),
    Kind(name="unknown_label", expected="good", what=f"a label outside the class list, {UNKNOWN_MID}"),
)


def with_kind(clip: Clip, kind: Kind) -> Clip:
    """The clip as one of this kind: in another container and under another name where the kind asks for it."""
    clip = replace(clip, kind=kind.name, expected=kind.expected)
    if not kind.container:
        return clip
    extension = kind.extension or CONTAINERS[kind.container].extension
    file = str(PurePosixPath(clip.file).with_suffix(f".{extension}"))
    return replace(clip, container=kind.container, file=file)


def extra_rows(trains: Sequence[Clip], evals: Sequence[Clip]) -> list[Clip]:
    """The rows of the train list that name a clip which stands elsewhere already, in the order of EXTRA_ROWS."""
    twice = replace(trains[0], labels=trains[3].labels)
    both = replace(evals[0], split=trains[0].split)
    return [with_kind(clip, kind) for clip, kind in zip((twice, both), EXTRA_ROWS, strict=True)]


def odd_clips(trains: Sequence[Clip]) -> list[Clip]:
    """The clips, the second and third of them made odd as ODD_CLIPS says."""
    wrong, unknown = (with_kind(clip, kind) for clip, kind in zip(trains[1:3], ODD_CLIPS, strict=True))
    return [trains[0], wrong, replace(unknown, labels=(*unknown.labels, UNKNOWN_MID)), *trains[3:]]


def spoil_wave(wave_SN: np.ndarray, kind: str) -> np.ndarray:
    """The samples as a clip of this kind has them."""
    if kind == "digital_silence":
        return np.zeros_like(wave_SN)
    return wave_SN


def spoil_file(path: Path, kind: str) -> None:
    """Make a good file into one of this kind."""
    match kind:
        case "empty_file":
            path.write_bytes(b"")
        case "truncated_wav":
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
        case "html_as_m4a":
            path.write_text(HTML, encoding="utf-8")
        case "missing_file":
            path.unlink()
        case "nan_float":
            content = bytearray(path.read_bytes())
            content[-40_000:-36_000] = np.full(1_000, np.nan, dtype="<f4").tobytes()
            path.write_bytes(content)
