"""Read AudioSet's segments lists as a plan: the official CSV files, as published or as damaged by spreadsheets.

A plan is a frame with the columns of `pipeline.store.manifest.PLAN_SCHEMA` plus `mids` (list of class ids) and
`duplicate` (why the row does not count, or null), in the order of the lists.
"""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from pipeline.errors import ManifestError

# A class id between commas, without the blanks around it.
MID_PATTERN = r"[^,\s](?:[^,]*[^,\s])?"

# A list with later ends is damaged, or in other units.
MAX_END_SECONDS = 1e6

YOUTUBE_ID_PATTERN = r"^[A-Za-z0-9_-]{11}$"

DAMAGED_LINES_SHOWN = 3  # in a note

# The bytes of a list that are read at a time, about 80,000 rows.
LIST_BLOCK_BYTES = 2**22


# All lists of a data set.


def plan_segment_lists(
    segments: Sequence[Path], *, lenient: bool = False
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Return the rows of all lists in order, and notes on the lists; `duplicate` marks the rows that do not count.

    If an id is in one list twice, its first row counts. If an id is in an evaluation list and in another list, the
    evaluation row counts.
    """
    check_distinct_names([path.stem for path in segments])
    lists = [read_segment_list(path, lenient=lenient) for path in segments]
    plan = pl.concat([rows for rows, _ in lists]).with_row_index("row")

    # Check only ids that occur more than once, and join the results to their rows.
    duplicates = mark_duplicate_rows(plan.filter(pl.col("clip_id").is_duplicated()))
    plan = plan.join(duplicates, on="row", how="left", maintain_order="left").drop("row")
    return plan, tuple(note for _, notes in lists for note in notes)


def check_distinct_names(names: Sequence[str]) -> None:
    """Raise ManifestError if two segments lists share a name: their splits would be mixed."""
    if len(set(names)) < len(names):
        raise ManifestError(
            f"two segments lists share a name, which names the split: {sorted(names)}; rename one"
        )


def mark_duplicate_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """Return `row` and `duplicate` of rows with repeated ids: why the row does not count, or null if it counts."""
    is_evaluation = pl.col("split").str.contains("(^|_)eval")
    is_first_in_list = pl.int_range(pl.len()).over("clip_id", "split") == 0
    evaluation_elsewhere = is_evaluation.any().over("clip_id") & ~is_evaluation
    first_split = pl.col("split").first().over("clip_id")

    # The first reason that applies is given.
    return rows.select(
        "row",
        duplicate=pl.when(evaluation_elsewhere)
        .then(pl.lit("the id is also in the evaluation list, where it counts"))
        .when(~is_first_in_list)
        .then(pl.lit("the id stands earlier in the same list, where it counts"))
        .when(first_split != pl.col("split"))
        .then(
            pl.when(is_evaluation)
            .then(pl.lit(None))
            .otherwise("the id stands in list " + first_split + ", where it counts")
        ),
    )


# One list: its rows, and its damaged lines.


def read_segment_list(path: Path, *, lenient: bool = False) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Return the rows of one official list (clip_id, split, start_seconds, end_seconds, mids), and notes on the list.

    The split is the file's name without `_segments`. Lines starting with `# ` count as comments only before the first
    row. A damaged line raises ManifestError, which names the line and the reason. With `lenient`, damaged lines are
    left out; a note gives their number and shows the first ones.
    """
    row_blocks, damaged_blocks = zip(*read_segment_blocks(path), strict=True)
    rows = pl.concat(row_blocks)
    return rows, check_damaged_lines(path, rows.height, pl.concat(damaged_blocks), lenient=lenient)


def read_segment_blocks(path: Path) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Yield the good rows of a list block by block, each block with its damaged lines (`line`, `text`, `why`).

    Memory does not grow with the list. Raises ManifestError for a list that cannot be read or has no rows.
    """
    for lines in read_line_blocks(path):
        rows = lines.select("line", segment_line_fields()).unnest("cells")

        # A time that is not a number becomes null, which marks the line as damaged.
        rows = rows.select(
            "line",
            clip_id="a",
            split=pl.lit(split_from_filename(path)),
            start_seconds=pl.col("b").cast(pl.Float64, strict=False),
            end_seconds=pl.col("c").cast(pl.Float64, strict=False),
            mids=pl.col("d").fill_null("").str.extract_all(MID_PATTERN),
        )
        damaged = find_damaged_lines(rows, lines)
        if not damaged.is_empty():
            rows = rows.join(damaged, on="line", how="anti", maintain_order="left")
        yield rows.drop("line"), damaged


def split_from_filename(path: Path) -> str:
    """Return the split that a list's file name gives: `eval` for `eval_segments.csv`."""
    return path.stem.removesuffix("_segments")


def read_line_blocks(path: Path) -> Iterator[pl.DataFrame]:
    """Yield the lines that should be rows: `line`, numbered from 1, and `text`; ManifestError if there are none.

    Bytes that are not UTF-8 become the replacement character, so that they damage only their own line.
    """
    first_line = 1
    rows_begun = False
    for content in _read_byte_blocks(path):
        # Split the bytes into numbered lines.
        byte_order_mark = codecs.BOM_UTF8 if first_line == 1 else b""
        text = content.removeprefix(byte_order_mark).decode(errors="replace")
        lines = pl.DataFrame({"text": [text]}, schema={"text": pl.String}).select(
            pl.col("text").str.split("\n").explode().str.strip_suffix("\r")
        )
        lines = lines.with_row_index("line", offset=first_line)
        first_line += content.count(b"\n")

        # Remove blank lines, and the comments at the top.
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
    """Yield a file's bytes in blocks of whole lines."""
    try:
        with path.open("rb") as file:
            while block := file.read(LIST_BLOCK_BYTES):
                yield block + file.readline()
    except OSError as error:
        raise ManifestError(f"{path}: not a readable segments list ({error.strerror})") from None


def segment_line_fields() -> pl.Expr:
    """Return an expression for `cells`, a struct of a, b, c, d: the id, start, end and labels in each `text`.

    All four are null if the line does not have this form. Blanks around each field and quotes around the labels are
    removed. A line may lack labels; they must contain no quote. Splitting takes a sixth of the time of a regular
    expression.
    """
    parts = pl.col("text").str.splitn(",", 4)
    a, b, c, d = (parts.struct.field(f"field_{place}").str.strip_chars() for place in range(4))
    d = d.str.strip_prefix('"').str.strip_suffix('"').fill_null("")
    is_whole = c.is_not_null() & ~d.str.contains('"', literal=True)
    return pl.when(is_whole).then(pl.struct(a=a, b=b, c=c, d=d)).alias("cells")


def find_damaged_lines(rows: pl.DataFrame, lines: pl.DataFrame) -> pl.DataFrame:
    """Return the lines without a good id or good times: `line`, the first 60 characters as `text`, and `why`."""
    good_id = pl.col("clip_id").str.contains(YOUTUBE_ID_PATTERN).fill_null(False)
    start = pl.col("start_seconds")
    end = pl.col("end_seconds")
    good_times = ((start >= 0) & (end > start) & (end < MAX_END_SECONDS)).fill_null(False)
    damaged = rows.select("line", good_id=good_id, good_times=good_times).filter(
        ~pl.col("good_id") | ~pl.col("good_times")
    )

    # Give only one reason; a damaged id takes precedence over damaged times.
    text = pl.col("text")
    return damaged.join(lines, on="line", how="left", maintain_order="left").select(
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


def check_damaged_lines(
    path: Path, good_row_count: int, damaged_lines: pl.DataFrame, *, lenient: bool
) -> tuple[str, ...]:
    """Return a note on a list's damaged lines, if any; ManifestError unless `lenient`, or if no row is good."""
    if damaged_lines.is_empty():
        return ()
    if lenient and good_row_count:
        return (damaged_lines_note(path, damaged_lines),)

    # A file without any good row is not a segments list, so it is refused even with `lenient`.
    line, text, why = damaged_lines.select("line", "text", "why").row(0)
    row_count = good_row_count + damaged_lines.height
    raise ManifestError(
        f"{path}: line {line}: {why}, found {text!r} ({damaged_lines.height} of {row_count} rows are bad)"
    )


def damaged_lines_note(path: Path, damaged_lines: pl.DataFrame) -> str:
    """Return the sentence about damaged lines that are left out."""
    examples = "; ".join(
        f"line {line}: {why}, found {text!r}"
        for line, text, why in damaged_lines.head(DAMAGED_LINES_SHOWN).rows()
    )
    if damaged_lines.height > DAMAGED_LINES_SHOWN:
        examples += f"; and {damaged_lines.height - DAMAGED_LINES_SHOWN} more"
    return f"{path}: {damaged_lines.height} damaged lines left out ({examples})"
