"""Excluding clips of a store: exclude lists recorded and taken back, and one suggested where clips leak.

What `ajepa-data audit-labels` does, in one call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.audit.audit import FEW_POSITIVES, SURPRISES_KEPT, AuditedClips, audit_clips
from pipeline.audit.copies import find_leaking_clips
from pipeline.audit.findings import format_audit, write_audit_json
from pipeline.errors import InputError
from pipeline.files import lock_store, replacing_file
from pipeline.store.exclusions import (
    COMMENT_PATTERN,
    EXCLUSIONS_FILE,
    EXCLUSIONS_SCHEMA,
    ExcludeList,
    Exclusions,
)
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import nearest_clip_ids
from pipeline.tables import write_table

LEAK_REASONS = {
    "id": "stands in {split} too",
    "audio": "has the exact audio of {other} in {split}",
    "recording": "is of the same recording as {other} in {split}",
}


@dataclass(frozen=True, slots=True)
class ExcludeListOutcome:
    """What became of one exclude list."""

    name: str
    clip_count: int
    unknown_count: int  # ids that the store does not have
    unknown_example: str  # the first of them, and what may be meant

    def __str__(self) -> str:
        told = f"{self.name}: {self.clip_count:,} clip{'s' * (self.clip_count != 1)} excluded"
        if not self.unknown_count:
            return told
        these = "1 id is" if self.unknown_count == 1 else f"{self.unknown_count:,} ids are"
        return f"{told}, {these} not in the store, such as {self.unknown_example}"


def record_exclude_lists(store: FeatureStore, paths: Sequence[Path]) -> list[ExcludeListOutcome]:
    """Make these lists the ones that a store excludes clips by, in place of any before; no list takes all back.

    Nothing changes where one of them cannot be read or names no clip of the store: InputError.
    """
    told, frames = list[ExcludeListOutcome](), list[pl.DataFrame]()
    for path in paths:
        read = ExcludeList.read(path)
        frame, unknown = read.match_clips(store.manifest)
        example = _suggest_clip_id(store.manifest, unknown[0]) if unknown else ""
        if frame.is_empty():
            raise InputError(
                f"{path}: names no clip of {store.path}: {len(unknown):,} not there, such as {example}"
            )
        told.append(ExcludeListOutcome(read.name, frame.height, len(unknown), example))
        frames.append(frame)
    exclusions = Exclusions(frame=pl.concat(frames) if frames else pl.DataFrame(schema=EXCLUSIONS_SCHEMA))
    with lock_store(store.path):
        write_table(store.path / EXCLUSIONS_FILE, exclusions.frame, exclusions.metadata)
    return told


def _suggest_clip_id(manifest: pl.DataFrame, clip_id: str) -> str:
    """An id that is not in the store, or not in the split that a list names, with what comes near."""
    if splits := manifest.filter(pl.col("clip_id") == clip_id)["split"].unique().to_list():
        return f"{clip_id!r}, which is in {' and '.join(sorted(splits))} only"
    near = nearest_clip_ids(manifest["clip_id"], clip_id)
    return f"{clip_id!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")


def suggest_exclude_list(rows: AuditedClips, path: Path) -> int:
    """Write an exclude list of the clips to train on that leak into what is measured, where there are any: how many.

    A clip a line with the reason behind it; CSV where `path` ends in `.csv`. The clip held out stays. InputError
    where no split is held out, or every one is, or a text cannot hold the ids.
    """
    if rows.held_out_S.all() or not rows.held_out_S.any():
        which = "every split is" if rows.held_out_S.any() else "no split is"
        raise InputError(
            f"{path}: {which} held out, so nothing can leak; name those to measure on with --eval SPLIT"
        )
    clips = rows.clips_in_use()
    found = find_leaking_clips(clips, rows.splits, rows.held_out_names)
    of = rows.manifest.select("clip_id", "split")[found["row"].to_numpy()]
    reasons = [
        LEAK_REASONS[row["kind"]].format(other=row["other"], split=row["other_split"])
        for row in found.iter_rows(named=True)
    ]
    listed = of.with_columns(reason=pl.Series(reasons, dtype=pl.String))
    if listed.is_empty():
        return 0
    content = listed.write_csv() if path.suffix.lower() == ".csv" else _exclude_list_text(listed, rows, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(content, encoding="utf-8")
    return listed.height


def _exclude_list_text(leaking_clips: pl.DataFrame, rows: AuditedClips, path: Path) -> str:
    """A line a clip; InputError where an id would not come back as it was, or says too little."""
    rest = rows.manifest.select("clip_id", "split").join(leaking_clips, on=["clip_id", "split"], how="anti")
    clip_id = pl.col("clip_id")
    unfit = (
        clip_id.str.contains(COMMENT_PATTERN)
        | clip_id.str.starts_with("#")
        | clip_id.str.contains(r"^\s|\s$|\n|\r")
    )
    odd = pl.concat([leaking_clips.filter(unfit), leaking_clips.join(rest, on="clip_id", how="semi")])
    if odd.height:
        raise InputError(
            f"{path}: a text cannot name {odd['clip_id'][0]!r} alone; give a name that ends in .csv"
        )
    head = "# clips to train on that stand in what is measured, too; # begins a comment\n"
    return head + "".join(f"{clip_id}  # {reason}\n" for clip_id, _, reason in leaking_clips.rows())


def audit_store(
    store: Path,
    *,
    held_out_names: Sequence[str] = (),
    exclude: Sequence[Path] = (),
    no_exclude: bool = False,
    json_path: Path | None = None,
    suggestion_path: Path | None = None,
    few: int = FEW_POSITIVES,
    top: int = SURPRISES_KEPT,
) -> Iterator[str]:
    """Record exclude lists or take them back, then audit what is left, and write what is asked for; lines to print."""
    if exclude and no_exclude:
        raise InputError("--exclude and --no-exclude: give one of them; --exclude replaces what is recorded")
    if exclude or no_exclude:
        yield from map(str, record_exclude_lists(FeatureStore.open(store), exclude))
    rows = AuditedClips.of_store(FeatureStore.open(store), held_out_names)
    seen = audit_clips(rows, few=few, top=top)
    yield format_audit(seen, str(store))
    if json_path is not None:
        write_audit_json(seen, str(store), json_path)
        yield f"\n{json_path}"
    if suggestion_path is not None and (clips := suggest_exclude_list(rows, suggestion_path)):
        beside = "".join(
            f" --exclude {name}" for name, _, _ in rows.exclude_lists
        )  # a new list replaces them
        yield f"\n{suggestion_path}: {clips:,} clips; leave them out with:"
        yield f"ajepa-data audit-labels {store}{beside} --exclude {suggestion_path}"
    elif suggestion_path is not None:
        yield f"\n{suggestion_path}: not written; no clip to train on is left that leaks"
