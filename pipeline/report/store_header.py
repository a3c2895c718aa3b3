"""The top of a store's page: how much sound, in which splits, of which classes, from when; and its identity, folded."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline.labels.ontology import UNLABELLED_CLASSES
from pipeline.report.durations import SoundDurations, format_duration
from pipeline.report.html import Markup, definition_list, html_tag, join_markup
from pipeline.store import summary
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import ClassCounts, ClipCoverage

# Splits with a tile of their own; more are told in one number.
MAX_SPLIT_TILES = 5


def store_page_header(
    store: FeatureStore, coverage: ClipCoverage, class_counts: ClassCounts, links: Sequence[tuple[str, str]]
) -> Markup:
    """The header of the page: what the store holds, in large numbers, and links to the sections (id, title)."""
    durations = SoundDurations.of_store(store)

    # The first sentence.
    good = sum(coverage.good_counts)
    listed = sum(coverage.listed_counts)
    share = html_tag("b", f"{100 * good / max(listed, 1):.2f} %")
    lead = join_markup(html_tag("b", good), " of ", html_tag("b", listed), " clips are good: ", share, ".")

    tiles = [
        number_tile(format_duration(durations.good_seconds), "of good clips"),
        *split_tiles(coverage, durations),
        class_tile(store, class_counts),
    ]
    if (date := build_date(store)) is not None:
        tiles.append(number_tile(date, "built (UTC)"))
    return html_tag(
        "header",
        html_tag("h1", store.path.name),
        html_tag("p", lead, class_="lead"),
        html_tag("div", *tiles, class_="tiles"),
        *unused_sound_note(durations),
        html_tag("nav", *(html_tag("a", title, href=f"#{key}") for key, title in links)),
    )


def number_tile(number: object, description: str) -> Markup:
    """A large number over a few words."""
    return html_tag("div", html_tag("b", number), html_tag("span", description), class_="tile")


def split_tiles(coverage: ClipCoverage, durations: SoundDurations) -> list[Markup]:
    """A tile of good clips for each split, or one for all if they are many."""
    if len(coverage.splits) > MAX_SPLIT_TILES:
        return [number_tile(len(coverage.splits), "splits")]
    return [
        number_tile(good, f"in {split}, {format_duration(durations.split_seconds.get(split, 0.0))}")
        for split, good in zip(coverage.splits, coverage.good_counts, strict=True)
    ]


def class_tile(store: FeatureStore, class_counts: ClassCounts) -> Markup:
    """How many classes have a good clip."""
    if store.classes == UNLABELLED_CLASSES:
        return number_tile("no", "labels")
    with_clips = int((class_counts.positives_NC["raw"].sum(0) > 0).sum())
    return number_tile(with_clips, f"of {len(store.classes):,} classes have a clip")


def unused_sound_note(durations: SoundDurations) -> list[Markup]:
    """A sentence about the sound that is in no clip, if there is any."""
    if not durations.longer_sources:
        return []
    is_one = durations.longer_sources == 1
    sources = (
        "1 sound is longer than its clips"
        if is_one
        else (f"{durations.longer_sources:,} sounds are longer than their clips")
    )
    rest = format_duration(durations.unused_seconds)
    return [html_tag("p", f"{sources}: {rest} of {'it' if is_one else 'them'} is in no clip.", class_="warn")]


def build_date(store: FeatureStore) -> str | None:
    """The day on which build.json was last written, in UTC; None for a store on a server: its copy is younger."""
    path = store.path / "build.json"
    if store.location != str(store.path) or not path.exists():
        return None
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()


def identity_details(store: FeatureStore, label_sources: dict[str, str]) -> Markup:
    """Ids, sizes, versions and every number of the mel spec, folded."""
    spec = store.spec
    identity = {
        "store": store.store_id,
        "plan": store.header.plan_id,
        "mel spec": f"{spec.name} ({spec.spec_id})",
    }
    stored_bytes = summary.format_bytes(summary.stored_mel_bytes(store))
    versions = read_build_json(store).get("versions", {})
    facts = {
        "mel": f"{len(store.n_frames_N):,} clips of {store.frames} frames of {store.bands} bands, {store.dtype}",
        "on disk": f"{stored_bytes} in {store.header.layout.shard_count:,} shards",
        "label sets": ", ".join(label_sources),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded",
    }
    identity_items = [(name, html_tag("span", value, class_="id")) for name, value in identity.items()]
    numbers = {key.replace("_", " "): value for key, value in spec.to_json().items() if key != "name"}
    return join_markup(
        folded("Store, features and versions", definition_list([*identity_items, *facts.items()])),
        folded("Every number of the mel spec", definition_list(numbers.items())),
    )


def folded(title: str, body: Markup) -> Markup:
    """A part of the page that is closed at first."""
    return html_tag("details", html_tag("summary", title), body)


def read_build_json(store: FeatureStore) -> dict[str, Any]:
    """The record of the store's build, build.json; empty if the file does not exist."""
    path = store.path / "build.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
