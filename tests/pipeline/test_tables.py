"""Tables of millions of rows: written and read a part at a time, with the bytes and the values of the whole."""

import itertools
from collections.abc import Iterator

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline import tables
from pipeline.tables import (
    TableRows,
    frame_digest,
    frame_digests,
    read_table,
    write_table,
    writing_table_parts,
)

FRAME = pl.DataFrame(
    {
        "text": [None, "", "a", "a\0b", "\N{SNOWMAN}"] * 40,
        "own": [f"text {number}" for number in range(200)],
        "number": range(200),
        "lists": [[], ["x", "y"], None, ["z"]] * 50,
        "nothing": pl.Series([None] * 200, dtype=pl.String),
    }
)


@pytest.fixture
def small_groups(monkeypatch) -> None:
    """Row groups of 64 rows, and columns of large tables from 10 rows on."""
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 64)
    monkeypatch.setattr(tables, "COLUMNWISE_ROWS", 10)
    monkeypatch.setattr(tables, "ROWS_JOINED", 7)
    monkeypatch.setattr(tables, "ROWS_CONVERTED", 20)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("bounds", [(0, 200), (0, 0, 64, 64, 200), (0, 1, 63, 130, 199, 200)])
def test_parts_have_the_bytes_of_the_whole(tmp_path, bounds):
    """A manifest of a billion rows is never in memory, and nobody can tell."""
    table = FRAME.to_arrow(compat_level=pl.CompatLevel.oldest())
    table = table.replace_schema_metadata({"ajepa": '{"a":1}'})
    options = {"compression": "zstd", "write_page_checksum": True, "row_group_size": 64}
    pq.write_table(table, tmp_path / "whole.parquet", **options)

    def parts() -> Iterator[pl.DataFrame]:
        for first, last in itertools.pairwise(bounds):
            yield FRAME[first:last]

    with writing_table_parts(tmp_path / "parts.parquet", parts(), {"a": 1}):
        assert not (tmp_path / "parts.parquet").exists()
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("rows", [0, 9, 200])
def test_a_large_table_is_read_as_a_small_one(tmp_path, rows):
    """Texts that repeat are read as a dictionary: nulls, empty texts and columns of nulls alone stay what they are."""
    write_table(tmp_path / "x.parquet", FRAME[:rows], {"a": 1})
    frame, metadata = read_table(tmp_path / "x.parquet")
    assert frame.equals(FRAME[:rows])
    assert frame.schema == FRAME.schema
    assert metadata == {"a": 1}
    assert read_table(tmp_path / "x.parquet", ["number", "absent", "text"])[0].columns == ["number", "text"]


def test_a_digest_does_not_depend_on_how_many_texts_are_joined(monkeypatch):
    """The digest is stored in every record of a ledger."""
    whole = frame_digest(FRAME)
    monkeypatch.setattr(tables, "ROWS_JOINED", 3)
    assert frame_digest(FRAME) == whole == "dbe48866867ef301f68c833a21aa42c0"


@pytest.mark.parametrize("heights", [(200,), (0, 3, 0, 7, 190), (1,) * 200])
def test_the_digests_of_frames_that_are_read_together_are_those_of_each(heights):
    """Many records of a ledger are checked at a time; nulls, empty texts and lists count in their own rows."""
    ends = itertools.accumulate(heights)
    slices = [FRAME[end - height : end] for height, end in zip(heights, ends, strict=True)]
    assert frame_digests(FRAME, heights) == [frame_digest(rows) for rows in slices]


@pytest.mark.usefixtures("small_groups")
def test_rows_are_read_in_their_order_as_many_as_are_asked_for(tmp_path):
    """A manifest is read along with the records of its shards; the last part is shorter."""
    write_table(tmp_path / "x.parquet", FRAME, {})
    rows = TableRows(tmp_path / "x.parquet", ("text", "number"))
    parts = [rows.next_rows(count) for count in (1, 0, 64, 100, 70, 5)]
    assert [part.height for part in parts] == [1, 0, 64, 100, 35, 0]
    assert pl.concat(parts).equals(FRAME.select("text", "number"))
