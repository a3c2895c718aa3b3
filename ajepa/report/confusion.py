"""Confusions of a fine-tuned run: which class has the highest score, for clips of each label."""

from collections.abc import Sequence

import numpy as np

from ajepa.evaluate.classifier_scores import HeldOutScores
from pipeline.report.html import Markup, html_tag, join_markup

MAX_CLASSES = 16  # rows and columns of the table; the commonest classes among the clips

MAX_PAIRS = 8  # of confused classes, told in words

DARK_SHARE = 0.55  # from this share on, a cell is so dark that its text is white


def confusion_section(scores: HeldOutScores) -> Markup:
    """Return a table of labels against the class of the highest score, and the commonest confusions as a list."""
    task_data = scores.task_data
    labels_NC = task_data.labels_NC(task_data.eval_N) > 0
    top_N = scores.logits_NC.argmax(1)
    names = task_data.classes.names

    # How many clips have their highest score on one of their labels.
    clips = len(top_N)
    right = int(labels_NC[np.arange(clips), top_N].sum())
    note = f"{right:,} of {clips:,} clips have their highest score on a label of theirs ({right / max(clips, 1):.1%})."
    if not task_data.single:
        note += " A clip of several labels counts in the row of each of them."

    count_CC = confusion_counts(labels_NC, top_N)
    return join_markup(
        html_tag("p", note, class_="soft"),
        html_tag("div", confusion_table(count_CC, names), class_="scroll"),
        confused_pairs(labels_NC, top_N, names),
    )


def confusion_counts(labels_NC: np.ndarray, top_N: np.ndarray) -> np.ndarray:
    """Return the number of clips with a label (first axis) whose highest score is a class (second axis)."""
    classes = labels_NC.shape[1]
    count_CC = np.zeros((classes, classes), np.int64)
    clip_L, label_L = np.nonzero(labels_NC)
    np.add.at(count_CC, (label_L, top_N[clip_L]), 1)
    return count_CC


def confusion_table(count_CC: np.ndarray, names: Sequence[str]) -> Markup:
    """The counts of the commonest classes; the colour is the share of the row, all other classes are one column."""
    total_C = count_CC.sum(1)
    shown_K = np.argsort(-total_C, kind="stable")[:MAX_CLASSES]
    shown_K = shown_K[total_C[shown_K] > 0]
    others_K = total_C[shown_K] - count_CC[np.ix_(shown_K, shown_K)].sum(1)
    has_others = bool(others_K.any())

    heads = [html_tag("th", html_tag("span", names[place]), scope="col") for place in shown_K]
    if has_others:
        heads.append(html_tag("th", html_tag("span", "others"), scope="col"))
    rows = []
    for place, others in zip(shown_K, others_K.tolist(), strict=True):
        counts = [*count_CC[place, shown_K].tolist(), *([others] if has_others else [])]
        cells = (confusion_cell(count, int(total_C[place])) for count in counts)
        rows.append(html_tag("tr", html_tag("th", names[place], scope="row"), *cells))
    head = html_tag("thead", html_tag("tr", html_tag("th", "label, and class of the highest score"), *heads))
    return html_tag("table", head, html_tag("tbody", *rows), class_="confusion")


def confusion_cell(count: int, total: int) -> Markup:
    """A count on the colour of its share; zeros stay empty."""
    if not count:
        return html_tag("td")
    share = count / total
    style = f"background:color-mix(in srgb, var(--accent) {100 * share:.0f}%, var(--card))"
    return html_tag(
        "td", count, style=style, class_="high" if share >= DARK_SHARE else None, title=f"{share:.0%}"
    )


def confused_pairs(labels_NC: np.ndarray, top_N: np.ndarray, names: Sequence[str]) -> Markup:
    """The commonest confusions in words, among all classes; a clip is confused if no label of it has its top score."""
    is_wrong_N = ~labels_NC[np.arange(len(top_N)), top_N]
    wrong_CC = confusion_counts(labels_NC[is_wrong_N], top_N[is_wrong_N])
    places = np.argsort(-wrong_CC, axis=None, kind="stable")[:MAX_PAIRS]
    pairs = zip(*np.unravel_index(places, wrong_CC.shape), strict=True)
    items = [
        html_tag("li", f"{names[label]} taken for {names[top]}: ", html_tag("b", int(wrong_CC[label, top])))
        for label, top in pairs
        if wrong_CC[label, top]
    ]
    if not items:
        return html_tag("p", "No class is taken for another.", class_="soft")
    return join_markup(html_tag("h3", "Commonest confusions"), html_tag("ul", *items, class_="examples"))
