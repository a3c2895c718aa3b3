"""The steps of `ajepa-data audit-labels`: record exclude lists, audit the store, list the clips that leak."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.audit.audit import FEW_POSITIVES, SURPRISES_KEPT, AuditedClips, audit_clips
from pipeline.audit.copies import find_leaking_clips
from pipeline.audit.findings import format_audit, write_audit_json
from pipeline.errors import InputError
from pipeline.files import lock_store, replacing_file
from pipeline.messages import count_phrase
from pipeline.store.exclusions import (
    COMMENT_PATTERN,
    EXCLUSIONS_FILE,
    EXCLUSIONS_SCHEMA,
    ExcludeList,
    Exclusions,
)
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import nearest_texts
from pipeline.tables import write_table

# The reason on each line of a suggested exclude list.
LEAK_REASONS = {
    "id": "is in {split} too",
    "audio": "has the exact audio of {other} in {split}",
    "recording": "is from the same recording as {other} in {split}",
}


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
    """Record or remove exclude lists, audit the remaining clips, write the files; yields the lines to print."""
    # Record the lists first, because they decide which clips are audited.
    if exclude and no_exclude:
        raise InputError(
            "--exclude and --no-exclude: give only one of them; --exclude replaces the recorded lists"
        )
    if exclude or no_exclude:
        for outcome in record_exclude_lists(FeatureStore.open(store), exclude):
            yield str(outcome)

    clips = AuditedClips.of_store(FeatureStore.open(store), held_out_names)
    audit = audit_clips(clips, few=few, top=top)
    yield format_audit(audit, str(store))
    if json_path is not None:
        write_audit_json(audit, str(store), json_path)
        yield f"\n{json_path}"

    # New lists replace the recorded lists, so the suggested command names the recorded lists again.
    if suggestion_path is not None:
        leaking_count = suggest_exclude_list(clips, suggestion_path)
        if not leaking_count:
            yield f"\n{suggestion_path}: not written; no training clip leaks"
            return
        options = "".join(f" --exclude {name}" for name, _, _ in clips.exclude_lists)
        yield f"\n{suggestion_path}: {count_phrase(leaking_count, 'clip')}; leave them out with:"
        yield f"ajepa-data audit-labels {store}{options} --exclude {suggestion_path}"


@dataclass(frozen=True, slots=True)
class ExcludeListOutcome:
    """The result of recording one exclude list."""

    name: str
    clip_count: int
    unknown_count: int  # ids that the store does not have
    unknown_example: str  # the first unknown id, with a similar id of the store

    def __str__(self) -> str:
        sentence = f"{self.name}: {count_phrase(self.clip_count, 'clip')} excluded"
        if not self.unknown_count:
            return sentence
        verb = "is" if self.unknown_count == 1 else "are"
        ids = count_phrase(self.unknown_count, "id")
        return f"{sentence}, {ids} {verb} not in the store, such as {self.unknown_example}"


def record_exclude_lists(store: FeatureStore, paths: Sequence[Path]) -> list[ExcludeListOutcome]:
    """Record the lists in a store, in place of all lists recorded before; an empty `paths` removes all lists.

    InputError if a list cannot be read or names no clip of the store; then nothing has been changed.
    """
    # Match every list before anything is written.
    outcomes: list[ExcludeListOutcome] = []
    frames: list[pl.DataFrame] = []
    for path in paths:
        exclude_list = ExcludeList.read(path)
        clips = store.manifest_columns("clip_id", "split")
        frame, unknown_ids = exclude_list.match_clips(clips)
        example = _describe_unknown_id(clips, unknown_ids[0]) if unknown_ids else ""
        if frame.is_empty():
            raise InputError(
                f"{path}: names no clip of {store.path}: {len(unknown_ids):,} not there, such as {example}"
            )
        outcomes.append(ExcludeListOutcome(exclude_list.name, frame.height, len(unknown_ids), example))
        frames.append(frame)

    # Replace all lists recorded before.
    frame = pl.concat(frames) if frames else pl.DataFrame(schema=EXCLUSIONS_SCHEMA)
    exclusions = Exclusions(frame=frame)
    with lock_store(store.path):
        write_table(store.path / EXCLUSIONS_FILE, exclusions.frame, exclusions.metadata)
    return outcomes


def _describe_unknown_id(manifest: pl.DataFrame, clip_id: str) -> str:
    """Describe an id that the store lacks, with similar ids; or an id that is only in other splits of the store."""
    # The list names a split that the clip is not in.
    if splits := manifest.filter(pl.col("clip_id") == clip_id)["split"].unique().to_list():
        return f"{clip_id!r}, which is in {' and '.join(sorted(splits))} only"
    similar = nearest_texts(manifest["clip_id"], clip_id)
    return f"{clip_id!r}" + (f"; did you mean {' or '.join(map(repr, similar))}?" if similar else "")


def suggest_exclude_list(rows: AuditedClips, path: Path) -> int:
    """Write an exclude list of the training clips that leak into held-out splits; returns their number.

    Each line has a clip and the reason. The file is CSV if `path` ends in `.csv`, and is not written if no clip leaks.
    InputError if no split or every split is held out, or if a text file cannot represent the ids.
    """
    if rows.held_out_S.all() or not rows.held_out_S.any():
        which = "every split is" if rows.held_out_S.any() else "no split is"
        raise InputError(
            f"{path}: {which} held out, so nothing can leak; name the evaluation splits with --eval SPLIT"
        )

    # Find the clips, each with the most important reason.
    leaks = find_leaking_clips(rows.clips_in_use(), rows.splits, rows.held_out_names)
    reasons = [
        LEAK_REASONS[leak["kind"]].format(other=leak["other"], split=leak["other_split"])
        for leak in leaks.iter_rows(named=True)
    ]
    clips = rows.manifest.select("clip_id", "split")[leaks["row"].to_numpy()]
    clips = clips.with_columns(reason=pl.Series(reasons, dtype=pl.String))
    if clips.is_empty():
        return 0

    # A CSV file can represent any id, a text only ids without outer blanks and comments.
    is_csv = path.suffix.lower() == ".csv"
    content = clips.write_csv() if is_csv else _exclude_list_text(clips, rows, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(content, encoding="utf-8")
    return clips.height


def _exclude_list_text(leaking_clips: pl.DataFrame, rows: AuditedClips, path: Path) -> str:
    """Return a text with one line per clip; InputError if the text would name other clips than these.

    This happens if an id contains a comment or outer blanks, or if it is also in another split.
    """
    others = rows.manifest.select("clip_id", "split").join(leaking_clips, on=["clip_id", "split"], how="anti")

    # Find ids that would be read as other ids, and ids that name other clips besides the leaking clip.
    clip_id = pl.col("clip_id")
    is_unfit = (
        clip_id.str.contains(COMMENT_PATTERN)
        | clip_id.str.starts_with("#")
        | clip_id.str.contains(r"^\s|\s$|\n|\r")
    )
    unfit = pl.concat([leaking_clips.filter(is_unfit), leaking_clips.join(others, on="clip_id", how="semi")])
    if unfit.height:
        raise InputError(
            f"{path}: a text cannot name {unfit['clip_id'][0]!r} alone; give a name that ends in .csv"
        )
    head = "# training clips that leak into evaluation splits; # begins a comment\n"
    lines = (f"{name}  # {reason}\n" for name, _, reason in leaking_clips.rows())
    return head + "".join(lines)
