"""A store on one page: HTML that needs nothing beside itself, the same bytes for the same store."""

import importlib.resources
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import polars as pl

from pipeline.audit.audit import AuditedClips, audit_clips
from pipeline.files import replacing_file
from pipeline.report import html, spectrograms
from pipeline.report.html import Markup, html_tag, join_markup
from pipeline.report.page_sections import audit_section, classes_section
from pipeline.store import summary
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import FAILURE_REASONS
from pipeline.store.summary import ClipCoverage

STORE_SECTIONS = {
    "coverage": "Coverage",
    "failed": "What failed, and why",
    "classes": "Classes",
    "audit": "Audit of the labels",
    "sounds": "The sounds",
    "bands": "Mel bands",
    "clips": "Some clips",
    "build": "The build",
}

MAX_CURVES = 4  # curves that can be told apart

MAX_VALUE_ROWS = 12  # of a distribution; the rest are counted together

LEVEL_EDGES_DBFS = np.arange(-90, 7, 2.0)


def write_store_page(store: FeatureStore, path: Path, *, clip_count: int = 12) -> None:
    """Write the page about a store to `path`, whole or not at all."""
    content = render_store_page(store, clip_count=clip_count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def render_store_page(store: FeatureStore, *, clip_count: int = 12) -> str:
    """The page as text. `clips` spectrograms take about 50 kB each."""
    seen = ClipCoverage.from_manifest(store.manifest, store.exclusions.excluded_mask_N(store.manifest))
    labels, sources = summary.read_label_table(store)
    bodies = {
        "coverage": coverage_section(seen, store.exclusions.summarise_lists()),
        "failed": failure_section(store, seen),
        "classes": classes_section(store, labels, sources, seen),
        "audit": audit_section(audit_clips(AuditedClips.of_store(store)), store.path.name),
        "sounds": sounds_section(store, seen),
        "bands": mel_bands_section(store),
        "clips": example_clips_section(store, labels, seen, clip_count),
        "build": build_section(read_build_json(store)),
    }
    parts = [
        html_tag("section", html_tag("h2", STORE_SECTIONS[key]), body, id=key) for key, body in bodies.items()
    ]
    frame = importlib.resources.files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    body = join_markup(store_page_header(store, seen, sources), html_tag("main", *parts))
    return Template(frame).substitute(title=html_tag("title", store.path.name)[7:-8], body=body)


def store_page_header(store: FeatureStore, coverage: ClipCoverage, sources: dict[str, str]) -> Markup:
    """What the store is: how much of it is good, its identity, its numbers."""
    good, listed, spec = sum(coverage.good_counts), sum(coverage.listed_counts), store.spec
    share = html_tag("b", f"{100 * good / max(listed, 1):.2f} %")
    lead = join_markup(html_tag("b", good), " of ", html_tag("b", listed), " clips are good: ", share, ".")
    identity = {
        "store": store.store_id,
        "plan": store.header.plan_id,
        "mel spec": f"{spec.name} ({spec.spec_id})",
    }
    facts = {
        "mel": f"{listed:,} clips of {store.frames} frames of {store.bands} bands, {store.dtype}",
        "on disk": f"{summary.format_bytes(summary.stored_mel_bytes(store))} in {store.header.layout.shard_count:,} shards",
        "label sets": ", ".join(sources),
        "versions": ", ".join(f"{k} {v}" for k, v in read_build_json(store).get("versions", {}).items())
        or "not recorded",
    }
    numbers = {key.replace("_", " "): value for key, value in spec.to_json().items() if key != "name"}
    ids = [(name, html_tag("span", value, class_="id")) for name, value in identity.items()]
    links = html_tag("nav", *(html_tag("a", name, href=f"#{key}") for key, name in STORE_SECTIONS.items()))
    more = html_tag(
        "details", html_tag("summary", "Every number of the mel spec"), definition_list(numbers.items())
    )
    told = html_tag("div", definition_list([*ids, *facts.items()]), more)
    return html_tag(
        "header", html_tag("h1", store.path.name), html_tag("p", lead, class_="lead"), told, links
    )


def definition_list(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Numbers as they are: a rate needs no thousands told apart."""
    told = ((name, value if isinstance(value, Markup) else str(value)) for name, value in pairs)
    return html_tag("dl", *(join_markup(html_tag("dt", name), html_tag("dd", value)) for name, value in told))


def coverage_section(coverage: ClipCoverage, exclude_lists: Sequence[tuple[str, str, int]]) -> Markup:
    """A bar a split, what exclude lists leave out, then what is odd but used."""
    bars = []
    for split, listed, good, failed in zip(
        coverage.splits, coverage.listed_counts, coverage.good_counts, coverage.failed_counts, strict=True
    ):
        told = join_markup(good, " of ", listed, " good, ", f"{100 * good / max(listed, 1):.2f} %")
        if not good:
            told = html_tag("span", "no good clip among ", listed, class_="warn")
        bar = html.share_bar([("good", good), ("failed", failed)])
        bars.append(
            html_tag("div", html_tag("p", html_tag("b", split), html_tag("span", told)), bar, class_="split")
        )
    lists = (f"{clips:,} clips by {name}" for name, _, clips in exclude_lists)
    if exclude_lists:
        note = f"Good clips that exclude lists keep loaders from drawing: {sum(coverage.excluded_counts):,} ({', '.join(lists)})."
        bars.append(html_tag("p", note, class_="soft"))
    if not coverage.flag_counts:
        return join_markup(*bars, html_tag("p", "No good clip has anything odd about it.", class_="soft"))
    rows = [
        (flag, summary.FLAG_MEANINGS.get(flag, ""), counts) for flag, counts in coverage.flag_counts.items()
    ]
    odd = join_markup(html_tag("h3", "Odd, but used"), split_count_table("flag", coverage.splits, rows))
    return join_markup(*bars, odd)


def failure_section(store: FeatureStore, coverage: ClipCoverage) -> Markup:
    """Reasons with what they mean, by split, and the first few clips of each."""
    if not coverage.reason_counts:
        return html_tag("p", "Nothing: every clip that was listed is good.")
    rows = [(reason, FAILURE_REASONS[reason], counts) for reason, counts in coverage.reason_counts.items()]
    parts = [split_count_table("reason", coverage.splits, rows)]
    some = summary.failure_examples(store.manifest)
    for reason, counts in coverage.reason_counts.items():
        count = sum(counts)
        shown = (
            f"the first {summary.EXAMPLES_PER_REASON} of {count:,}"
            if count > summary.EXAMPLES_PER_REASON
            else f"{count:,}"
        )
        items = (
            html_tag(
                "li",
                html_tag("code", clip["clip_id"]),
                " in ",
                clip["split"],
                ": ",
                clip["detail"] or FAILURE_REASONS[reason],
            )
            for clip in some[reason]
        )
        heading = html_tag("h3", reason, html_tag("span", f" · {shown}", class_="soft"))
        parts += [heading, html_tag("ul", *items, class_="examples")]
    return join_markup(*parts)


def split_count_table(
    heading: str, splits: Sequence[str], rows: Sequence[tuple[str, str, Sequence[int]]]
) -> Markup:
    """Rows of a name, what it means, and a count a split."""
    names = (html_tag("th", split, scope="col", class_="n") for split in splits)
    lines = (
        html_tag(
            "tr",
            html_tag(
                "th",
                html_tag("span", name, class_="name"),
                html_tag("span", meaning, class_="soft"),
                scope="row",
            ),
            *(html_tag("td", count, class_="n" if count else "n zero") for count in counts),
        )
        for name, meaning, counts in rows
    )
    top = html_tag("thead", html_tag("tr", html_tag("th", heading, scope="col"), *names))
    return html_tag("div", html_tag("table", top, html_tag("tbody", *lines)), class_="scroll")


def sounds_section(store: FeatureStore, coverage: ClipCoverage) -> Markup:
    """How long, how loud, of what kind the good clips' sources are."""
    if not sum(coverage.good_counts):
        return html_tag("p", "No clip is good, so there is nothing to tell of.", class_="warn")
    manifest, whole = store.manifest, store.spec.clip_seconds
    longest_N = whole * (np.arange(32) - 0.5) / 20  # a full clip lies in the middle of its bar
    ticks = [round(whole * part, 3) for part in (0, 0.5, 1, 1.5)]
    lengths = html.histogram_chart(
        summary.good_clip_histogram(manifest, "seconds", longest_N),
        longest_N,
        ticks,
        "seconds",
        log_scale=True,
    )
    tiles = [
        html_figure(lengths, "Length of the source", "logarithmic; the last bar holds all that is longer")
    ]
    for column, name in (("peak_dbfs", "Peak"), ("rms_dbfs", "Loudness (RMS)")):
        counts_N = summary.good_clip_histogram(manifest, column, LEVEL_EDGES_DBFS)
        drawn = html.histogram_chart(counts_N, LEVEL_EDGES_DBFS, [-90, -60, -30, 0], "dBFS")
        tiles.append(
            html_figure(drawn, name, "of the mono wave before resampling; outer bars hold what lies beyond")
        )
    for column, name in (("rate_hz", "Input rate, Hz"), ("codec", "Codec"), ("channels", "Channels")):
        counted = [
            ("unknown" if value is None else value, count)
            for value, count in summary.count_good_values(manifest, column)
        ]
        rest = sum(count for _, count in counted[MAX_VALUE_ROWS:])
        more = [(f"{len(counted) - MAX_VALUE_ROWS} others", rest)] if rest else []
        tiles.append(html_figure(html.count_bar_table(counted[:MAX_VALUE_ROWS] + more), name, "good clips"))
    return html_tag("div", *tiles, class_="grid")


def html_figure(picture: Markup, name: str, description: str, *, wide: bool = False) -> Markup:
    caption = html_tag("figcaption", html_tag("b", name), html_tag("br"), description)
    return html_tag("figure", caption, picture, class_="wide" if wide else None)


def mel_bands_section(store: FeatureStore) -> Markup:
    """Mean and deviation of every band, and the means of the splits."""
    there = {name: part for name, part in store.stats.items() if part["frames"]}
    if not there:
        return html_tag("p", "No clip is good, so no band has a mean.", class_="warn")
    every = there.pop("all")
    parts = {"all": every} | (there if 1 < len(there) < MAX_CURVES else {})
    mean_F, std_F = np.array(every["mean_F"]), np.array(every["std_F"])
    lines = [(name, np.array(part["mean_F"])) for name, part in parts.items()]
    drawn = html.curve_chart(
        lines, (mean_F - std_F, mean_F + std_F), spectrograms.mel_band_ticks(store.spec, min_gap=0.09)
    )
    keys = (html_tag("span", html_tag("i", class_=f"key key{n}"), name) for n, (name, _) in enumerate(lines))
    told = f"{every['frames']:,} valid frames of good clips: mean {every['mean']:.3f}, deviation {every['std']:.3f} nat"
    if "quantisation_rms_nat" in every:
        rms, most = every["quantisation_rms_nat"], every["quantisation_max_nat"]
        told += f"; stored as {store.dtype} with an error of {rms:.2g} nat rms, {most:.2g} at most"
    body = join_markup(html_tag("p", *keys, class_="legend"), drawn)
    return html_figure(body, "Mean of each band, ± its standard deviation, nat", told, wide=True)


def example_clips_section(
    store: FeatureStore, labels: pl.DataFrame, coverage: ClipCoverage, clip_count: int
) -> Markup:
    """Spectrograms of clips of different classes, on one scale of colours."""
    if sum(coverage.good_counts) == sum(coverage.excluded_counts):
        why = "Every good clip is excluded" if sum(coverage.good_counts) else "No clip is good"
        return html_tag("p", f"{why}, so there is nothing to show.", class_="warn")
    rows_B = spectrograms.pick_varied_rows(store, labels, clip_count)
    mel_BTF = spectrograms.read_log_mel(store, rows_B)
    span, ticks = spectrograms.colour_range(mel_BTF), spectrograms.mel_band_ticks(store.spec)
    tiles = []
    for row, mel_TF in zip(rows_B.tolist(), mel_BTF, strict=True):
        drawn = html.spectrogram_chart(
            mel_TF,
            span,
            ticks,
            seconds=spectrograms.time_axis_seconds(store.spec),
            frame_seconds=spectrograms.frame_step_seconds(store.spec),
            valid_frames=int(store.n_frames_N[row]),
        )
        told = f"{store.manifest['clip_id'][row]} · {store.manifest['split'][row]} · row {row:,}"
        tiles.append(html_figure(drawn, spectrograms.label_title(store, labels, row, max_letters=90), told))
    note = html_tag(
        "p",
        "Hz upwards, seconds across. Where a line ends a clip, the dimmed rest is not its own.",
        class_="soft",
    )
    return join_markup(
        note,
        html_tag("div", html.colour_scale_bar(span), class_="wide"),
        html_tag("div", *tiles, class_="grid"),
    )


def read_build_json(store: FeatureStore) -> dict[str, Any]:
    """What build.json tells; empty where there is none."""
    path = store.path / "build.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def build_section(record: dict[str, Any]) -> Markup:
    """Everything that was recorded, the versions aside: they stand above."""
    if not record:
        return html_tag("p", "build.json is not there, so nothing is known of the build.", class_="warn")
    pairs = list(_flatten_record({key: value for key, value in record.items() if key != "versions"}))
    if record.get("seconds") and record.get("clips_tried"):
        pairs.append(("clips a second", f"{record['clips_tried'] / record['seconds']:.1f}"))
    note = html_tag(
        "p", "Of the last run of the command; a run that carried on tried only what was open.", class_="soft"
    )
    return join_markup(note, definition_list(pairs))


def _flatten_record(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested keys side by side, lists a line each."""
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
