"""AudioSet from official segments lists and a user's own sounds, in any mixture of folders and archives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.audio.folder_walk import SEARCHED_SUFFIXES, SOUND_EXTENSIONS
from pipeline.audio.sources import (
    MEMBER_SEPARATOR,
    SOURCES_SCHEMA,
    ClipSources,
    FoundSounds,
    find_sounds,
)
from pipeline.datasets.corpus import Corpus, absolute_path_or_url
from pipeline.errors import InputError
from pipeline.labels.ontology import describe_outside_ids, load_class_list
from pipeline.labels.segment_lists import plan_segment_lists

# [Y]<id>[_<start>[_<end>]][.<extension>], or with dashes; never split on "_": 14 % of the ids contain one.
SOUND_NAME_PATTERN = (
    r"^Y?(?P<id>[A-Za-z0-9_-]{11})(?:[_-](?P<start>\d+(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?"
    rf"(?:\.(?i:{'|'.join(SOUND_EXTENSIONS)}))?$"
)

# The end of an archive's name, including a shard number: the archive eval-00003.tar belongs to the split eval.
SHARD_NAME_PATTERN = rf"(?:[-_.](?:part)?[0-9][^/]*)?\.(?i:tar|parquet|h5|hdf5){MEMBER_SEPARATOR}"

PREFERRED_KINDS = ("file", "tar", "parquet", "hdf5")  # values of `SoundLocator.kind`, most preferred first

START_TOLERANCE_SECONDS = 1e-3  # decimal fractions are not exact in binary

SHOWN_SOUND_NAMES = 5  # at most this many in an error or a note


def audioset_corpus(
    audio: Sequence[Path | str], segments: Sequence[Path | str], *, lenient: bool = False
) -> Corpus:
    """Return the corpus of AudioSet, or of a dataset with the same kind of lists; raises InputError.

    audio     folders, archives or URLs with the sounds
    segments  official segments lists
    lenient   leave out damaged lines of the lists, with a note, instead of raising an error
    """
    # The lists decide the rows, even of clips whose sounds do not exist.
    plan, notes = plan_segment_lists([Path(path) for path in segments], lenient=lenient)
    sources = match_sounds_to_plan(plan, audio)
    classes = load_class_list()
    return Corpus(
        plan=plan,
        sources=sources,
        classes=classes,
        dataset_settings=audioset_settings(audio, segments, lenient=lenient),
        notes=notes + describe_outside_ids(plan["mids"], classes) + sources.notes,
    )


def audioset_settings(
    audio: Sequence[Path | str], segments: Sequence[Path | str], *, lenient: bool = False
) -> dict[str, Any]:
    """Return the `Corpus.dataset_settings` of `audioset_corpus` with these arguments."""
    return {
        "dataset": "audioset",
        "audio": [absolute_path_or_url(path) for path in audio],
        "segments": [absolute_path_or_url(path) for path in segments],
        "lenient": lenient,
    }


def match_sounds_to_plan(plan: pl.DataFrame, audio_roots: Sequence[Path | str]) -> ClipSources:
    """Match sounds to the rows of `plan` by their names; raises InputError if no sound matches.

    A name is `<id>`, `Y<id>` or `id_<id>`, optionally followed by `_<start>` or `_<start>_<end>` in seconds or
    milliseconds; dashes may stand for these underscores. The sounds may be in any folders. In a table with an id
    column, an id that is listed is that of the sound, whatever its name; so is one that is not, if the name has none
    of these forms.

    If a clip has several sounds, these rules choose one, in this order:
    1. a sound below a folder, or in an archive, with the name of the row's split (`eval.h5`, `eval-0003.tar`);
    2. a sound whose name contains the start;
    3. the sound with the better container, in the order of SOUND_EXTENSIONS, least lossy first;
    4. a loose file, then a tar, then Parquet, then HDF5;
    5. the first sound by name.
    """
    # All sounds, with the ids and starts in their names.
    found = find_sounds(audio_roots)
    roots = ", ".join(map(str, audio_roots))
    if found.sounds.is_empty():
        raise InputError(
            f"no audio files below {roots}; looked for {SEARCHED_SUFFIXES}, and .tar, .parquet, .h5"
            f"{quote_first_note(found)}"
        )
    sounds = parse_sound_names(found.sounds, plan["clip_id"])

    # One sound for each row that is not a duplicate.
    counting_rows = plan.select("clip_id", "split", "start_seconds", "duplicate").with_row_index("row")
    matches = choose_best_sounds(counting_rows.filter(pl.col("duplicate").is_null()), sounds)
    del counting_rows
    if matches.is_empty():
        shown = ", ".join(sounds["source"].head(SHOWN_SOUND_NAMES))
        raise InputError(
            f"none of {sounds.height} audio files below {roots} belongs to a clip of the lists; "
            f"looked for names like {plan['clip_id'][0]}.wav, found {shown}{quote_first_note(found)}"
        )

    # The sounds in the order of the plan; null for a row without a sound.
    rows = pl.DataFrame({"row_of_plan": range(plan.height)}, schema={"row_of_plan": pl.UInt32})
    frame = rows.join(matches, on="row_of_plan", how="left", maintain_order="left").join(
        sounds.select("sound", *SOURCES_SCHEMA), on="sound", how="left", maintain_order="left"
    )

    # The sounds that match no row: sounds with unlisted ids, and other segments of listed videos.
    listed = sounds.join(plan.select(id="clip_id"), on="id", how="semi")
    unmatched = sounds.join(listed, on="sound", how="anti", maintain_order="left")
    other_segment_sources = sounds_of_other_segments(plan, sounds)
    return ClipSources(
        frame=frame.select(*SOURCES_SCHEMA),
        sound_count=sounds.height,
        unmatched_sources=unmatched["source"].to_list(),
        other_segment_sources=other_segment_sources,
        notes=found.notes + note_other_segments(other_segment_sources),
    )


def quote_first_note(found: FoundSounds) -> str:
    """Return the first note on unreadable sounds, in brackets, because it may explain the error."""
    return f" ({found.notes[0]})" if found.notes else ""


def note_other_segments(sources: list[str]) -> tuple[str, ...]:
    """Return a note on the sounds of other segments, if any."""
    if not sources:
        return ()
    shown = ", ".join(sources[:SHOWN_SOUND_NAMES])
    return (
        f"{len(sources)} sounds are other segments of listed videos, by the start in their name: {shown}",
    )


def parse_sound_names(sounds: pl.DataFrame, listed_ids: pl.Series) -> pl.DataFrame:
    """Number the sounds and add `id`, `start` and `extension`; null if neither name nor id column has one.

    A name may be read in several ways: audio_00017.wav has the form of an id without being one, and id_abcdefgh_30.wav
    has two. The first reading whose id is listed counts: the id column, the name, the name without the prefix id_.
    Where none is listed, the name counts before the id column.
    """
    # What the id column and the name say, in this order.
    readings = {
        "column": pl.col("id"),
        "name": pl.col("name"),
        "rest": pl.when(pl.col("name").str.starts_with("id_")).then(pl.col("name").str.strip_prefix("id_")),
    }
    groups = {name: text.str.extract_groups(SOUND_NAME_PATTERN) for name, text in readings.items()}
    parsed = sounds.with_row_index("sound").with_columns(
        extension=pl.col("name").str.extract(r"\.([^./]+)$").str.to_lowercase(),
        **{f"id_{name}": group.struct.field("id") for name, group in groups.items()},
        **{f"start_{name}": group.struct.field("start").cast(pl.Float64) for name, group in groups.items()},
    )

    # The reading that counts.
    listed = [
        pl.when(pl.col(f"id_{name}").is_in(listed_ids.implode())).then(pl.col(f"id_{name}"))
        for name in readings
    ]
    chosen = parsed.with_columns(id=pl.coalesce(*listed, "id_name", "id_rest", "id_column"))

    # The start of a reading with that id.
    starts = [
        pl.when(pl.col(f"id_{name}") == pl.col("id")).then(pl.col(f"start_{name}")) for name in readings
    ]
    return chosen.with_columns(start=pl.coalesce(starts)).drop(
        *(f"{field}_{name}" for field in ("id", "start") for name in readings)
    )


def matches_row_start() -> pl.Expr:
    """Return whether the start in a name, in seconds or milliseconds, is that of the row; true without a start."""
    start = pl.col("start")
    row_start = pl.col("start_seconds")
    agrees_in_seconds = (start - row_start).abs() < START_TOLERANCE_SECONDS
    agrees_in_milliseconds = (start - 1000 * row_start).abs() < 1
    return start.is_null() | agrees_in_seconds | agrees_in_milliseconds


def choose_best_sounds(rows: pl.DataFrame, sounds: pl.DataFrame) -> pl.DataFrame:
    """Return `row_of_plan` and `sound` of each row that has a sound, chosen by the rules of `match_sounds_to_plan`."""
    # All pairs of a row and a sound with the same id and start.
    candidates = (
        rows.select("clip_id", "split", "start_seconds", row_of_plan="row")
        .join(sounds.drop("row", "path", "name"), left_on="clip_id", right_on="id", how="inner")
        .filter(matches_row_start())
    )

    # The folders above a sound, between slashes; an archive counts as a folder.
    split_folder = pl.lit("/") + pl.col("split") + pl.lit("/")
    folders_above = (
        pl.lit("/") + pl.col("folder") + pl.lit("/") + pl.col("source").str.replace(SHARD_NAME_PATTERN, "/")
    )
    rank_of_extension = {extension: rank for rank, extension in enumerate(SOUND_EXTENSIONS)}
    rank_of_kind = {kind: rank for rank, kind in enumerate(PREFERRED_KINDS)}

    # For rows with several sounds, sort by preference and take the first; most datasets have few of these rows.
    has_several = pl.col("row_of_plan").is_duplicated()
    preferred = (
        candidates.filter(has_several)
        .select(
            "row_of_plan",
            "sound",
            is_of_other_split=~folders_above.str.contains(split_folder, literal=True),
            has_no_start=pl.col("start").is_null(),
            extension_rank=pl.col("extension").replace_strict(
                rank_of_extension, default=len(SOUND_EXTENSIONS)
            ),
            kind_rank=pl.col("kind").replace_strict(rank_of_kind),
            source="source",
        )
        .sort(
            *("row_of_plan", "is_of_other_split", "has_no_start"),
            *("extension_rank", "kind_rank", "source", "sound"),
        )
        .unique("row_of_plan", keep="first", maintain_order=True)
    )
    columns = ("row_of_plan", "sound")
    return pl.concat([candidates.filter(~has_several).select(columns), preferred.select(columns)])


def sounds_of_other_segments(plan: pl.DataFrame, sounds: pl.DataFrame) -> list[str]:
    """Return the sounds of listed videos whose start matches no row."""
    rows = plan.select("clip_id", "start_seconds")
    sounds_with_start = sounds.select("sound", "id", "start").drop_nulls("start")
    candidates = sounds_with_start.join(rows, left_on="id", right_on="clip_id", how="inner")
    sounds_of_videos = candidates.group_by("sound").agg(is_listed=matches_row_start().any())
    of_other_segments = sounds_of_videos.filter(~pl.col("is_listed"))
    return sounds.join(of_other_segments, on="sound", how="semi", maintain_order="left")["source"].to_list()
