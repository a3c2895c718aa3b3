"""A store on one page: HTML that needs nothing beside itself, the same bytes for the same store."""

import importlib.resources
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import polars as pl

from pipeline.audit.audit import Rows, audit
from pipeline.files import replacing
from pipeline.report import html, spectrograms
from pipeline.report.html import Markup, joined, tag
from pipeline.report.page_sections import audit_section, class_section
from pipeline.store import summary
from pipeline.store.feature_store import FeatureStore
from pipeline.store.manifest import REASONS
from pipeline.store.summary import Coverage

SECTIONS = {
    "coverage": "Coverage",
    "failed": "What failed, and why",
    "classes": "Classes",
    "audit": "Audit of the labels",
    "sounds": "The sounds",
    "bands": "Mel bands",
    "clips": "Some clips",
    "build": "The build",
}

LINES = 4  # curves that can be told apart

VALUES = 12  # of a distribution; the rest are counted together

PEAKS_DBFS = np.arange(-90, 7, 2.0)


def write_page(store: FeatureStore, path: Path, *, clips: int = 12) -> None:
    """Write the page about a store to `path`, whole or not at all."""
    content = page(store, clips=clips)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(content, encoding="utf-8")


def page(store: FeatureStore, *, clips: int = 12) -> str:
    """The page as text. `clips` spectrograms take about 50 kB each."""
    seen = Coverage.of(store.manifest, store.excluded.marks_N(store.manifest))
    labels, sources = summary.label_table(store)
    bodies = {
        "coverage": coverage_section(seen, store.excluded.lists()),
        "failed": failed_section(store, seen),
        "classes": class_section(store, labels, sources, seen),
        "audit": audit_section(audit(Rows.of(store)), store.path.name),
        "sounds": sound_section(store, seen),
        "bands": band_section(store),
        "clips": clip_section(store, labels, seen, clips),
        "build": build_section(told_by_build(store)),
    }
    parts = [tag("section", tag("h2", SECTIONS[key]), body, id=key) for key, body in bodies.items()]
    frame = importlib.resources.files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    body = joined(head(store, seen, sources), tag("main", *parts))
    return Template(frame).substitute(title=tag("title", store.path.name)[7:-8], body=body)


def head(store: FeatureStore, seen: Coverage, sources: dict[str, str]) -> Markup:
    """What the store is: how much of it is good, its identity, its numbers."""
    good, listed, spec = sum(seen.good), sum(seen.listed), store.spec
    share = tag("b", f"{100 * good / max(listed, 1):.2f} %")
    lead = joined(tag("b", good), " of ", tag("b", listed), " clips are good: ", share, ".")
    identity = {
        "store": store.store_id,
        "plan": store.header.plan_id,
        "mel spec": f"{spec.name} ({spec.spec_id})",
    }
    facts = {
        "mel": f"{listed:,} clips of {store.frames} frames of {store.bands} bands, {store.dtype}",
        "on disk": f"{summary.size(summary.mel_bytes(store))} in {store.header.layout.shards:,} shards",
        "label sets": ", ".join(sources),
        "versions": ", ".join(f"{k} {v}" for k, v in told_by_build(store).get("versions", {}).items())
        or "not recorded",
    }
    numbers = {key.replace("_", " "): value for key, value in spec.to_json().items() if key != "name"}
    ids = [(name, tag("span", value, class_="id")) for name, value in identity.items()]
    links = tag("nav", *(tag("a", name, href=f"#{key}") for key, name in SECTIONS.items()))
    more = tag("details", tag("summary", "Every number of the mel spec"), definitions(numbers.items()))
    told = tag("div", definitions([*ids, *facts.items()]), more)
    return tag("header", tag("h1", store.path.name), tag("p", lead, class_="lead"), told, links)


