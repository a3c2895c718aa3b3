"""Exclude lists, which name clips that no loader may draw: the files of users, and the record in a store."""

import hashlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.errors import InputError, StoreError, first_error_line
from pipeline.tables import read_table

EXCLUSIONS_FILE = "excluded.parquet"  # in a store; it has no rows after the lists have been removed

EXCLUSIONS_SCHEMA: dict[str, pl.DataType] = {
    "clip_id": pl.String(),
    "split": pl.String(),  # null: in every split that has the id
    "list": pl.String(),  # name of the file that names the clip
    "sha256": pl.String(),  # SHA-256 of that file
}

EXCLUDE_PARQUET_SUFFIXES = (".parquet", ".pq")

EXCLUDE_TABLE_SUFFIXES = (*EXCLUDE_PARQUET_SUFFIXES, ".csv")

COMMENT_PATTERN = r"\s#.*$"

# Every error that parsing a damaged list may raise.
EXCLUDE_LIST_ERRORS = (OSError, ValueError, pl.exceptions.PolarsError)

IN_EVERY_SPLIT = pl.col("split").is_null()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExcludeList:
    """An exclude list: a file that names clips.

    `requested_clips` has the columns `clip_id` (the text in the file), `bare` (that text without a comment) and `split`
    (null if the file names no split).
    """

    name: str
    sha256: str
    requested_clips: pl.DataFrame

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a CSV or Parquet file with the column clip_id and optionally split, or a text file of one id per line.

        In a text file, `#` begins a comment at the start of a line or after a space. InputError if the file cannot be
        read, or names no clip.
        """
        # The content is read once, so that the digest is that of the parsed bytes.
        try:
            content = path.read_bytes()
            if path.suffix.lower() in EXCLUDE_TABLE_SUFFIXES:
                requested_clips = _parse_exclude_table(path, content)
            else:
                requested_clips = _parse_exclude_lines(content)
        except EXCLUDE_LIST_ERRORS as error:
            raise InputError(
                f"{path}: not a readable exclude list ({_error_reason(error, path)}); "
                "expected a text with one clip id per line, or CSV or Parquet with a column clip_id"
            ) from None
        if requested_clips.is_empty():
            raise InputError(f"{path}: names no clip; to remove the recorded lists, give --no-exclude")
        digest = hashlib.sha256(content).hexdigest()
        return cls(name=path.name, sha256=digest, requested_clips=requested_clips)

    def match_clips(self, manifest: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
        """Return the listed clips of a manifest, in EXCLUSIONS_SCHEMA, and the listed ids that the manifest lacks."""
        known = manifest.select("clip_id", "split").unique()

        # If the whole line is an id of the manifest, it has no comment: ids may contain ` #`.
        whole_ids = self.requested_clips.join(known, on="clip_id", how="semi")
        bare_ids = self.requested_clips.join(known, on="clip_id", how="anti").with_columns(clip_id="bare")
        requests = pl.concat([whole_ids, bare_ids]).unique(["clip_id", "split"], maintain_order=True)
        requests = requests.with_row_index("line")

        # A request without a split matches the id in every split.
        met = pl.concat(
            [
                requests.filter(IN_EVERY_SPLIT).join(known, on="clip_id", how="semi"),
                requests.filter(~IN_EVERY_SPLIT).join(known, on=["clip_id", "split"], how="semi"),
            ]
        )
        unmet = requests.join(met, on="line", how="anti", maintain_order="left")
        matched = met.select("clip_id", "split", list=pl.lit(self.name), sha256=pl.lit(self.sha256))
        return matched.sort("clip_id", "split"), unmet["clip_id"].to_list()


def _error_reason(error: Exception, path: Path) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_error_line(error, path)


def _parse_exclude_table(path: Path, content: bytes) -> pl.DataFrame:
    if path.suffix.lower() in EXCLUDE_PARQUET_SUFFIXES:
        frame = pl.read_parquet(BytesIO(content))
    else:
        # Without type inference, ids such as 007 stay texts.
        frame = pl.read_csv(BytesIO(content), infer_schema=False).rename(str.strip)
    if "clip_id" not in frame.columns:
        raise ValueError(f"no column clip_id, it has {', '.join(frame.columns)}")

    # Spreadsheets write an empty cell where a table has null.
    split = pl.col("split").cast(pl.String).replace("", None) if "split" in frame.columns else pl.lit(None)
    clip_id = pl.col("clip_id").cast(pl.String)
    return frame.select(clip_id, bare=clip_id, split=split.cast(pl.String)).drop_nulls("clip_id")


def _parse_exclude_lines(content: bytes) -> pl.DataFrame:
    # `utf-8-sig` drops the byte order mark that Windows programs write.
    lines = pl.Series("clip_id", content.decode("utf-8-sig").splitlines(), dtype=pl.String).str.strip_chars()
    clip_lines = lines.to_frame().filter((pl.col("clip_id") != "") & ~pl.col("clip_id").str.starts_with("#"))
    bare = pl.col("clip_id").str.replace(COMMENT_PATTERN, "").str.strip_chars_end()
    return clip_lines.select("clip_id", bare=bare, split=pl.lit(None, dtype=pl.String))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exclusions:
    """The clips that a store's exclude lists name; `frame` has EXCLUSIONS_SCHEMA, and no rows if no list is recorded.

    The statistics of a store (stats.json) are those of all its good clips, including excluded ones: they are computed
    from the ledger alone, and a few clips hardly change a mean. So a new list does not change the normalisation.
    """

    frame: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=EXCLUSIONS_SCHEMA))

    @classmethod
    def read_from_store(cls, store: Path) -> Self:
        """Read the exclusions that a store records; StoreError if their file is damaged."""
        path = store / EXCLUSIONS_FILE
        if not path.exists():
            return cls()
        try:
            frame, metadata = read_table(path)
        except StoreError:
            raise damaged_exclusions_error(path) from None
        exclusions = cls(frame=frame)
        if dict(frame.schema) != EXCLUSIONS_SCHEMA or metadata != exclusions.metadata:
            raise damaged_exclusions_error(path)
        return exclusions

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata that are stored with the table."""
        return {"digest": _exclusions_digest(self.frame)}

    @property
    def digest(self) -> str | None:
        """12 hex digits of the excluded clips, whichever list names them; None if no clip is excluded."""
        # Names of lists are left out, so that the same clips from other files have the same digest.
        clips = self.frame.select("clip_id", "split").unique().sort("clip_id", "split")
        return _exclusions_digest(clips)[:12] if len(clips) else None

    def excluded_mask_N(self, manifest: pl.DataFrame) -> np.ndarray:
        """Return a mask of the excluded rows of a manifest, good or not, bool `[N]`."""
        # An entry without a split excludes its id in every split, other entries only in their split.
        rows = manifest.select("clip_id", "split").with_row_index("row")
        mask_N = np.zeros(manifest.height, bool)
        for kind, columns in (
            (IN_EVERY_SPLIT, ["clip_id"]),
            (~IN_EVERY_SPLIT, ["clip_id", "split"]),
        ):
            excluded = rows.join(self.frame.filter(kind), on=columns, how="semi")
            mask_N[excluded["row"].to_numpy()] = True
        return mask_N

    def lists_excluding(self, clip: pl.DataFrame) -> list[str]:
        """Return the names of the lists that exclude a clip, given as a row of a manifest."""
        clip_id, split = clip.select("clip_id", "split").row(0)
        names_clip = (pl.col("clip_id") == clip_id) & (IN_EVERY_SPLIT | (pl.col("split") == split))
        return self.frame.filter(names_clip)["list"].unique().sort().to_list()

    def summarise_lists(self) -> list[tuple[str, str, int]]:
        """Return name, sha256 and number of clips of every list."""
        return self.frame.group_by("list", "sha256").len().sort("list", "sha256").rows()


def damaged_exclusions_error(path: Path) -> StoreError:
    """Return the error for a table of exclusions that is damaged."""
    return StoreError(
        f"{path}: not as written; record the lists again with: ajepa-data audit-labels {path.parent} "
        "--exclude FILE, or remove them with: --no-exclude"
    )


def _exclusions_digest(frame: pl.DataFrame) -> str:
    """Return the SHA-256 of texts and nulls, row by row. No text contains the two control characters."""
    lines = frame.select(
        pl.concat_str([pl.col(name).fill_null("\x02") for name in frame.columns], separator="\x01")
    )
    return hashlib.sha256("\n".join(lines.to_series()).encode()).hexdigest()
