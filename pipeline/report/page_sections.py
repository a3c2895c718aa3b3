"""The page's section on classes: how many clips stand in each, before and after label propagation.

The page's section on what an audit found: findings by weight, then the figures behind them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from pipeline.audit.audit import StoreAudit, TrainEvalShift
from pipeline.audit.class_pairs import ClassPair
from pipeline.audit.findings import FINDING_LEVELS, AuditFinding, collect_findings
from pipeline.labels.ontology import name_with_id
from pipeline.report.html import Markup, html_tag, join_markup
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import ClassCounts, ClipCoverage

ALL_SPLITS = "all splits"


def classes_section(
    store: FeatureStore, labels: pl.DataFrame, sources: dict[str, str], coverage: ClipCoverage
) -> Markup:
    """Where the label sets come from, the classes that have no clip, and a table of all."""
    counts = ClassCounts.from_store(store, labels, coverage.splits)
    if not counts.listed_NC.any():
        return join_markup(
            html_tag(
                "p", "No clip has a label: the store serves pre-training, not evaluation.", class_="warn"
            ),
            *unknown_labels_note(labels),
        )
    sets = (
        join_markup(
            html_tag("dt", name), html_tag("dd", _describe_label_set(counts, coverage, name, sources[name]))
        )
        for name in counts.positives_NC
    )
    return join_markup(
        html_tag("dl", *sets),
        *unknown_labels_note(labels),
        *(empty_classes_note(store, counts, coverage, split) for split in range(len(coverage.splits))),
        class_count_table(store, counts, coverage),
    )


def _describe_label_set(counts: ClassCounts, coverage: ClipCoverage, name: str, source: str) -> str:
    mean = counts.positives_NC[name].sum() / max(sum(coverage.good_counts), 1)
    return f"{mean:.3f} labels a good clip; {source}"


def unknown_labels_note(labels: pl.DataFrame) -> Iterator[Markup]:
    """Labels that the class list does not know, where there are any."""
    odd = labels["outside"].explode().drop_nulls()
    if len(odd):
        some = ", ".join(name_with_id(mid) for mid in odd.unique().sort().head(5))
        clips = (labels["outside"].list.len() > 0).sum()
        yield html_tag(
            "p", f"Clips with labels outside the class list: {clips:,}; such as {some}.", class_="warn"
        )


def empty_classes_note(
    store: FeatureStore, counts: ClassCounts, coverage: ClipCoverage, split: int
) -> Markup:
    """The classes of a split whose average precision is undefined, by name."""
    empty_C = counts.positives_NC["raw"][split] == 0
    name, total = coverage.splits[split], len(empty_C)
    if not coverage.good_counts[split]:
        return html_tag(
            "p", html_tag("b", name), ": no good clip, so no class has a positive.", class_="warn"
        )
    if not empty_C.any():
        return html_tag("p", html_tag("b", name), f": every one of the {total} classes has a positive clip.")
    others = {rule: found_NC[split] for rule, found_NC in counts.positives_NC.items() if rule != "raw"}
    after = "".join(f"; {(found_C == 0).sum()} under {rule}" for rule, found_C in others.items())
    told = html_tag(
        "summary",
        html_tag("b", name),
        f": {empty_C.sum()} of {total} classes have no positive clip{after}. Their AP is undefined.",
    )
    items = []
    for index in np.flatnonzero(empty_C):
        filled = [f"{rule}: {found_C[index]:,}" for rule, found_C in others.items() if found_C[index]]
        note = html_tag("span", f" ({', '.join(filled)})", class_="soft") if filled else ""
        items.append(html_tag("li", store.classes.names[index], note))
    return html_tag("details", told, html_tag("ul", *items, class_="names"))


def class_count_table(store: FeatureStore, counts: ClassCounts, coverage: ClipCoverage) -> Markup:
    """A row a class; the counts of every split lie in its `data-n`, of which the page's script shows one."""
    columns = {"listed": counts.listed_NC, "good": counts.positives_NC["raw"]}
    columns |= {f"good, {name}": found for name, found in counts.positives_NC.items() if name != "raw"}
    every_CK = np.stack([column_NC.sum(0) for column_NC in columns.values()], axis=1)
    split_NCK = np.stack(list(columns.values()), axis=2)
    rows = (
        html_tag(
            "tr",
            html_tag("th", name, scope="row"),
            *(html_tag("td", count, class_="n" if count else "n zero") for count in every_CK[index]),
            data_n=";".join(",".join(map(str, part_K)) for part_K in [every_CK[index], *split_NCK[:, index]]),
        )
        for index, name in enumerate(store.classes.names)
    )
    heads = (
        html_tag("th", html_tag("button", name, type="button"), scope="col", class_="n" if place else None)
        for place, name in enumerate(["class", *columns])
    )
    choices = (
        html_tag("option", name, value=number) for number, name in enumerate([ALL_SPLITS, *coverage.splits])
    )
    find = html_tag("input", id="find", type="search", placeholder="find a class", aria_label="find a class")
    which = html_tag("select", *choices, id="which", aria_label="split")
    hint = html_tag("span", "clips of each class; click a heading to sort", class_="soft")
    inner = html_tag(
        "table", html_tag("thead", html_tag("tr", *heads)), html_tag("tbody", *rows), data_sorted=""
    )
    return join_markup(
        html_tag("div", find, which, hint, class_="tools"), html_tag("div", inner, class_="box")
    )


MAX_SPLIT_ROWS = 100  # rows of the table; a set with more is cut by its own kind of thing


