"""The page's section on classes: how many clips stand in each, before and after label propagation.

The page's section on what an audit found: findings by weight, then the figures behind them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from pipeline.audit.audit import Audit, Sides
from pipeline.audit.class_pairs import Pair
from pipeline.audit.findings import LEVELS, Finding, findings
from pipeline.labels.ontology import named
from pipeline.report.html import Markup, joined, tag
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import ClassCounts, Coverage

EVERY = "all splits"


def class_section(
    store: FeatureStore, labels: pl.DataFrame, sources: dict[str, str], seen: Coverage
) -> Markup:
    """Where the label sets come from, the classes that have no clip, and a table of all."""
    counts = ClassCounts.of(store, labels, seen.splits)
    if not counts.listed_NC.any():
        return joined(
            tag("p", "No clip has a label: the store serves pre-training, not evaluation.", class_="warn"),
            *outside(labels),
        )
    sets = (
        joined(tag("dt", name), tag("dd", _set_told(counts, seen, name, sources[name])))
        for name in counts.positives_NC
    )
    return joined(
        tag("dl", *sets),
        *outside(labels),
        *(without_positives(store, counts, seen, split) for split in range(len(seen.splits))),
        class_table(store, counts, seen),
    )


def _set_told(counts: ClassCounts, seen: Coverage, name: str, source: str) -> str:
    mean = counts.positives_NC[name].sum() / max(sum(seen.good), 1)
    return f"{mean:.3f} labels a good clip; {source}"


def outside(labels: pl.DataFrame) -> Iterator[Markup]:
    """Labels that the class list does not know, where there are any."""
    odd = labels["outside"].explode().drop_nulls()
    if len(odd):
        some = ", ".join(named(mid) for mid in odd.unique().sort().head(5))
        clips = (labels["outside"].list.len() > 0).sum()
        yield tag("p", f"Clips with labels outside the class list: {clips:,}; such as {some}.", class_="warn")


def without_positives(store: FeatureStore, counts: ClassCounts, seen: Coverage, split: int) -> Markup:
    """The classes of a split whose average precision is undefined, by name."""
    empty_C = counts.positives_NC["raw"][split] == 0
    name, total = seen.splits[split], len(empty_C)
    if not seen.good[split]:
        return tag("p", tag("b", name), ": no good clip, so no class has a positive.", class_="warn")
    if not empty_C.any():
        return tag("p", tag("b", name), f": every one of the {total} classes has a positive clip.")
    others = {rule: found_NC[split] for rule, found_NC in counts.positives_NC.items() if rule != "raw"}
    after = "".join(f"; {(found_C == 0).sum()} under {rule}" for rule, found_C in others.items())
    told = tag(
        "summary",
        tag("b", name),
        f": {empty_C.sum()} of {total} classes have no positive clip{after}. Their AP is undefined.",
    )
    items = []
    for index in np.flatnonzero(empty_C):
        filled = [f"{rule}: {found_C[index]:,}" for rule, found_C in others.items() if found_C[index]]
        note = tag("span", f" ({', '.join(filled)})", class_="soft") if filled else ""
        items.append(tag("li", store.classes.names[index], note))
    return tag("details", told, tag("ul", *items, class_="names"))


def class_table(store: FeatureStore, counts: ClassCounts, seen: Coverage) -> Markup:
    """A row a class; the counts of every split lie in its `data-n`, of which the page's script shows one."""
    columns = {"listed": counts.listed_NC, "good": counts.positives_NC["raw"]}
    columns |= {f"good, {name}": found for name, found in counts.positives_NC.items() if name != "raw"}
    every_CK = np.stack([column_NC.sum(0) for column_NC in columns.values()], axis=1)
    split_NCK = np.stack(list(columns.values()), axis=2)
    rows = (
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", count, class_="n" if count else "n zero") for count in every_CK[index]),
            data_n=";".join(",".join(map(str, part_K)) for part_K in [every_CK[index], *split_NCK[:, index]]),
        )
        for index, name in enumerate(store.classes.names)
    )
    heads = (
        tag("th", tag("button", name, type="button"), scope="col", class_="n" if place else None)
        for place, name in enumerate(["class", *columns])
    )
    choices = (tag("option", name, value=number) for number, name in enumerate([EVERY, *seen.splits]))
    find = tag("input", id="find", type="search", placeholder="find a class", aria_label="find a class")
    which = tag("select", *choices, id="which", aria_label="split")
    hint = tag("span", "clips of each class; click a heading to sort", class_="soft")
    inner = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), data_sorted="")
    return joined(tag("div", find, which, hint, class_="tools"), tag("div", inner, class_="box"))


MOST_SPLITS = 100  # rows of the table; a set with more is cut by its own kind of thing


