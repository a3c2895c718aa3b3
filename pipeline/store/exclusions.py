"""Exclude lists, which name clips that nobody is to draw: as users write them, and as a store keeps them."""

import hashlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.errors import InputError, StoreError, first_error_line
from pipeline.tables import read_table

EXCLUSIONS_FILE = "excluded.parquet"  # in a store; a table without rows once the lists have been taken back

EXCLUSIONS_SCHEMA: dict[str, pl.DataType] = {
    "clip_id": pl.String(),
    "split": pl.String(),  # null: in every split that has the id
    "list": pl.String(),  # name of the file that names the clip
    "sha256": pl.String(),  # of that file
}

EXCLUDE_PARQUET_SUFFIXES = (".parquet", ".pq")

EXCLUDE_TABLE_SUFFIXES = (*EXCLUDE_PARQUET_SUFFIXES, ".csv")

COMMENT_PATTERN = r"\s#.*$"

# Everything that parsing a damaged list may raise.
EXCLUDE_LIST_ERRORS = (OSError, ValueError, pl.exceptions.PolarsError)

IN_EVERY_SPLIT = pl.col("split").is_null()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExcludeList:
    """A file that names clips.

    `requested_clips` has `clip_id`, the words of the file; `bare`, the same without a comment; and `split`, or null.
    """

    name: str
    sha256: str
    requested_clips: pl.DataFrame

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a CSV or Parquet file with a column clip_id and maybe split, or else a text of one id a line.

        In a text, `#` begins a comment at the start of a line or after a space. InputError where the file cannot be
        read, or names no clip.
        """
        # The content is read once, so that the digest is of what was parsed.
        try:
            content = path.read_bytes()
            if path.suffix.lower() in EXCLUDE_TABLE_SUFFIXES:
                requested_clips = _parse_exclude_table(path, content)
            else:
                requested_clips = _parse_exclude_lines(content)
        except EXCLUDE_LIST_ERRORS as error:
            raise InputError(
                f"{path}: not a readable exclude list ({_error_reason(error, path)}); "
                "expected a text of one clip id a line, or CSV or Parquet with a column clip_id"
            ) from None
        if requested_clips.is_empty():
            raise InputError(f"{path}: names no clip; to take back what is recorded, give --no-exclude")
        digest = hashlib.sha256(content).hexdigest()
        return cls(name=path.name, sha256=digest, requested_clips=requested_clips)

    def match_clips(self, manifest: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
        """Return the clips of a manifest that the list names, in EXCLUSIONS_SCHEMA, and the ids that are not there."""
        known = manifest.select("clip_id", "split").unique()

        # A line that is an id as it stands has no comment: ids may contain ` #`.
        whole_ids = self.requested_clips.join(known, on="clip_id", how="semi")
        bare_ids = self.requested_clips.join(known, on="clip_id", how="anti").with_columns(clip_id="bare")
        requests = pl.concat([whole_ids, bare_ids]).unique(["clip_id", "split"], maintain_order=True)
        requests = requests.with_row_index("line")

        # A request without a split is met by the id in any split.
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
        # Ids such as 007 stay texts.
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
    """The clips that a store's exclude lists name; `frame` has EXCLUSIONS_SCHEMA, and no row where none is recorded.

    The statistics of a store (stats.json) are those of its good clips, excluded ones included: they follow from the
    ledger alone, and a handful of clips moves no mean. So normalisation stays as it is when a list changes.
    """

    frame: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=EXCLUSIONS_SCHEMA))

    @classmethod
    def read_from_store(cls, store: Path) -> Self:
        """Read the exclusions that a store records; StoreError where their file is not as it was written."""
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
        """The values that stand beside the table in the store."""
        return {"digest": _exclusions_digest(self.frame)}

    @property
    def digest(self) -> str | None:
        """12 hex digits of which clips are excluded, whatever list names them; None where no clip is."""
        # Without the lists' names, so that the same clips from other files are the same exclusions.
        clips = self.frame.select("clip_id", "split").unique().sort("clip_id", "split")
        return _exclusions_digest(clips)[:12] if len(clips) else None

    def excluded_mask_N(self, manifest: pl.DataFrame) -> np.ndarray:
        """Return which rows of a manifest are excluded, good or not, bool `[N]`."""
        # Entries without a split exclude the id everywhere, the others in their split only.
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
    """Return the error for a table of exclusions that cannot be read, or is not as it was written."""
    return StoreError(
        f"{path}: not as written; record the lists again with: ajepa-data audit-labels {path.parent} "
        "--exclude FILE, or take them back with: --no-exclude"
    )


def _exclusions_digest(frame: pl.DataFrame) -> str:
    """Digest texts and nulls row by row. The two control characters stand in no text."""
    lines = frame.select(
        pl.concat_str([pl.col(name).fill_null("\x02") for name in frame.columns], separator="\x01")
    )
    return hashlib.sha256("\n".join(lines.to_series()).encode()).hexdigest()
