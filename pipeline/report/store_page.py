"""A store on one page: HTML that needs no other file, the same bytes for the same store."""

import importlib.resources
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import polars as pl

from pipeline.audio.preview import PREVIEW_SECONDS
from pipeline.audit.audit import AuditedClips, audit_clips
from pipeline.files import replacing_file
from pipeline.report import html, spectrograms
from pipeline.report.html import Markup, escape_markup, html_tag, join_markup
from pipeline.report.page_sections import audit_section, classes_section
from pipeline.report.players import SoundPlayers, optional_player
from pipeline.report.store_header import folded, identity_details, read_build_json, store_page_header
from pipeline.store import summary
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import FAILURE_REASONS
from pipeline.store.summary import ClipCoverage

STORE_SECTIONS = {
    "coverage": "Coverage",
    "failed": "What failed, and why",
    "classes": "Classes",
    "clips": "Some clips",
    "sounds": "The sounds",
    "bands": "Mel bands",
    "audit": "Audit of the labels",
    "build": "The build, ids and versions",
}

MAX_CURVES = 4  # more curves cannot be distinguished

MAX_VALUE_ROWS = 12  # rows of a distribution; rarer values are counted together

LEVEL_EDGES_DBFS = np.arange(-90, 7, 2.0)


def write_store_page(
    store: FeatureStore, path: Path, *, clip_count: int = 12, with_sounds: bool = False
) -> None:
    """Write the page about a store to `path`, whole or not at all."""
    content = render_store_page(store, clip_count=clip_count, with_sounds=with_sounds)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def render_store_page(store: FeatureStore, *, clip_count: int = 12, with_sounds: bool = False) -> str:
    """The page as text. It shows `clip_count` spectrograms, of about 50 kB each; with sounds, 20 kB more."""
    # The audit, which takes most memory, comes first: nothing else is in memory yet.
    audit = audit_section(audit_clips(AuditedClips.of_store(store)), store.path.name)
    coverage = ClipCoverage.from_store(store)
    labels, label_sources = summary.read_label_table(store)
    class_counts = summary.ClassCounts.from_store(store, labels, coverage.splits)
    header = store_page_header(store, coverage, class_counts, list(STORE_SECTIONS.items()))
    bodies = {
        "audit": audit,
        "coverage": coverage_section(coverage, store.exclusions.summarise_lists()),
        "failed": failure_section(store, coverage),
        "classes": classes_section(store, labels, label_sources, coverage, class_counts),
        "sounds": sounds_section(store, coverage),
        "build": join_markup(build_section(read_build_json(store)), identity_details(store, label_sources)),
    }
    players = SoundPlayers.of_store(store) if with_sounds else None
    bodies["clips"] = example_clips_section(store, labels, coverage, clip_count, players)
    bodies["bands"] = mel_bands_section(store)
    sections = [
        html_tag("section", html_tag("h2", title), bodies[key], id=key)
        for key, title in STORE_SECTIONS.items()
    ]

    # page.html holds the style and the script; a page of a run shares it.
    frame = importlib.resources.files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    body = join_markup(header, html_tag("main", *sections))
    return Template(frame).substitute(title=escape_markup(store.path.name), body=body)


def coverage_section(coverage: ClipCoverage, exclude_lists: Sequence[tuple[str, str, int]]) -> Markup:
    """A bar for every split, the clips that exclude lists leave out, then the flags of used clips.

    An exclude list is its name, the sha256 of its text, and how many clips it excludes.
    """
    # A bar of good and failed clips for every split.
    parts = []
    for split, listed, good, failed in zip(
        coverage.splits, coverage.listed_counts, coverage.good_counts, coverage.failed_counts, strict=True
    ):
        if good:
            counts = join_markup(good, " of ", listed, " good, ", f"{100 * good / max(listed, 1):.2f} %")
        else:
            counts = html_tag("span", "no good clip among ", listed, class_="warn")
        heading = html_tag("p", html_tag("b", split), html_tag("span", counts))
        bar = html.share_bar([("good", good), ("failed", failed)])
        parts.append(html_tag("div", heading, bar, class_="split"))

    # Good clips that are excluded.
    if exclude_lists:
        lists = ", ".join(f"{clips:,} clips by {name}" for name, _, clips in exclude_lists)
        excluded = sum(coverage.excluded_counts)
        note = f"Good clips that loaders skip because of exclude lists: {excluded:,} ({lists})."
        parts.append(html_tag("p", note, class_="soft"))

    # Good clips with flags.
    if not coverage.flag_counts:
        parts.append(html_tag("p", "No good clip has a flag.", class_="soft"))
        return join_markup(*parts)
    rows = [
        (flag, summary.FLAG_MEANINGS.get(flag, ""), counts) for flag, counts in coverage.flag_counts.items()
    ]
    parts += [html_tag("h3", "Odd, but used"), split_count_table("flag", coverage.splits, rows)]
    return join_markup(*parts)


