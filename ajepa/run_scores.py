"""The scores of a run as its page shows them: every probe, and every class under each label set side by side."""

from pathlib import Path

from ajepa.bootstrap import Estimate
from ajepa.evaluation import METHODS, TITLES, Evaluation, Score
from pipeline.markup import Markup, joined, tag


def scores_section(file: Path) -> Markup:
    """What `ajepa-train evaluate` found, or how to have it."""
    if not file.exists():
        command = tag("code", f"ajepa-train evaluate --store STORE --run {file.parent}")
        return tag("p", "Not evaluated yet: ", command, class_="warn")
    evaluation = Evaluation.read(file)
    note = f"{'; '.join(evaluation.notes())}."
    tables = (table(evaluation, name) for name in evaluation.label_sets)
    return joined(tag("p", note, class_="soft"), *tables, classes(evaluation))


def table(evaluation: Evaluation, label_set: str) -> Markup:
    """Every probe on every kind of features, all metrics."""
    scores = [score for score in evaluation.scores if score.label_set == label_set]
    names = list(scores[0].metrics)
    heads = [tag("th", TITLES[name], scope="col", class_="n") for name in names]
    rows = [
        tag(
            "tr",
            tag("th", f"{score.features}, {METHODS[score.probe]}", scope="row"),
            *(tag("td", told_of(score.metrics[name]), class_="n") for name in names),
        )
        for score in scores
    ]
    one = scores[0]
    told = f"{one.classes} classes" + (f", {one.skipped} without an eval clip" if one.skipped else "")
    title = tag(
        "h3", f"{label_set} labels", tag("span", f" · {told}, chance {one.chance:.3f}", class_="soft")
    )
    inner = tag("table", tag("thead", tag("tr", tag("th", ""), *heads)), tag("tbody", *rows))
    return joined(title, tag("div", inner, class_="scroll"))


def told_of(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def classes(evaluation: Evaluation) -> Markup:
    """Average precision of the encoder's first probe class by class, a column for each label set."""
    first = evaluation.scores[0]
    sets = {name: evaluation.of(first.features, first.probe, name) for name in evaluation.label_sets}
    heads = (
        tag("th", tag("button", name, type="button"), scope="col", class_="n" if place else None)
        for place, name in enumerate(["class", *sets])
    )
    rows = (
        tag("tr", tag("th", name, scope="row"), *(cell(score, index) for score in sets.values()))
        for index, (_, name) in enumerate(evaluation.classes)
        if any(score.per_class_ap[index] is not None for score in sets.values())
    )
    title = tag("h3", f"Average precision of every class ({first.features}, {METHODS[first.probe]})")
    inner = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), data_sorted="")
    return joined(title, tag("div", inner, class_="box"))


def cell(score: Score, index: int) -> Markup:
    value = score.per_class_ap[index]
    return tag("td", "" if value is None else f"{value:.3f}", class_="n")
