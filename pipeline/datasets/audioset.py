"""AudioSet as people have it: segments lists and loose files -> a plan, and where each clip lies.

A plan is a frame with the columns of `pipeline.manifest.PLAN_SCHEMA` plus `mids` (list of class ids) and
`duplicate` (why the row does not count, or null), in the order of the lists.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from pipeline.corpus import Corpus
from pipeline.errors import InputError, ManifestError
from pipeline.locators import Sources
from pipeline.ontology import load_class_list

# Containers by how much they lose: among several files of one clip the first of this list is taken.
EXTENSIONS = (
    "flac",
    "wav",
    "aiff",
    "aif",
    "w64",
    "caf",
    "mka",
    "m4a",
    "mp4",
    "aac",
    "opus",
    "webm",
    "ogg",
    "mp3",
)
ROW = r'^\s*([^,]*?)\s*,\s*([^,]*?)\s*,\s*([^,]*?)\s*(?:,\s*"?([^"]*?)"?\s*)?$'
LONGEST_SECONDS = 1e6  # a list with later ends is damaged, or in other units
YOUTUBE_ID = r"^[A-Za-z0-9_-]{11}$"
NAME = (  # [Y]<id>[_<start>[_<end>]]; never split on "_": 14 % of the ids contain one
    r"^(?P<y>Y?)(?P<id>[A-Za-z0-9_-]{11})(?:_(?P<start>\d+(?:\.\d+)?)(?:_\d+(?:\.\d+)?)?)?$"
)


def read_segments(path: Path) -> pl.DataFrame:
    """One official segments list as clip_id, split, start_seconds, end_seconds, mids; raises ManifestError.

    The split is the file's name without `_segments`. Lines starting with `# ` count as comments only before
    the first row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: not a readable segments list ({error})") from None
    lines = pl.DataFrame({"text": text.splitlines()}, schema={"text": pl.String}).with_row_index(
        "line", offset=1
    )
    lines = lines.filter(pl.col("text").str.strip_chars() != "")
    lines = lines.filter((~pl.col("text").str.starts_with("# ")).cum_sum() > 0)
    rows = lines.with_columns(
        pl.col("text").str.extract_groups(ROW).struct.rename_fields(list("abcd"))
    ).unnest("text")
    rows = rows.select(
        "line",
        clip_id="a",
        split=pl.lit(path.stem.removesuffix("_segments")),
        start_seconds=pl.col("b").cast(pl.Float64, strict=False),
        end_seconds=pl.col("c").cast(pl.Float64, strict=False),
        mids=pl.col("d").fill_null("").str.split(",").list.eval(pl.element().str.strip_chars()),
    ).with_columns(pl.col("mids").list.filter(pl.element() != ""))
    _refuse_damage(rows, lines, path)
    return rows.drop("line")


def _refuse_damage(rows: pl.DataFrame, lines: pl.DataFrame, path: Path) -> None:
    if rows.is_empty():
        raise ManifestError(
            f'{path}: no rows; expected lines like: 09L1eY6gYl5, 30.000, 40.000, "/m/04rlf,/m/09x0r"'
        )
    good_id = pl.col("clip_id").str.contains(YOUTUBE_ID).fill_null(False)
    start, end = pl.col("start_seconds"), pl.col("end_seconds")
    good_times = ((start >= 0) & (end > start) & (end < LONGEST_SECONDS)).fill_null(False)
    bad = rows.with_columns(good_id=good_id, good_times=good_times).filter(
        ~pl.col("good_id") | ~pl.col("good_times")
    )
    if bad.is_empty():
        return
    line, fine_id = bad.select("line", "good_id").row(0)
    text = lines.filter(pl.col("line") == line).item(0, "text")
    what = "times" if fine_id else "a YouTube id of 11 characters"
    hint = "; a spreadsheet has damaged it: download the list again" if "#NAME" in text else ""
    raise ManifestError(
        f"{path}: line {line}: expected {what}, found {text[:60]!r}{hint} ({bad.height} of {rows.height} rows are bad)"
    )


def plan_clips(segments: Sequence[Path]) -> pl.DataFrame:
    """The rows of all lists in their order, those that do not count marked in `duplicate`.

    An id twice in one list: the first row counts. An id in a list for evaluation and another: evaluation counts.
    """
    names = [path.stem for path in segments]
    if len(set(names)) < len(names):
        raise ManifestError(
            f"two segments lists share a name, which names the split: {sorted(names)}; rename one"
        )
    plan = pl.concat([read_segments(path) for path in segments])
    evaluation = pl.col("split").str.contains("(^|_)eval")
    first = pl.int_range(pl.len()).over("clip_id", "split") == 0
    elsewhere = evaluation.any().over("clip_id") & ~evaluation
    earlier = pl.col("split").first().over("clip_id")
    return plan.with_columns(
        duplicate=pl.when(elsewhere)
        .then(pl.lit("the id is also in the evaluation list, where it counts"))
        .when(~first)
        .then(pl.lit("the id stands earlier in the same list, where it counts"))
        .when(earlier != pl.col("split"))
        .then(
            pl.when(evaluation)
            .then(pl.lit(None))
            .otherwise("the id stands in list " + earlier + ", where it counts")
        )
    )