def failure_section(store: FeatureStore, coverage: ClipCoverage) -> Markup:
    """Every reason of failure with its meaning and its clips by split, then the first few clips of each."""
    if not coverage.reason_counts:
        return html_tag("p", "Nothing: every clip that was listed is good.")
    rows = [(reason, FAILURE_REASONS[reason], counts) for reason, counts in coverage.reason_counts.items()]
    parts = [split_count_table("reason", coverage.splits, rows)]

    # The first few clips of each reason, with the details of their failure.
    examples = summary.failure_examples(store.manifest_columns(*summary.EXAMPLE_COLUMNS))
    lists = []
    for reason, counts in coverage.reason_counts.items():
        # How many of the clips are listed below.
        count = sum(counts)
        shown = f"{count:,}"
        if count > summary.EXAMPLES_PER_REASON:
            shown = f"the first {summary.EXAMPLES_PER_REASON} of {count:,}"
        lists.append(html_tag("h3", reason, html_tag("span", f" · {shown}", class_="soft")))

        items = []
        for clip in examples[reason]:
            detail = clip["detail"] or FAILURE_REASONS[reason]
            clip_id = html_tag("code", clip["clip_id"])
            items.append(html_tag("li", clip_id, " in ", clip["split"], ": ", detail))
        lists.append(html_tag("ul", *items, class_="examples"))
    parts.append(folded("The first clips of each reason", join_markup(*lists)))
    return join_markup(*parts)


def split_count_table(
    heading: str, splits: Sequence[str], rows: Sequence[tuple[str, str, Sequence[int]]]
) -> Markup:
    """A table of rows that are a name, its meaning, and a count for every split."""
    split_heads = (html_tag("th", split, scope="col", class_="n") for split in splits)
    lines = []
    for name, meaning, counts in rows:
        name_span = html_tag("span", name, class_="name")
        meaning_span = html_tag("span", meaning, class_="soft")
        head = html_tag("th", name_span, meaning_span, scope="row")
        lines.append(html_tag("tr", head, *map(html.count_cell, counts)))
    headings = html_tag("thead", html_tag("tr", html_tag("th", heading, scope="col"), *split_heads))
    return html_tag("div", html_tag("table", headings, html_tag("tbody", *lines)), class_="scroll")


def sounds_section(store: FeatureStore, coverage: ClipCoverage) -> Markup:
    """Length, level and kind of the good clips' sources, as charts and bars."""
    if not sum(coverage.good_counts):
        return html_tag("p", "No clip is good, so there is nothing to show.", class_="warn")
    figures = [
        length_figure(store),
        level_figure(store, "peak_dbfs", "Peak"),
        level_figure(store, "rms_dbfs", "Loudness (RMS)"),
        value_figure(store, "rate_hz", "Input rate, Hz"),
        value_figure(store, "codec", "Codec"),
        value_figure(store, "channels", "Channels"),
    ]
    return html_tag("div", *figures, class_="grid")


def length_figure(store: FeatureStore) -> Markup:
    """A histogram of the lengths of the sources; the length of a full clip is in the middle of a bar."""
    clip_seconds = store.spec.clip_seconds
    # 20 bars to the length of a clip, moved by half a bar.
    edges_N = clip_seconds * (np.arange(32) - 0.5) / 20
    counts_N = summary.good_clip_histogram(store.manifest_columns("status", "seconds"), "seconds", edges_N)
    ticks = [round(clip_seconds * part, 3) for part in (0, 0.5, 1, 1.5)]
    chart = html.histogram_chart(counts_N, edges_N, ticks, "seconds", log_scale=True)
    return html.html_figure(
        chart, "Length of the source", "logarithmic; the last bar counts all longer sources"
    )


def level_figure(store: FeatureStore, column: str, title: str) -> Markup:
    """A histogram of a column of levels."""
    counts_N = summary.good_clip_histogram(store.manifest_columns("status", column), column, LEVEL_EDGES_DBFS)
    chart = html.histogram_chart(counts_N, LEVEL_EDGES_DBFS, [-90, -60, -30, 0], "dBFS")
    return html.html_figure(
        chart, title, "of the mono wave before resampling; outer bars count values beyond the axis"
    )


def value_figure(store: FeatureStore, column: str, title: str) -> Markup:
    """A bar for each of the commonest values of a column, and one bar for all other values."""
    counts = summary.count_good_values(store.manifest_columns("status", column), column)
    bars = [("unknown" if value is None else value, count) for value, count in counts[:MAX_VALUE_ROWS]]
    others = [count for _, count in counts[MAX_VALUE_ROWS:]]
    if others:
        bars.append((f"{len(others)} others", sum(others)))
    return html.html_figure(html.count_bar_table(bars), title, "good clips")


