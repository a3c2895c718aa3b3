"""The page's section on classes: how many clips stand in each, before and after label propagation."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from pipeline.markup import Markup, joined, tag
from pipeline.report import ClassCounts, Coverage
from pipeline.store import FeatureStore
from pipeline.vocabularies import named

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