def audit_section(audit: StoreAudit, store_name: str) -> Markup:
    """Findings, splits, what labels lack, surprising pairs, shifts; `store` is named in commands."""
    found = collect_findings(audit, store_name)
    return join_markup(
        finding_list(found),
        audit_split_table(audit),
        *missing_label_tables(audit),
        *class_pair_tables(audit),
        *(() if audit.sides is None or not audit.sides.shifts else [class_shift_table(audit.sides)]),
    )


def finding_list(all_findings: Sequence[AuditFinding]) -> Markup:
    """One item a finding, under how many there are of each level."""
    if not all_findings:
        return html_tag("p", "Nothing is wrong, and nothing surprising.")
    counted = {level: sum(f.level == level for f in all_findings) for level in FINDING_LEVELS}
    lead = join_markup(
        *(
            html_tag(
                "span",
                _level_badge(level),
                f" {count:,}: {FINDING_LEVELS[level]}",
                class_=None if count else "soft",
            )
            for level, count in counted.items()
        )
    )
    return join_markup(
        html_tag("p", lead, class_="levels"),
        html_tag("ul", *map(_finding_item, all_findings), class_="findings"),
    )


def _level_badge(level: str) -> Markup:
    return html_tag("b", level, class_=f"level {level}")


def _finding_item(finding: AuditFinding) -> Markup:
    parts = [_level_badge(finding.level), " ", finding.what]
    if finding.examples:
        parts.append(html_tag("div", "such as ", "; ".join(finding.examples), class_="soft"))
    if finding.do:
        does = html_tag("code", finding.do) if finding.do.startswith("ajepa-data") else finding.do
        parts.append(html_tag("div", "→ ", does))
    return html_tag("li", *parts)


def _figures_table(headings: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int) -> Markup:
    """A table whose first `texts` columns are names, the others numbers."""
    top = (
        html_tag("th", head, scope="col", class_="n" if at >= text_columns else None)
        for at, head in enumerate(headings)
    )
    lines = (
        html_tag(
            "tr",
            html_tag("th", row[0], scope="row"),
            *(
                html_tag("td", cell, class_="n" if at >= text_columns else None)
                for at, cell in enumerate(row[1:], 1)
            ),
        )
        for row in rows
    )
    inner = html_tag("table", html_tag("thead", html_tag("tr", *top)), html_tag("tbody", *lines))
    return html_tag("div", inner, class_="scroll")


def audit_split_table(audit: StoreAudit) -> Markup:
    """How many clips, labels and classes each split has, and how evenly."""
    heads = ("split", "in use", "excluded", "no label", "labels a clip", "classes", "effective", "Gini")
    rows = [
        (
            join_markup(s.split, html_tag("span", " held out", class_="soft") if s.held_out else ""),
            s.in_use,
            s.excluded,
            s.unlabelled,
            f"{s.labels_a_clip:.3f}",
            s.classes,
            f"{s.effective_classes:.1f}",
            f"{s.gini:.3f}",
        )
        for s in audit.splits[:MAX_SPLIT_ROWS]
    ]
    note = "Effective: so many equal classes are as varied. Gini: 0 where all are alike, 1 where one has all."
    more = (
        f" And {len(audit.splits) - MAX_SPLIT_ROWS:,} more splits."
        if len(audit.splits) > MAX_SPLIT_ROWS
        else ""
    )
    return join_markup(
        html_tag("h3", "Labels of the clips in use"),
        _figures_table(heads, rows, 1),
        html_tag("p", note, more, class_="soft"),
    )


def _titled_table(title: str, body: Markup, total_rows: int) -> Markup:
    """A table under its name, which says of how many rows it shows the first."""
    more = html_tag("span", f" · the first of {total_rows:,}", class_="soft")
    return join_markup(html_tag("h3", title, more), body)


def missing_label_tables(audit: StoreAudit) -> Iterator[Markup]:
    """What the clips of each label set should have and do not."""
    for told in (c for c in audit.contradictions if c.pairs):
        rows = [(p.name, p.implied, p.clips) for p in told.pairs]
        body = _figures_table(("class", "without", "clips"), rows, 2)
        yield _titled_table(f"Label set {told.label_set} lacks", body, told.pairs_in_all)


def class_pair_tables(audit: StoreAudit) -> Iterator[Markup]:
    """Unrelated classes that stand together more, and less, often than by chance."""
    heads = ("class", "with", "clips", "by chance", "G²")
    for word, pairs, in_all in (
        ("more", audit.pairs.more, audit.pairs.more_in_all),
        ("less", audit.pairs.less, audit.pairs.less_in_all),
    ):
        if pairs:
            yield _titled_table(
                f"Together {word} often than by chance", _figures_table(heads, _pair_rows(pairs), 2), in_all
            )


def _pair_rows(pairs: Sequence[ClassPair]) -> list[tuple[object, ...]]:
    return [(p.one, p.other, p.clips, f"{p.expected:,.1f}", f"{p.g2:,.0f}") for p in pairs]


def class_shift_table(sides: TrainEvalShift) -> Markup:
    """The classes whose shares differ most between what is trained on and what is held out."""
    heads = ("class", "of clips to train on", f"of {' + '.join(sides.held_out)}")
    rows = [(s.name, f"{s.trained:.3%}", f"{s.held_out:.3%}") for s in sides.shifts]
    note = f"{sides.shift:.1%} of the labels would have to change their class for both to be alike."
    name = "Frequencies that differ between training and evaluation"
    return join_markup(
        _titled_table(name, _figures_table(heads, rows, 1), sides.shifts_in_all),
        html_tag("p", note, class_="soft"),
    )
