"""The page's section on what an audit found: findings by weight, then the figures behind them."""

from collections.abc import Iterator, Sequence

from pipeline.audit import Audit, Sides
from pipeline.audit_findings import LEVELS, Finding, findings
from pipeline.audit_pairs import Pair
from pipeline.markup import Markup, joined, tag

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