def mel_bands_section(store: FeatureStore) -> Markup:
    """Mean and standard deviation of every band over all clips, and its mean over each split."""
    stats = {name: part for name, part in store.stats.items() if part["frames"]}
    if not stats:
        return html_tag("p", "No clip is good, so no band has a mean.", class_="warn")

    # The curves: of all clips, and of the splits if these are few.
    overall = stats.pop("all")
    curves = [("all", np.array(overall["mean_F"]))]
    if 1 < len(stats) < MAX_CURVES:
        curves += [(split, np.array(part["mean_F"])) for split, part in stats.items()]
    mean_F = np.array(overall["mean_F"])
    std_F = np.array(overall["std_F"])
    ticks = spectrograms.mel_band_ticks(store.spec, min_gap=0.09)
    chart = html.curve_chart(curves, (mean_F - std_F, mean_F + std_F), ticks)
    legend = (
        html_tag("span", html_tag("i", class_=f"key key{number}"), name)
        for number, (name, _) in enumerate(curves)
    )

    # The statistics, in words.
    description = (
        f"{overall['frames']:,} valid frames of good clips: mean {overall['mean']:.3f}, "
        f"deviation {overall['std']:.3f} nat"
    )
    if "quantisation_rms_nat" in overall:
        rms_nat = overall["quantisation_rms_nat"]
        max_nat = overall["quantisation_max_nat"]
        description += (
            f"; stored as {store.dtype} with an error of {rms_nat:.2g} nat rms, {max_nat:.2g} at most"
        )
    picture = join_markup(html_tag("p", *legend, class_="legend"), chart)
    return html.html_figure(
        picture, "Mean of each band, ± its standard deviation, nat", description, wide=True
    )


def example_clips_section(
    store: FeatureStore,
    labels: pl.DataFrame,
    coverage: ClipCoverage,
    clip_count: int,
    players: SoundPlayers | None,
) -> Markup:
    """Spectrograms of clips of different classes, all on one colour scale, with players if there are any."""
    # There may be no clip to show.
    good = sum(coverage.good_counts)
    if good == sum(coverage.excluded_counts):
        reason = "Every good clip is excluded" if good else "No clip is good"
        return html_tag("p", f"{reason}, so there is nothing to show.", class_="warn")

    # One scale of colours and one axis of bands for all, so that clips can be compared.
    rows_B = spectrograms.pick_varied_rows(store, labels, clip_count)
    clips = store.manifest_columns("clip_id", "split")[rows_B].rows()
    mel_BTF = spectrograms.read_log_mel(store, rows_B)
    value_range = spectrograms.colour_range(mel_BTF)
    ticks = spectrograms.mel_band_ticks(store.spec)

    # A figure for every clip.
    figures = []
    for row, mel_TF, (clip_id, split) in zip(rows_B.tolist(), mel_BTF, clips, strict=True):
        chart = html.spectrogram_chart(
            mel_TF,
            value_range,
            ticks,
            seconds=spectrograms.time_axis_seconds(store.spec),
            frame_seconds=store.spec.hop_seconds,
            valid_frames=int(store.n_frames_N[row]),
        )
        title = spectrograms.label_title(store, labels, row, max_letters=90)
        description = f"{clip_id} · {split} · row {row:,}"
        figure = join_markup(chart, optional_player(players, row))
        figures.append(html.html_figure(figure, title, description))

    # The axes are explained once, above.
    note = "Hz upwards, seconds across. A line marks the end of a shorter clip; the dimmed rest is not part of it."
    if players is None:
        note += " With --sounds, the page also plays them."
    else:
        note += f" Players have the first {PREVIEW_SECONDS:g} s, all equally loud."
    return join_markup(
        html_tag("p", note, class_="soft"),
        html_tag("div", html.colour_scale_bar(value_range), class_="wide"),
        html_tag("div", *figures, class_="grid"),
    )


def build_section(record: dict[str, Any]) -> Markup:
    """Everything that the build recorded, except the versions, which are in the header of the page."""
    if not record:
        return html_tag("p", "The store has no build.json, so its build is unknown.", class_="warn")
    # The record, then the speed that follows from it.
    pairs = list(_flatten_record({key: value for key, value in record.items() if key != "versions"}))
    if record.get("seconds") and record.get("clips_tried"):
        pairs.append(("clips a second", f"{record['clips_tried'] / record['seconds']:.1f}"))
    note = "From the last run of the command; a resumed run only tried the clips that were still missing."
    return folded(
        "What the build was asked and found",
        join_markup(html_tag("p", note, class_="soft"), html.definition_list(pairs)),
    )


def _flatten_record(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and texts of a record: keys of nested records are joined, entries of a list get a line each."""
    for key, value in record.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict) and value:
            yield from _flatten_record(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            yield name, "\n".join(map(str, value)) or "none"
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        elif isinstance(value, int | float):
            yield name, f"{value:,}".removesuffix(".0")
        else:
            yield name, "none" if value is None else str(value)
