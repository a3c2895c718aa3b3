"""Segments list: AudioSet's official CSV files, as published and as damaged -> the rows of a plan.

A plan is a frame with the columns of `pipeline.manifest.PLAN_SCHEMA` plus `mids` (list of class ids) and
`duplicate` (why the row does not count, or null), in the order of the lists.
"""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from pipeline.errors import ManifestError

MID_PATTERN = r"[^,\s](?:[^,]*[^,\s])?"

MAX_END_SECONDS = 1e6  # a list with later ends is damaged, or in other units

YOUTUBE_ID_PATTERN = r"^[A-Za-z0-9_-]{11}$"

DAMAGED_LINES_SHOWN = 3  # damaged lines that a note shows

LIST_BLOCK_BYTES = 2**22  # of a list, read at a time: some 80,000 rows


def read_segment_list(path: Path, *, lenient: bool = False) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """One official segments list as clip_id, split, start_seconds, end_seconds, mids; and notes on it.

    The split is the file's name without `_segments`. Lines starting with `# ` count as comments only before
    the first row. A line that is none is a ManifestError which names it and says why; `lenient` leaves such
    lines out instead, and a note tells how many there are and shows the first.
    """
    blocks = list(read_segment_blocks(path))
    rows, bad = (pl.concat(parts) for parts in zip(*blocks, strict=True))
    return rows, check_damaged_lines(path, rows.height, bad, lenient=lenient)


def read_segment_blocks(path: Path) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """The same list part by part, each with its damaged lines (`line`, `text`, `why`), which are not among its rows.

    Memory does not grow with the list. Raises ManifestError for a list that cannot be read or has no line of a row.
    """
    for lines in read_line_blocks(path):
        rows = lines.select("line", segment_line_fields()).unnest("cells")
        rows = rows.select(
            "line",
            clip_id="a",
            split=pl.lit(split_from_filename(path)),
            start_seconds=pl.col("b").cast(pl.Float64, strict=False),
            end_seconds=pl.col("c").cast(pl.Float64, strict=False),
            mids=pl.col("d").fill_null("").str.extract_all(MID_PATTERN),
        )
        bad = find_damaged_lines(rows, lines)
        if not bad.is_empty():
            rows = rows.join(bad, on="line", how="anti", maintain_order="left")
        yield rows.drop("line"), bad


def segment_line_fields() -> pl.Expr:
    """Id, start, end and labels of each `text` as `cells`, fields a to d; all null where it is no such line.

    Blanks around each and quotes around the labels go. A line may have no labels, and no quote within them. Split
    rather than matched by a regular expression, which takes six times as long.
    """
    parts = pl.col("text").str.splitn(",", 4)
    a, b, c, d = (parts.struct.field(f"field_{place}").str.strip_chars() for place in range(4))
    d = d.str.strip_prefix('"').str.strip_suffix('"').fill_null("")
    whole = c.is_not_null() & ~d.str.contains('"', literal=True)
    return pl.when(whole).then(pl.struct(a=a, b=b, c=c, d=d)).alias("cells")


def split_from_filename(path: Path) -> str:
    """The split that a list's name gives."""
    return path.stem.removesuffix("_segments")


def check_damaged_lines(
    path: Path, good_row_count: int, damaged_lines: pl.DataFrame, *, lenient: bool
) -> tuple[str, ...]:
    """The note on a list's damaged lines, if it has any; ManifestError unless `lenient`, and where none is good."""
    if damaged_lines.is_empty():
        return ()
    if lenient and good_row_count:
        return (damaged_lines_note(path, damaged_lines),)
    line, text, why = damaged_lines.select("line", "text", "why").row(0)
    raise ManifestError(
        f"{path}: line {line}: {why}, found {text!r} ({damaged_lines.height} of {good_row_count + damaged_lines.height} rows are bad)"
    )


def read_line_blocks(path: Path) -> Iterator[pl.DataFrame]:
    """The lines that should be rows: `line` from 1, and `text`; raises ManifestError where there are none.

    Bytes that are no UTF-8 become the replacement character, and so damage no more than their line.
    """
    first, rows_begun = 1, False
    for content in _read_byte_blocks(path):
        text = content.removeprefix(codecs.BOM_UTF8 if first == 1 else b"").decode(errors="replace")
        lines = pl.DataFrame({"text": [text]}, schema={"text": pl.String}).select(
            pl.col("text").str.split("\n").explode().str.strip_suffix("\r")
        )
        lines = lines.with_row_index("line", offset=first)
        first += content.count(b"\n")
        lines = lines.filter(pl.col("text").str.strip_chars() != "")
        if not rows_begun:
            lines = lines.filter((~pl.col("text").str.starts_with("# ")).cum_sum() > 0)
        if not lines.is_empty():
            rows_begun = True
            yield lines
    if not rows_begun:
        raise ManifestError(
            f'{path}: no rows; expected lines like: 09L1eY6gYl5, 30.000, 40.000, "/m/04rlf,/m/09x0r"'
        )


