"""Tables for users: the suffix decides, and CSV holds single values alone."""

from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import InputError
from pipeline.table_files import refuse_other_suffix, write_table_file

FRAME = pl.DataFrame(
    {
        "path": ["a.wav", "b,c.wav"],
        "labels": [["dog", "cat"], None],
        "vector": [[0.5, 1.5], None],
        "score": [1.0, None],
    },
    schema_overrides={"vector": pl.Array(pl.Float32, 2)},
)


@pytest.mark.parametrize("name", ["a.parquet", "a.pq", "deep/a.PARQUET"])
def test_parquet_keeps_the_types(name, tmp_path):
    write_table_file(tmp_path / name, FRAME)
    assert pl.read_parquet(tmp_path / name).equals(FRAME)


def test_json_lines_keep_lists_and_nulls(tmp_path):
    write_table_file(tmp_path / "a.jsonl", FRAME)
    assert pl.read_ndjson(tmp_path / "a.jsonl").to_dicts() == FRAME.to_dicts()


def test_csv_has_a_column_for_each_value_of_a_vector(tmp_path):
    """A spreadsheet has no lists; texts are joined as tables of labels are read."""
    write_table_file(tmp_path / "a.csv", FRAME)
    assert (tmp_path / "a.csv").read_text() == (
        'path,labels,vector_0,vector_1,score\na.wav,dog;cat,0.5,1.5,1.0\n"b,c.wav",,,,\n'
    )
    uneven = pl.DataFrame({"frames": [[1.0], [1.0, 2.0]]})
    with pytest.raises(
        InputError, match=r"a\.csv: column frames has lists of different lengths, .*\.parquet"
    ):
        write_table_file(tmp_path / "a.csv", uneven)
    nested = pl.DataFrame({"frames": [[[1.0]], [[2.0]]]})
    with pytest.raises(InputError, match="column frames"):
        write_table_file(tmp_path / "b.csv", nested)
    assert not (tmp_path / "b.csv").exists()


@pytest.mark.parametrize("name", ["a.txt", "a", "a.xlsx", "parquet"])
def test_any_other_suffix_is_refused_with_those_that_there_are(name):
    with pytest.raises(
        InputError, match=r"expected a table, NAME\.parquet, NAME\.pq, NAME\.csv, NAME\.jsonl"
    ):
        refuse_other_suffix(Path(name))