def audit_section(seen: Audit, store: str) -> Markup:
    """Findings, splits, what labels lack, surprising pairs, shifts; `store` is named in commands."""
    found = findings(seen, store)
    return joined(
        finding_list(found),
        split_table(seen),
        *lacking_tables(seen),
        *pair_tables(seen),
        *(() if seen.sides is None or not seen.sides.shifts else [shift_table(seen.sides)]),
    )


def finding_list(found: Sequence[Finding]) -> Markup:
    """One item a finding, under how many there are of each level."""
    if not found:
        return tag("p", "Nothing is wrong, and nothing surprising.")
    counted = {level: sum(f.level == level for f in found) for level in LEVELS}
    lead = joined(
        *(
            tag("span", _badge(level), f" {count:,}: {LEVELS[level]}", class_=None if count else "soft")
            for level, count in counted.items()
        )
    )
    return joined(tag("p", lead, class_="levels"), tag("ul", *map(_item, found), class_="findings"))


def _badge(level: str) -> Markup:
    return tag("b", level, class_=f"level {level}")


def _item(finding: Finding) -> Markup:
    parts = [_badge(finding.level), " ", finding.what]
    if finding.examples:
        parts.append(tag("div", "such as ", "; ".join(finding.examples), class_="soft"))
    if finding.do:
        does = tag("code", finding.do) if finding.do.startswith("ajepa-data") else finding.do
        parts.append(tag("div", "→ ", does))
    return tag("li", *parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]], texts: int) -> Markup:
    """A table whose first `texts` columns are names, the others numbers."""
    top = (tag("th", head, scope="col", class_="n" if at >= texts else None) for at, head in enumerate(heads))
    lines = (
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_="n" if at >= texts else None) for at, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    )
    inner = tag("table", tag("thead", tag("tr", *top)), tag("tbody", *lines))
    return tag("div", inner, class_="scroll")


def split_table(seen: Audit) -> Markup:
    """How many clips, labels and classes each split has, and how evenly."""
    heads = ("split", "in use", "excluded", "no label", "labels a clip", "classes", "effective", "Gini")
    rows = [
        (
            joined(s.split, tag("span", " held out", class_="soft") if s.held_out else ""),
            s.in_use,
            s.excluded,
            s.unlabelled,
            f"{s.labels_a_clip:.3f}",
            s.classes,
            f"{s.effective_classes:.1f}",
            f"{s.gini:.3f}",
        )
        for s in seen.splits[:MOST_SPLITS]
    ]
    note = "Effective: so many equal classes are as varied. Gini: 0 where all are alike, 1 where one has all."
    more = f" And {len(seen.splits) - MOST_SPLITS:,} more splits." if len(seen.splits) > MOST_SPLITS else ""
    return joined(
        tag("h3", "Labels of the clips in use"), _table(heads, rows, 1), tag("p", note, more, class_="soft")
    )


def _block(name: str, body: Markup, in_all: int) -> Markup:
    """A table under its name, which says of how many rows it shows the first."""
    more = tag("span", f" · the first of {in_all:,}", class_="soft")
    return joined(tag("h3", name, more), body)


def lacking_tables(seen: Audit) -> Iterator[Markup]:
    """What the clips of each label set should have and do not."""
    for told in (c for c in seen.contradictions if c.pairs):
        rows = [(p.name, p.implied, p.clips) for p in told.pairs]
        body = _table(("class", "without", "clips"), rows, 2)
        yield _block(f"Label set {told.label_set} lacks", body, told.pairs_in_all)


def pair_tables(seen: Audit) -> Iterator[Markup]:
    """Unrelated classes that stand together more, and less, often than by chance."""
    heads = ("class", "with", "clips", "by chance", "G²")
    for word, pairs, in_all in (
        ("more", seen.pairs.more, seen.pairs.more_in_all),
        ("less", seen.pairs.less, seen.pairs.less_in_all),
    ):
        if pairs:
            yield _block(f"Together {word} often than by chance", _table(heads, _rows(pairs), 2), in_all)


def _rows(pairs: Sequence[Pair]) -> list[tuple[object, ...]]:
    return [(p.one, p.other, p.clips, f"{p.expected:,.1f}", f"{p.g2:,.0f}") for p in pairs]


def shift_table(sides: Sides) -> Markup:
    """The classes whose shares differ most between what is trained on and what is held out."""
    heads = ("class", "of clips to train on", f"of {' + '.join(sides.held_out)}")
    rows = [(s.name, f"{s.trained:.3%}", f"{s.held_out:.3%}") for s in sides.shifts]
    note = f"{sides.shift:.1%} of the labels would have to change their class for both to be alike."
    name = "Frequencies that differ between training and evaluation"
    return joined(_block(name, _table(heads, rows, 1), sides.shifts_in_all), tag("p", note, class_="soft"))