def _read_byte_blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes in blocks that end with a line."""
    try:
        with path.open("rb") as file:
            while block := file.read(LIST_BLOCK_BYTES):
                yield block + file.readline()
    except OSError as error:
        raise ManifestError(f"{path}: not a readable segments list ({error.strerror})") from None


def find_damaged_lines(rows: pl.DataFrame, lines: pl.DataFrame) -> pl.DataFrame:
    """The rows that are none: `line`, its `text`, and `why`."""
    good_id = pl.col("clip_id").str.contains(YOUTUBE_ID_PATTERN).fill_null(False)
    start, end = pl.col("start_seconds"), pl.col("end_seconds")
    good_times = ((start >= 0) & (end > start) & (end < MAX_END_SECONDS)).fill_null(False)
    bad = rows.select("line", good_id=good_id, good_times=good_times).filter(
        ~pl.col("good_id") | ~pl.col("good_times")
    )
    text = pl.col("text")
    return bad.join(lines, on="line", how="left", maintain_order="left").select(
        "line",
        text=text.str.slice(0, 60),
        why=pl.when("good_id")
        .then(pl.lit("expected times, start before end, in seconds"))
        .when(text.str.contains("#NAME", literal=True))
        .then(pl.lit("a spreadsheet has damaged the id: download the list again"))
        .when(text.str.contains("\0", literal=True))
        .then(pl.lit("holds NUL bytes, as of another encoding: download the list again"))
        .when(text.str.contains("\N{REPLACEMENT CHARACTER}", literal=True))
        .then(pl.lit("is not UTF-8: download the list again"))
        .otherwise(pl.lit("expected a YouTube id of 11 characters")),
    )


def damaged_lines_note(path: Path, damaged_lines: pl.DataFrame) -> str:
    """The sentence on lines that are left out."""
    shown = "; ".join(
        f"line {line}: {why}, found {text!r}"
        for line, text, why in damaged_lines.head(DAMAGED_LINES_SHOWN).rows()
    )
    more = (
        f"; and {damaged_lines.height - DAMAGED_LINES_SHOWN} more"
        if damaged_lines.height > DAMAGED_LINES_SHOWN
        else ""
    )
    return f"{path}: {damaged_lines.height} damaged lines left out ({shown}{more})"


def plan_segment_lists(
    segments: Sequence[Path], *, lenient: bool = False
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """The rows of all lists in their order, those that do not count marked in `duplicate`; and notes on the lists.

    An id twice in one list: the first row counts. An id in a list for evaluation and another: evaluation counts.
    """
    names = [path.stem for path in segments]
    if len(set(names)) < len(names):
        raise ManifestError(
            f"two segments lists share a name, which names the split: {sorted(names)}; rename one"
        )
    read = [read_segment_list(path, lenient=lenient) for path in segments]
    plan = pl.concat([rows for rows, _ in read])
    again = mark_duplicate_rows(plan.with_row_index("row").filter(pl.col("clip_id").is_duplicated()))
    plan = plan.with_row_index("row").join(again, on="row", how="left", maintain_order="left").drop("row")
    return plan, tuple(note for _, notes in read for note in notes)


def mark_duplicate_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """`row` and `duplicate` of the rows whose id stands more than once."""
    evaluation = pl.col("split").str.contains("(^|_)eval")
    first = pl.int_range(pl.len()).over("clip_id", "split") == 0
    elsewhere = evaluation.any().over("clip_id") & ~evaluation
    earlier = pl.col("split").first().over("clip_id")
    return rows.select(
        "row",
        duplicate=pl.when(elsewhere)
        .then(pl.lit("the id is also in the evaluation list, where it counts"))
        .when(~first)
        .then(pl.lit("the id stands earlier in the same list, where it counts"))
        .when(earlier != pl.col("split"))
        .then(
            pl.when(evaluation)
            .then(pl.lit(None))
            .otherwise("the id stands in list " + earlier + ", where it counts")
        ),
    )