def definitions(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Numbers as they are: a rate needs no thousands told apart."""
    told = ((name, value if isinstance(value, Markup) else str(value)) for name, value in pairs)
    return tag("dl", *(joined(tag("dt", name), tag("dd", value)) for name, value in told))


def coverage_section(seen: Coverage, left_out: Sequence[tuple[str, str, int]]) -> Markup:
    """A bar a split, what exclude lists leave out, then what is odd but used."""
    bars = []
    for split, listed, good, failed in zip(seen.splits, seen.listed, seen.good, seen.failed, strict=True):
        told = joined(good, " of ", listed, " good, ", f"{100 * good / max(listed, 1):.2f} %")
        if not good:
            told = tag("span", "no good clip among ", listed, class_="warn")
        bar = html.share_bar([("good", good), ("failed", failed)])
        bars.append(tag("div", tag("p", tag("b", split), tag("span", told)), bar, class_="split"))
    lists = (f"{clips:,} clips by {name}" for name, _, clips in left_out)
    if left_out:
        note = f"Good clips that exclude lists keep loaders from drawing: {sum(seen.excluded):,} ({', '.join(lists)})."
        bars.append(tag("p", note, class_="soft"))
    if not seen.flags:
        return joined(*bars, tag("p", "No good clip has anything odd about it.", class_="soft"))
    rows = [(flag, summary.FLAGS.get(flag, ""), counts) for flag, counts in seen.flags.items()]
    odd = joined(tag("h3", "Odd, but used"), table("flag", seen.splits, rows))
    return joined(*bars, odd)


def failed_section(store: FeatureStore, seen: Coverage) -> Markup:
    """Reasons with what they mean, by split, and the first few clips of each."""
    if not seen.reasons:
        return tag("p", "Nothing: every clip that was listed is good.")
    rows = [(reason, REASONS[reason], counts) for reason, counts in seen.reasons.items()]
    parts = [table("reason", seen.splits, rows)]
    some = summary.examples(store.manifest)
    for reason, counts in seen.reasons.items():
        count = sum(counts)
        shown = f"the first {summary.EXAMPLES} of {count:,}" if count > summary.EXAMPLES else f"{count:,}"
        items = (
            tag(
                "li",
                tag("code", clip["clip_id"]),
                " in ",
                clip["split"],
                ": ",
                clip["detail"] or REASONS[reason],
            )
            for clip in some[reason]
        )
        heading = tag("h3", reason, tag("span", f" · {shown}", class_="soft"))
        parts += [heading, tag("ul", *items, class_="examples")]
    return joined(*parts)


def table(head: str, splits: Sequence[str], rows: Sequence[tuple[str, str, Sequence[int]]]) -> Markup:
    """Rows of a name, what it means, and a count a split."""
    names = (tag("th", split, scope="col", class_="n") for split in splits)
    lines = (
        tag(
            "tr",
            tag("th", tag("span", name, class_="name"), tag("span", meaning, class_="soft"), scope="row"),
            *(tag("td", count, class_="n" if count else "n zero") for count in counts),
        )
        for name, meaning, counts in rows
    )
    top = tag("thead", tag("tr", tag("th", head, scope="col"), *names))
    return tag("div", tag("table", top, tag("tbody", *lines)), class_="scroll")


def sound_section(store: FeatureStore, seen: Coverage) -> Markup:
    """How long, how loud, of what kind the good clips' sources are."""
    if not sum(seen.good):
        return tag("p", "No clip is good, so there is nothing to tell of.", class_="warn")
    manifest, whole = store.manifest, store.spec.clip_seconds
    longest_N = whole * (np.arange(32) - 0.5) / 20  # a full clip lies in the middle of its bar
    ticks = [round(whole * part, 3) for part in (0, 0.5, 1, 1.5)]
    lengths = html.histogram_chart(
        summary.histogram(manifest, "seconds", longest_N), longest_N, ticks, "seconds", log=True
    )
    tiles = [figure(lengths, "Length of the source", "logarithmic; the last bar holds all that is longer")]
    for column, name in (("peak_dbfs", "Peak"), ("rms_dbfs", "Loudness (RMS)")):
        counts_N = summary.histogram(manifest, column, PEAKS_DBFS)
        drawn = html.histogram_chart(counts_N, PEAKS_DBFS, [-90, -60, -30, 0], "dBFS")
        tiles.append(
            figure(drawn, name, "of the mono wave before resampling; outer bars hold what lies beyond")
        )
    for column, name in (("rate_hz", "Input rate, Hz"), ("codec", "Codec"), ("channels", "Channels")):
        counted = [
            ("unknown" if value is None else value, count)
            for value, count in summary.value_counts(manifest, column)
        ]
        rest = sum(count for _, count in counted[VALUES:])
        more = [(f"{len(counted) - VALUES} others", rest)] if rest else []
        tiles.append(figure(html.count_bars(counted[:VALUES] + more), name, "good clips"))
    return tag("div", *tiles, class_="grid")


def figure(drawn: Markup, name: str, told: str, *, wide: bool = False) -> Markup:
    caption = tag("figcaption", tag("b", name), tag("br"), told)
    return tag("figure", caption, drawn, class_="wide" if wide else None)


def band_section(store: FeatureStore) -> Markup:
    """Mean and deviation of every band, and the means of the splits."""
    there = {name: part for name, part in store.stats.items() if part["frames"]}
    if not there:
        return tag("p", "No clip is good, so no band has a mean.", class_="warn")
    every = there.pop("all")
    parts = {"all": every} | (there if 1 < len(there) < LINES else {})
    mean_F, std_F = np.array(every["mean_F"]), np.array(every["std_F"])
    lines = [(name, np.array(part["mean_F"])) for name, part in parts.items()]
    drawn = html.curve_chart(
        lines, (mean_F - std_F, mean_F + std_F), spectrograms.band_ticks(store.spec, gap=0.09)
    )
    keys = (tag("span", tag("i", class_=f"key key{n}"), name) for n, (name, _) in enumerate(lines))
    told = f"{every['frames']:,} valid frames of good clips: mean {every['mean']:.3f}, deviation {every['std']:.3f} nat"
    if "quantisation_rms_nat" in every:
        rms, most = every["quantisation_rms_nat"], every["quantisation_max_nat"]
        told += f"; stored as {store.dtype} with an error of {rms:.2g} nat rms, {most:.2g} at most"
    body = joined(tag("p", *keys, class_="legend"), drawn)
    return figure(body, "Mean of each band, ± its standard deviation, nat", told, wide=True)


def clip_section(store: FeatureStore, labels: pl.DataFrame, seen: Coverage, clips: int) -> Markup:
    """Spectrograms of clips of different classes, on one scale of colours."""
    if sum(seen.good) == sum(seen.excluded):
        why = "Every good clip is excluded" if sum(seen.good) else "No clip is good"
        return tag("p", f"{why}, so there is nothing to show.", class_="warn")
    rows_B = spectrograms.varied_rows(store, labels, clips)
    mel_BTF = spectrograms.read_mel(store, rows_B)
    span, ticks = spectrograms.colour_range(mel_BTF), spectrograms.band_ticks(store.spec)
    tiles = []
    for row, mel_TF in zip(rows_B.tolist(), mel_BTF, strict=True):
        drawn = html.mel_chart(
            mel_TF,
            span,
            ticks,
            seconds=spectrograms.axis_seconds(store.spec),
            frame_seconds=spectrograms.frame_seconds(store.spec),
            valid_frames=int(store.n_frames_N[row]),
        )
        told = f"{store.manifest['clip_id'][row]} · {store.manifest['split'][row]} · row {row:,}"
        tiles.append(figure(drawn, spectrograms.title(store, labels, row, letters=90), told))
    note = tag(
        "p",
        "Hz upwards, seconds across. Where a line ends a clip, the dimmed rest is not its own.",
        class_="soft",
    )
    return joined(note, tag("div", html.colour_bar(span), class_="wide"), tag("div", *tiles, class_="grid"))


def told_by_build(store: FeatureStore) -> dict[str, Any]:
    """What build.json tells; empty where there is none."""
    path = store.path / "build.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def build_section(told: dict[str, Any]) -> Markup:
    """Everything that was recorded, the versions aside: they stand above."""
    if not told:
        return tag("p", "build.json is not there, so nothing is known of the build.", class_="warn")
    pairs = list(_flat({key: value for key, value in told.items() if key != "versions"}))
    if told.get("seconds") and told.get("clips_tried"):
        pairs.append(("clips a second", f"{told['clips_tried'] / told['seconds']:.1f}"))
    note = tag(
        "p", "Of the last run of the command; a run that carried on tried only what was open.", class_="soft"
    )
    return joined(note, definitions(pairs))


def _flat(told: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested keys side by side, lists a line each."""
    for key, value in told.items():
        name = f"{above}{key}".replace("_", " ")
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            yield name, "\n".join(map(str, value)) or "none"
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        elif isinstance(value, int | float):
            yield name, f"{value:,}".removesuffix(".0")
        else:
            yield name, "none" if value is None else str(value)
