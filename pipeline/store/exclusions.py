"""Exclude lists: clips of a store that nobody is to draw; as users write them, and as a store keeps them."""

import hashlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.errors import InputError, StoreError, first_error_line
from pipeline.tables import read_table

EXCLUSIONS_FILE = "excluded.parquet"  # in a store; without a row where the lists have been taken back

EXCLUSIONS_SCHEMA: dict[str, pl.DataType] = {
    "clip_id": pl.String(),
    "split": pl.String(),  # null: wherever the id stands
    "list": pl.String(),  # name of the file that said so
    "sha256": pl.String(),  # of that file
}

EXCLUDE_PARQUET_SUFFIXES = (".parquet", ".pq")

EXCLUDE_TABLE_SUFFIXES = (*EXCLUDE_PARQUET_SUFFIXES, ".csv")

COMMENT_PATTERN = r"\s#.*$"

EXCLUDE_LIST_ERRORS = (OSError, ValueError, pl.exceptions.PolarsError)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExcludeList:
    """A file that names clips: `asked` has their `clip_id`, what of it stands before a comment, and `split` or null."""

    name: str
    sha256: str
    requested_clips: pl.DataFrame

    @classmethod
    def read(cls, path: Path) -> Self:
        """A CSV or Parquet file with a column clip_id and maybe split, or else a text, one id a line.

        In a text, `#` begins a comment at the start of a line or after a space. InputError: not to be read, or
        without a clip.
        """
        try:
            content = path.read_bytes()
            asked = (
                _parse_exclude_table(path, content)
                if path.suffix.lower() in EXCLUDE_TABLE_SUFFIXES
                else _parse_exclude_lines(content)
            )
        except EXCLUDE_LIST_ERRORS as error:
            raise InputError(
                f"{path}: not a readable exclude list ({_error_reason(error, path)}); "
                "expected a text of one clip id a line, or CSV or Parquet with a column clip_id"
            ) from None
        if asked.is_empty():
            raise InputError(f"{path}: names no clip; to take back what is recorded, give --no-exclude")
        return cls(name=path.name, sha256=hashlib.sha256(content).hexdigest(), requested_clips=asked)

    def match_clips(self, manifest: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
        """What it names of a manifest's clips, in EXCLUDED_SCHEMA; and the ids that are not there."""
        known = manifest.select("clip_id", "split").unique()
        whole = self.requested_clips.join(known, on="clip_id", how="semi")
        cut = self.requested_clips.join(known, on="clip_id", how="anti").with_columns(clip_id="bare")
        asked = (
            pl.concat([whole, cut]).unique(["clip_id", "split"], maintain_order=True).with_row_index("line")
        )
        somewhere = pl.col("split").is_null()
        there = pl.concat(
            [
                asked.filter(somewhere).join(known, on="clip_id", how="semi"),
                asked.filter(~somewhere).join(known, on=["clip_id", "split"], how="semi"),
            ]
        )
        unknown = asked.join(there, on="line", how="anti", maintain_order="left")
        told = there.select("clip_id", "split", list=pl.lit(self.name), sha256=pl.lit(self.sha256))
        return told.sort("clip_id", "split"), unknown["clip_id"].to_list()


def _error_reason(error: Exception, path: Path) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_error_line(error, path)


def _parse_exclude_table(path: Path, content: bytes) -> pl.DataFrame:
    if path.suffix.lower() in EXCLUDE_PARQUET_SUFFIXES:
        frame = pl.read_parquet(BytesIO(content))
    else:
        frame = pl.read_csv(BytesIO(content), infer_schema=False).rename(str.strip)
    if "clip_id" not in frame.columns:
        raise ValueError(f"no column clip_id, it has {', '.join(frame.columns)}")
    split = pl.col("split").cast(pl.String).replace("", None) if "split" in frame.columns else pl.lit(None)
    clip_id = pl.col("clip_id").cast(pl.String)
    return frame.select(clip_id, bare=clip_id, split=split.cast(pl.String)).drop_nulls("clip_id")


def _parse_exclude_lines(content: bytes) -> pl.DataFrame:
    lines = pl.Series("clip_id", content.decode("utf-8-sig").splitlines(), dtype=pl.String).str.strip_chars()
    kept = lines.to_frame().filter((pl.col("clip_id") != "") & ~pl.col("clip_id").str.starts_with("#"))
    bare = pl.col("clip_id").str.replace(COMMENT_PATTERN, "").str.strip_chars_end()
    return kept.select("clip_id", bare=bare, split=pl.lit(None, dtype=pl.String))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exclusions:
    """What a store's exclude lists come to; `frame` has EXCLUDED_SCHEMA. Empty where none is recorded.

    The statistics of a store (stats.json) are those of its good clips, excluded ones included: they follow from the
    ledger alone, and a handful of clips moves no mean. So normalisation stays as it is when a list changes.
    """

    frame: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=EXCLUSIONS_SCHEMA))

    @classmethod
    def read_from_store(cls, store: Path) -> Self:
        """What a store says; StoreError where that is not as it was written."""
        path = store / EXCLUSIONS_FILE
        if not path.exists():
            return cls()
        try:
            frame, metadata = read_table(path)
        except StoreError:
            raise damaged_exclusions_error(path) from None
        done = cls(frame=frame)
        if dict(frame.schema) != EXCLUSIONS_SCHEMA or metadata != done.metadata:
            raise damaged_exclusions_error(path)
        return done

    @property
    def metadata(self) -> dict[str, Any]:
        """What stands beside the table in the store."""
        return {"digest": _exclusions_digest(self.frame)}

    @property
    def digest(self) -> str | None:
        """12 hex digits of which clips are left out, whatever list says so; None where none is."""
        clips = self.frame.select("clip_id", "split").unique().sort("clip_id", "split")
        return _exclusions_digest(clips)[:12] if len(clips) else None

    def excluded_mask_N(self, manifest: pl.DataFrame) -> np.ndarray:
        """True at the rows of a manifest that are left out, good or not."""
        rows = manifest.select("clip_id", "split").with_row_index("row")
        somewhere = pl.col("split").is_null()
        marks_N = np.zeros(manifest.height, bool)
        for some, on in ((somewhere, ["clip_id"]), (~somewhere, ["clip_id", "split"])):
            left_out = rows.join(self.frame.filter(some), on=on, how="semi")
            marks_N[left_out["row"].to_numpy()] = True
        return marks_N

    def lists_excluding(self, clip: pl.DataFrame) -> list[str]:
        """The names of the lists that leave a clip out, a row of a manifest."""
        clip_id, split = clip.select("clip_id", "split").row(0)
        named = (pl.col("clip_id") == clip_id) & (pl.col("split").is_null() | (pl.col("split") == split))
        return self.frame.filter(named)["list"].unique().sort().to_list()

    def summarise_lists(self) -> list[tuple[str, str, int]]:
        """Name, sha256 and number of clips of every list."""
        return self.frame.group_by("list", "sha256").len().sort("list", "sha256").rows()


def damaged_exclusions_error(path: Path) -> StoreError:
    """The error of a table of exclusions that cannot be read, or is not as written."""
    return StoreError(
        f"{path}: not as written; record the lists again with: ajepa-data audit-labels {path.parent} "
        "--exclude FILE, or take them back with: --no-exclude"
    )


def _exclusions_digest(frame: pl.DataFrame) -> str:
    """Of texts and nulls, row by row; no text holds the two characters."""
    lines = frame.select(
        pl.concat_str([pl.col(name).fill_null("\x02") for name in frame.columns], separator="\x01")
    )
    return hashlib.sha256("\n".join(lines.to_series()).encode()).hexdigest()
