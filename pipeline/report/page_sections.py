"""Two sections of a store's page: its classes, before and after label propagation; and the findings of an audit."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from pipeline.audit.audit import StoreAudit, TrainEvalShift
from pipeline.audit.class_pairs import ClassPair
from pipeline.audit.findings import FINDING_LEVELS, AuditFinding, collect_findings
from pipeline.labels.ontology import name_with_id
from pipeline.report.html import Markup, count_cell, html_tag, join_markup
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import ClassCounts, ClipCoverage

ALL_SPLITS = "all splits"

# The column of the table of classes that its bars show: listed, good, then good of each propagated label set.
GOOD_COLUMN = 1

# Rows of the audit's table of splits: if the split column is not one of splits, it may have thousands of values.
MAX_SPLIT_ROWS = 100


def classes_section(
    store: FeatureStore,
    labels: pl.DataFrame,
    sources: dict[str, str],
    coverage: ClipCoverage,
    counts: ClassCounts,
) -> Markup:
    """The section on classes: where the label sets come from, the classes without a clip, and a table of all classes.

    `labels` and `sources` are those that `read_label_table` returns.
    """
    if not counts.listed_NC.any():
        warning = "No clip has a label: the store serves pre-training, not evaluation."
        return join_markup(html_tag("p", warning, class_="warn"), *unknown_labels_note(labels))

    # Each label set with its mean number of labels and its origin.
    label_sets = []
    for name, positives_NC in counts.positives_NC.items():
        labels_per_clip = positives_NC.sum() / max(sum(coverage.good_counts), 1)
        description = f"{labels_per_clip:.3f} labels per good clip; {sources[name]}"
        label_sets.append(join_markup(html_tag("dt", name), html_tag("dd", description)))
    # Warnings come before the table, which is long.
    return join_markup(
        html_tag("dl", *label_sets),
        *unknown_labels_note(labels),
        *(empty_classes_note(store, counts, coverage, split) for split in range(len(coverage.splits))),
        class_count_table(store, counts, coverage),
    )


def unknown_labels_note(labels: pl.DataFrame) -> Iterator[Markup]:
    """Yield a warning about labels that are not in the class list, if there are any."""
    unknown_ids = labels["outside"].explode().drop_nulls()
    if len(unknown_ids):
        examples = ", ".join(name_with_id(class_id) for class_id in unknown_ids.unique().sort().head(5))
        clips = (labels["outside"].list.len() > 0).sum()
        warning = f"Clips with labels outside the class list: {clips:,}; such as {examples}."
        yield html_tag("p", warning, class_="warn")


def empty_classes_note(
    store: FeatureStore, counts: ClassCounts, coverage: ClipCoverage, split: int
) -> Markup:
    """The classes of a split that have no positive clip, by name: their average precision is undefined.

    `split` is a number in `coverage.splits`.
    """
    # One sentence is enough if there is no good clip, or no empty class.
    is_empty_C = counts.positives_NC["raw"][split] == 0
    class_count = len(is_empty_C)
    split_name = html_tag("b", coverage.splits[split])
    if not coverage.good_counts[split]:
        return html_tag("p", split_name, ": no good clip, so no class has a positive.", class_="warn")
    if not is_empty_C.any():
        return html_tag("p", split_name, f": every one of the {class_count} classes has a positive clip.")

    # The number of empty classes, and the number that remain under each propagation rule.
    propagated = {rule: rule_NC[split] for rule, rule_NC in counts.positives_NC.items() if rule != "raw"}
    remaining = "".join(f"; {(rule_C == 0).sum()} under {rule}" for rule, rule_C in propagated.items())
    heading = html_tag(
        "summary",
        split_name,
        f": {is_empty_C.sum()} of {class_count} classes have no positive clip{remaining}. Their AP is undefined.",
    )

    # Their names, each with the clips that propagation gives it.
    items = []
    for index in np.flatnonzero(is_empty_C):
        filled = [f"{rule}: {rule_C[index]:,}" for rule, rule_C in propagated.items() if rule_C[index]]
        note = html_tag("span", f" ({', '.join(filled)})", class_="soft") if filled else ""
        items.append(html_tag("li", store.classes.names[index], note))
    return html_tag("details", heading, html_tag("ul", *items, class_="names"))


def class_count_table(store: FeatureStore, counts: ClassCounts, coverage: ClipCoverage) -> Markup:
    """A table with a row for every class, and the inputs by which the page's script sorts and filters it.

    A row shows the counts of all splits together, and a bar of its good clips. Classes that no clip was listed with are
    hidden until someone asks for them. Its attribute `data-n` has the counts of every split for the script,
    split by split, with semicolons between splits.
    """
    # Counts of classes (axis C) in the columns of the table (axis K), in each split (axis N) and in all.
    columns = {"listed": counts.listed_NC, "good": counts.positives_NC["raw"]}
    for name, positives_NC in counts.positives_NC.items():
        if name != "raw":
            columns[f"good, {name}"] = positives_NC
    split_NCK = np.stack(list(columns.values()), axis=2)
    all_CK = split_NCK.sum(0)

    # The table, the commonest classes first. The last column has no numbers but bars.
    buttons = [html_tag("button", name, type="button") for name in ["class", *columns]]
    headings = [
        html_tag("th", buttons[0], scope="col"),
        *(html_tag("th", button, scope="col", class_="n") for button in buttons[1:]),
        html_tag("td", class_="count-bar"),
    ]
    good_C = all_CK[:, GOOD_COLUMN]
    max_good = max(int(good_C.max()), 1)
    rows = []
    for index in np.argsort(-good_C, kind="stable").tolist():
        hidden_counts = ";".join(
            ",".join(map(str, count_K)) for count_K in [all_CK[index], *split_NCK[:, index]]
        )
        bar = html_tag("i", style=f"width:{100 * good_C[index] / max_good:.2f}%")
        cells = [
            html_tag("th", store.classes.names[index], scope="row"),
            *map(count_cell, all_CK[index]),
            html_tag("td", bar, class_="count-bar"),
        ]
        is_empty = not all_CK[index].any()
        rows.append(html_tag("tr", *cells, data_n=hidden_counts, hidden="" if is_empty else None))
    table = html_tag(
        "table", html_tag("thead", html_tag("tr", *headings)), html_tag("tbody", *rows), data_sorted=""
    )

    # The inputs.
    options = (
        html_tag("option", name, value=number) for number, name in enumerate([ALL_SPLITS, *coverage.splits])
    )
    search = html_tag(
        "input", id="find", type="search", placeholder="find a class", aria_label="find a class"
    )
    split_choice = html_tag("select", *options, id="which", aria_label="split")
    tools = [search, split_choice]
    if empty := int((~all_CK.any(1)).sum()):
        tick = html_tag("input", id="empty", type="checkbox")
        tools.append(html_tag("label", tick, f" and the {empty:,} without a clip"))
    tools.append(html_tag("span", "clips of each class; click a heading to sort", class_="soft"))
    return join_markup(html_tag("div", *tools, class_="tools"), html_tag("div", table, class_="box"))


def audit_section(audit: StoreAudit, store_name: str) -> Markup:
    """The section on an audit: findings, splits, missing labels, surprising pairs, shifts.

    `store_name` is the name of the store in the commands that the findings suggest.
    """
    shift_tables = []
    if audit.sides is not None and audit.sides.shifts:
        shift_tables.append(class_shift_table(audit.sides))
    return join_markup(
        finding_list(collect_findings(audit, store_name)),
        audit_split_table(audit),
        *missing_label_tables(audit),
        *class_pair_tables(audit),
        *shift_tables,
    )


def finding_list(all_findings: Sequence[AuditFinding]) -> Markup:
    """The number of findings of each level, then an item for each finding."""
    if not all_findings:
        return html_tag("p", "Nothing is wrong, and nothing surprising.")
    levels = []
    for level, meaning in FINDING_LEVELS.items():
        # A level without a finding is dimmed.
        count = sum(finding.level == level for finding in all_findings)
        css_class = None if count else "soft"
        levels.append(html_tag("span", _level_badge(level), f" {count:,}: {meaning}", class_=css_class))
    return join_markup(
        html_tag("p", join_markup(*levels), class_="levels"),
        html_tag("ul", *map(_finding_item, all_findings), class_="findings"),
    )


def _level_badge(level: str) -> Markup:
    return html_tag("b", level, class_=f"level {level}")


def _finding_item(finding: AuditFinding) -> Markup:
    parts = [_level_badge(finding.level), " ", finding.what]
    if finding.examples:
        parts.append(html_tag("div", "such as ", "; ".join(finding.examples), class_="soft"))

    # What to do: a command, or a sentence.
    if finding.do.startswith("ajepa-data"):
        parts.append(html_tag("div", "→ ", html_tag("code", finding.do)))
    elif finding.do:
        parts.append(html_tag("div", "→ ", finding.do))
    return html_tag("li", *parts)


def audit_split_table(audit: StoreAudit) -> Markup:
    """How many clips, labels and classes each split has, and how evenly the classes are filled."""
    # A row for every split.
    headings = ("split", "in use", "excluded", "no label", "labels a clip", "classes", "effective", "Gini")
    rows = []
    for split in audit.splits[:MAX_SPLIT_ROWS]:
        held_out = html_tag("span", " held out", class_="soft") if split.held_out else ""
        row = (
            join_markup(split.split, held_out),
            split.in_use,
            split.excluded,
            split.unlabelled,
            f"{split.labels_a_clip:.3f}",
            split.classes,
            f"{split.effective_classes:.1f}",
            f"{split.gini:.3f}",
        )
        rows.append(row)

    # Two of the columns need an explanation.
    note = "Effective: number of equally common classes with this entropy. Gini: 0 if all are equal, 1 if one has all."
    if len(audit.splits) > MAX_SPLIT_ROWS:
        note += f" And {len(audit.splits) - MAX_SPLIT_ROWS:,} more splits."
    return join_markup(
        html_tag("h3", "Labels of the clips in use"),
        _figures_table(headings, rows, text_columns=1),
        html_tag("p", note, class_="soft"),
    )


def missing_label_tables(audit: StoreAudit) -> Iterator[Markup]:
    """Yield a table for each label set whose clips lack labels that their other labels imply."""
    for contradictions in audit.contradictions:
        if contradictions.pairs:
            rows = [(pair.name, pair.implied, pair.clips) for pair in contradictions.pairs]
            table = _figures_table(("class", "without", "clips"), rows, text_columns=2)
            title = f"Label set {contradictions.label_set} lacks"
            yield _titled_table(title, table, contradictions.pairs_in_all)


def class_pair_tables(audit: StoreAudit) -> Iterator[Markup]:
    """Yield a table of unrelated classes that occur together more often than by chance, then of those less often."""
    headings = ("class", "with", "clips", "by chance", "G²")
    for comparison, pairs, pair_count in (
        ("more", audit.pairs.more, audit.pairs.more_in_all),
        ("less", audit.pairs.less, audit.pairs.less_in_all),
    ):
        if pairs:
            table = _figures_table(headings, [_pair_row(pair) for pair in pairs], text_columns=2)
            yield _titled_table(f"Together {comparison} often than by chance", table, pair_count)


def _pair_row(pair: ClassPair) -> tuple[object, ...]:
    return pair.one, pair.other, pair.clips, f"{pair.expected:,.1f}", f"{pair.g2:,.0f}"


def class_shift_table(sides: TrainEvalShift) -> Markup:
    """The classes whose shares differ most between the clips to train on and the clips held out."""
    headings = ("class", "of clips to train on", f"of {' + '.join(sides.held_out)}")
    rows = [(shift.name, f"{shift.trained:.3%}", f"{shift.held_out:.3%}") for shift in sides.shifts]
    table = _figures_table(headings, rows, text_columns=1)
    title = "Frequencies that differ between training and evaluation"
    note = f"{sides.shift:.1%} of the labels would have to change their class for both distributions to be equal."
    return join_markup(_titled_table(title, table, sides.shifts_in_all), html_tag("p", note, class_="soft"))


def _figures_table(headings: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int) -> Markup:
    """A table whose first `text_columns` columns are names, the others numbers."""
    # The style sheet aligns cells of class `n` to the right.
    css_classes = [None] * text_columns + ["n"] * (len(headings) - text_columns)
    heads = (
        html_tag("th", heading, scope="col", class_=css_class)
        for heading, css_class in zip(headings, css_classes, strict=True)
    )
    lines = []
    for row in rows:
        cells = (
            html_tag("td", value, class_=css_class)
            for value, css_class in zip(row[1:], css_classes[1:], strict=True)
        )
        lines.append(html_tag("tr", html_tag("th", row[0], scope="row"), *cells))
    table = html_tag("table", html_tag("thead", html_tag("tr", *heads)), html_tag("tbody", *lines))
    return html_tag("div", table, class_="scroll")


def _titled_table(title: str, table: Markup, total_rows: int) -> Markup:
    """A table under its title, which states the number of all rows; the table shows the first of them."""
    more = html_tag("span", f" · the first of {total_rows:,}", class_="soft")
    return join_markup(html_tag("h3", title, more), table)
