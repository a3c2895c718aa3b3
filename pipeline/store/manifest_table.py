"""The manifest of an open store, of which each column is read when it is first needed."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl

from pipeline.errors import StoreError
from pipeline.store.manifest import check_manifest_schema
from pipeline.tables import read_table, read_table_schema


class ManifestTable:
    """The manifest in a file, or in a frame that is given.

    For 2,084,320 rows the whole table takes 0.5 GB and seconds to read; training needs 50 MB of it. Columns that have
    been read are kept, except texts: of splits and states, only the numbers are kept. Raises StoreError if a
    column cannot be read.
    """

    def __init__(self, path: Path, store_id: str, frame: pl.DataFrame | None = None) -> None:
        self.store_id = store_id
        self._path = path
        self._number_columns: dict[str, pl.Series] = {}
        if frame is not None:
            self.frame = frame

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Return the manifest in a file; None if the build of its store has not finished.

        StoreError if the file cannot be read, ManifestError if it has other columns.
        """
        schema, metadata = read_table_schema(path)
        if "store_id" not in metadata:
            return None
        check_manifest_schema(schema, path)
        return cls(path, metadata["store_id"])

    @cached_property
    def frame(self) -> pl.DataFrame:
        """The whole table."""
        return self._read(None)

    def columns(self, *names: str) -> pl.DataFrame:
        """Return some columns of all rows."""
        # The whole table may be in memory already.
        if "frame" in self.__dict__:
            return self.frame.select(names)

        # Numbers are kept, because they are small and are needed again.
        columns = dict(self._number_columns)
        missing = [name for name in names if name not in columns]
        if missing:
            read = {column.name: column for column in self._read(missing)}
            self._number_columns |= {
                name: column for name, column in read.items() if column.dtype.is_numeric()
            }
            columns |= read
        return pl.DataFrame([columns[name] for name in names])

    def _read(self, names: Sequence[str] | None) -> pl.DataFrame:
        """Read columns; StoreError if the file is no longer the one that was opened."""
        frame, metadata = read_table(self._path, names)
        if metadata.get("store_id") != self.store_id:
            raise StoreError(
                f"{self._path.parent}: has been built anew since it was opened; start this command again"
            )
        return frame

    @cached_property
    def split_names(self) -> tuple[str, ...]:
        """The splits, in the order in which they first occur."""
        return self._splits[0]

    @cached_property
    def split_N(self) -> np.ndarray:
        """The number of each row's split in `split_names`, uint16 or wider."""
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[tuple[str, ...], np.ndarray]:
        split = self.columns("split").to_series()
        names = tuple(split.unique(maintain_order=True))
        numbers = split.cast(pl.Enum(names)).to_physical()
        dtype = np.uint16 if len(names) <= np.iinfo(np.uint16).max else np.uint32
        return names, numbers.to_numpy().astype(dtype)

    @cached_property
    def good_N(self) -> np.ndarray:
        """Whether each row is good, bool."""
        return (self.columns("status").to_series() == "good").to_numpy()
