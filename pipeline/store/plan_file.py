"""plan.parquet, the plan of a store with its labels: written with the store, never changed, read by later builds."""

from pathlib import Path

import polars as pl

from pipeline.errors import StoreError
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import PLAN_SCHEMA, compute_plan_id
from pipeline.tables import read_table_schema, read_table_slices, write_table

PLAN_FILE = "plan.parquet"

SOURCES_FILE = "sources.parquet"  # where the sounds are: `pipeline.build.plan_files` reads and writes it

PLAN_FILE_COLUMNS = (*PLAN_SCHEMA, "mids", "duplicate")

ROWS_CHECKED = 65_536  # at a time


def write_plan_file(folder: Path, plan: pl.DataFrame) -> None:
    """Write plan.parquet; `plan` has the columns of `pipeline.datasets.corpus.Corpus.plan`."""
    write_table(folder / PLAN_FILE, plan.select(PLAN_FILE_COLUMNS), {})


def has_valid_plan_file(store: Path, header: StoreHeader) -> bool:
    """Return whether plan.parquet is there, can be read, and is the plan that the header names."""
    try:
        schema, _ = read_table_schema(store / PLAN_FILE)
        if list(schema) != list(PLAN_FILE_COLUMNS):
            return False
        parts = read_table_slices(store / PLAN_FILE, PLAN_FILE_COLUMNS, ROWS_CHECKED)
        return compute_plan_id(parts, shard_clips=header.layout.shard_clips) == header.plan_id
    except StoreError:
        return False
