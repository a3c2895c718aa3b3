"""AudioSet as people have it: segments lists, and sounds in any mixture of layouts -> a corpus."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipeline.audio.sources import (
    MEMBER_SEPARATOR,
    SOUND_EXTENSIONS,
    SOURCES_SCHEMA,
    ClipSources,
    FoundSounds,
    find_sounds,
)
from pipeline.datasets.corpus import Corpus, absolute_path_or_url
from pipeline.errors import InputError
from pipeline.labels.ontology import describe_outside_ids, load_class_list
from pipeline.labels.segment_lists import plan_segment_lists

SOUND_NAME_PATTERN = (  # [Y]<id>[_<start>[_<end>]][.<extension>]; never split on "_": 14 % of the ids contain one
    r"^(?P<y>Y?)(?P<id>[A-Za-z0-9_-]{11})(?:_(?P<start>\d+(?:\.\d+)?)(?:_\d+(?:\.\d+)?)?)?"
    rf"(?:\.(?i:{'|'.join(SOUND_EXTENSIONS)}))?$"
)

SHARD_NAME_PATTERN = rf"(?:[-_.](?:part)?[0-9][^/]*)?\.(?i:tar|parquet|h5|hdf5){MEMBER_SEPARATOR}"  # eval-00003.tar:: is of eval

PREFERRED_KINDS = ("file", "tar", "parquet", "hdf5")  # kinds of locator, the one preferred first

SHOWN_SOUND_NAMES = 5


def audioset_corpus(
    audio: Sequence[Path | str], segments: Sequence[Path | str], *, lenient: bool = False
) -> Corpus:
    """AudioSet, or any set in its shape: folders, archives or URLs of sounds and official segments lists.

    `lenient` leaves damaged lines of the lists out, with a note. Raises InputError.
    """
    plan, notes = plan_segment_lists([Path(path) for path in segments], lenient=lenient)
    sources = match_sounds_to_plan(plan, audio)
    classes = load_class_list()
    return Corpus(
        plan=plan,
        sources=sources,
        classes=classes,
        dataset_settings={
            "dataset": "audioset",
            "audio": [absolute_path_or_url(path) for path in audio],
            "segments": [absolute_path_or_url(path) for path in segments],
            "lenient": lenient,
        },
        notes=notes + describe_outside_ids(plan["mids"], classes) + sources.notes,
    )


def match_sounds_to_plan(plan: pl.DataFrame, audio_roots: Sequence[Path | str]) -> ClipSources:
    """Match the sounds of all layouts to the rows of `plan` by their names; raises InputError where none matches.

    Understood: `<id>`, `Y<id>`, either followed by `_<start>` or `_<start>_<end>` in seconds or milliseconds, in
    any folders; in Parquet also an id column, where the name is none of these. Among several sounds of a clip:
    1. one below a folder named for the row's split, or in an archive named for it (`eval.h5`, `eval-0003.tar`);
    2. one whose name states the start; 3. the container that loses least; 4. a loose file before one in a tar, in
    Parquet, in HDF5; 5. the first by name.
    """
    found = find_sounds(audio_roots)
    where = ", ".join(map(str, audio_roots))
    if found.sounds.is_empty():
        looked = f"looked for {', '.join('.' + end for end in SOUND_EXTENSIONS)} and .tar, .parquet, .h5"
        raise InputError(f"no audio files below {where}; {looked}{quote_first_note(found)}")
    sounds = parse_sound_names(found.sounds)
    counting = plan.with_row_index("row").filter(pl.col("duplicate").is_null())
    best = choose_best_sounds(counting, sounds)
    if best.is_empty():
        shown = ", ".join(sounds["source"].head(SHOWN_SOUND_NAMES))
        raise InputError(
            f"none of {sounds.height} audio files below {where} belongs to a clip of the lists; "
            f"looked for names like {plan['clip_id'][0]}.wav, found {shown}{quote_first_note(found)}"
        )
    rows = pl.DataFrame({"row_of_plan": range(plan.height)}, schema={"row_of_plan": pl.UInt32})
    rows = rows.join(best, on="row_of_plan", how="left", maintain_order="left")
    places_of = sounds.select("sound", *SOURCES_SCHEMA)
    other_start = sounds_of_other_segments(plan, sounds)
    listed = sounds.join(plan.select(id="clip_id"), on="id", how="semi")
    return ClipSources(
        frame=rows.join(places_of, on="sound", how="left", maintain_order="left").select(*SOURCES_SCHEMA),
        sound_count=sounds.height,
        unmatched_sources=sounds.join(listed, on="sound", how="anti", maintain_order="left")[
            "source"
        ].to_list(),
        other_segment_sources=other_start,
        notes=found.notes + note_other_starts(other_start),
    )


def quote_first_note(found: FoundSounds) -> str:
    """The first note, for an error that it may explain."""
    return f" ({found.notes[0]})" if found.notes else ""


def note_other_starts(other_start: list[str]) -> tuple[str, ...]:
    """The note on sounds of other segments."""
    if not other_start:
        return ()
    shown = ", ".join(other_start[:SHOWN_SOUND_NAMES])
    return (
        f"{len(other_start)} sounds are other segments of listed videos, by the start in their name: {shown}",
    )


def parse_sound_names(sounds: pl.DataFrame) -> pl.DataFrame:
    """The sounds numbered, with `id`, `start` and `extension` as their names tell; `id` null where they tell none."""
    parts = pl.col("name").str.extract_groups(SOUND_NAME_PATTERN)
    beside = pl.col("id").str.extract_groups(SOUND_NAME_PATTERN)
    return sounds.with_row_index("sound").with_columns(
        extension=pl.col("name").str.extract(r"\.([^./]+)$").str.to_lowercase(),
        id=pl.coalesce(parts.struct.field("id"), beside.struct.field("id")),
        start=parts.struct.field("start").cast(pl.Float64),
    )


def matches_row_start() -> pl.Expr:
    """Whether the start in a name, in seconds or milliseconds, is that of the row; it may be absent."""
    start, wanted = pl.col("start"), pl.col("start_seconds")
    in_seconds = (start - wanted).abs() < 1e-3
    return start.is_null() | in_seconds | ((start - 1000 * wanted).abs() < 1)


def choose_best_sounds(rows: pl.DataFrame, sounds: pl.DataFrame) -> pl.DataFrame:
    """`row_of_plan` and the `sound` that `find_sources` prefers for it, of those rows that have one."""
    order = {end: place for place, end in enumerate(SOUND_EXTENSIONS)}
    below = (
        pl.lit("/") + pl.col("folder") + pl.lit("/") + pl.col("source").str.replace(SHARD_NAME_PATTERN, "/")
    )
    matched = (
        rows.select("clip_id", "split", "start_seconds", row_of_plan="row")
        .join(sounds.drop("row", "path", "name"), left_on="clip_id", right_on="id", how="inner")
        .filter(matches_row_start())
    )
    several = pl.col("row_of_plan").is_duplicated()
    preferred = (
        matched.filter(several)
        .select(
            "row_of_plan",
            "sound",
            other_split=~below.str.contains(pl.lit("/") + pl.col("split") + pl.lit("/"), literal=True),
            no_start=pl.col("start").is_null(),
            loses=pl.col("extension").replace_strict(order, default=len(SOUND_EXTENSIONS)),
            layout=pl.col("kind").replace_strict({kind: place for place, kind in enumerate(PREFERRED_KINDS)}),
            source="source",
        )
        .sort("row_of_plan", "other_split", "no_start", "loses", "layout", "source", "sound")
        .unique("row_of_plan", keep="first", maintain_order=True)
    )
    pairs = ("row_of_plan", "sound")
    return pl.concat([matched.filter(~several).select(pairs), preferred.select(pairs)])


def sounds_of_other_segments(plan: pl.DataFrame, sounds: pl.DataFrame) -> list[str]:
    """The sounds of listed videos whose start is that of no row."""
    rows = plan.select("clip_id", "start_seconds")
    stated = sounds.select("sound", "id", "start").drop_nulls("start")
    matched = stated.join(rows, left_on="id", right_on="clip_id", how="inner")
    other = matched.group_by("sound").agg(matches_row_start().any().alias("wanted")).filter(~pl.col("wanted"))
    return sounds.join(other, on="sound", how="semi", maintain_order="left")["source"].to_list()