def audioset(audio: Sequence[Path | str], segments: Sequence[Path | str]) -> Corpus:
    """AudioSet, or any set in its shape: folders of sounds and official segments lists; raises InputError."""
    plan = plan_clips([Path(path) for path in segments])
    return Corpus(
        plan=plan,
        sources=find_sources(plan, [Path(path) for path in audio]),
        classes=load_class_list(),
        asked={
            "dataset": "audioset",
            "audio": [str(path) for path in audio],
            "segments": [str(path) for path in segments],
        },
    )


def find_sources(plan: pl.DataFrame, folders: Sequence[Path]) -> Sources:
    """Match loose files to the rows of `plan` by their names; raises InputError where nothing matches.

    Understood: `<id>`, `Y<id>`, either followed by `_<start>` or `_<start>_<end>` in seconds or milliseconds,
    with any audio extension, in any folders below. Among several files of one clip: one below a folder named
    for the row's split before others, then the container that loses least, then the order of names.
    """
    files = pl.DataFrame(
        [(str(folder), name) for folder in folders for name in walk(folder)],
        schema={"folder": pl.String, "name": pl.String},
        orient="row",
    ).with_row_index("file")
    if files.is_empty():
        raise InputError(
            f"no audio files below {', '.join(map(str, folders))}; looked for {', '.join('.' + e for e in EXTENSIONS)}"
        )
    named = files.with_columns(
        extension=pl.col("name").str.extract(r"\.([^./]+)$").str.to_lowercase(),
        parts=pl.col("name").str.extract(r"^(?:.*/)?([^/]*)\.[^./]+$").str.extract_groups(NAME),
    ).unnest("parts")
    best = _best_files(plan.with_row_index("row").filter(pl.col("duplicate").is_null()), named)
    if best.is_empty():
        examples = ", ".join(files["name"].head(5))
        raise InputError(
            f"none of {files.height} audio files below {', '.join(map(str, folders))} belongs to a clip of the lists; "
            f"looked for names like {plan['clip_id'][0]}.wav, found {examples}"
        )
    rows = pl.DataFrame({"row": range(plan.height)}, schema={"row": pl.UInt32})
    rows = rows.join(best, on="row", how="left", maintain_order="left")
    listed = named.join(plan.select(id="clip_id"), on="id", how="semi")
    return Sources(
        frame=rows.select(
            kind=pl.when(pl.col("name").is_not_null()).then(pl.lit("file")),
            path=pl.col("folder") + "/" + pl.col("name"),
            source="name",
        ),
        files=files.height,
        unmatched=files.join(listed, on="file", how="anti")["name"].to_list(),
    )


def _best_files(rows: pl.DataFrame, named: pl.DataFrame) -> pl.DataFrame:
    start = pl.col("start").cast(pl.Float64)
    agrees = start.is_null() | (start == pl.col("start_seconds")) | (start == pl.col("start_seconds") * 1000)
    rank = pl.col("extension").replace_strict(
        {e: i for i, e in enumerate(EXTENSIONS)}, default=len(EXTENSIONS)
    )
    in_split = ("/" + pl.col("folder") + "/" + pl.col("name")).str.contains("/" + pl.col("split") + "/")
    matched = rows.join(named, left_on="clip_id", right_on="id", how="inner").filter(agrees)
    matched = matched.with_columns(other_split=~in_split, rank=rank).sort(
        "row", "other_split", "rank", "name", "file"
    )
    return matched.unique("row", keep="first", maintain_order=True).select("row", "folder", "name")


def walk(folder: Path) -> Iterator[str]:
    """Every audio file below `folder` as a path relative to it, links to nowhere included, in a fixed order.

    Folders are followed through links, each once. InputError for a folder that cannot be listed: its clips
    would be taken for missing.
    """
    if not folder.is_dir():
        raise InputError(f"--audio {folder}: no such folder")
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_unlisted):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in EXTENSIONS:
                yield _utf8(os.path.relpath(Path(parent, name), folder))


def _refuse_unlisted(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it away"
    )


def _utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name!a}: the name is not UTF-8; rename the file") from None
    return name
