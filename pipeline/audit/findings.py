"""Findings: an audit in sentences, what weighs most first, each with what can be done.

An audit as text: the findings, then the figures.
"""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.audit.audit import Audit, Gaps, Split
from pipeline.audit.class_pairs import Pair
from pipeline.audit.copies import Copies
from pipeline.audit.implied_labels import Contradictions
from pipeline.files import replacing
from pipeline.store.splits import measured_splits

LEVELS = {
    "leak": "what is measured on has been trained on",
    "fault": "the store is not what it says",
    "check": "may mislead: look at it",
    "note": "good to know",
}

SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong or surprising."""

    level: str  # a key of LEVELS
    count: int  # of what the sentence begins with
    what: str
    examples: tuple[str, ...] = ()
    do: str = ""


def findings(seen: Audit, store: str) -> tuple[Finding, ...]:
    """Everything that deserves a sentence, by level; `store` is named in the commands that help."""
    found = [
        *(_of_copies(c, _suggesting(seen, store)) for c in seen.copies),
        *(f for c in seen.contradictions if (f := _of_contradictions(c, seen, store))),
        *_of_gaps(seen),
        *_of_sides(seen),
        *_of_labels(seen),
        *_of_rows(seen, store),
    ]
    return tuple(sorted(found, key=lambda f: list(LEVELS).index(f.level)))


def _suggesting(seen: Audit, store: str) -> str:
    """The command that writes a list of what leaks, and says how to record it beside the lists there are."""
    held = tuple(split.split for split in seen.splits if split.held_out)
    by_name = measured_splits([split.split for split in seen.splits])
    named = "" if held == by_name else "".join(f" --eval {split}" for split in held)
    return f"ajepa-data audit-labels {store}{named} --suggest leaks.txt"


def _of_copies(c: Copies, suggesting: str) -> Finding:
    one, other = c.splits
    differ = f"; labels differ in {c.labels_differ:,} of them" if c.labels_differ else ""
    if one == other:
        if c.kind == "id":
            what, do = f"{_n(c.groups, 'id')} more than once in {one}", "exclude all but one row of each"
        else:
            what = f"{_n(c.clips[0], 'clip')} of {one} with only {_n(c.groups, 'exact sound')} among them{differ}"
            do = "each is drawn as often as it stands there; exclude some where that matters"
        return _copied(c, "check", what, do)
    if c.kind == "audio":
        what = f"{_n(c.clips[0], 'clip')} of {one} with the exact audio of {_n(c.clips[1], 'clip')} of {other}{differ}"
    elif c.kind == "id":
        what = f"{_n(c.groups, 'id')} in {one} and again in {other}"
    else:
        what = f"{_n(c.groups, 'recording')} with clips in {one} and in {other}"
    if c.leak:
        return _copied(c, "leak", what, suggesting)
    return _copied(
        c, "check", what, "they count twice where both splits are used together; exclude one of each"
    )


def _copied(c: Copies, level: str, what: str, do: str) -> Finding:
    told = (one if one == other else f"{one} = {other}" for one, other in c.examples[:SHOWN])
    return Finding(level=level, count=c.groups, what=what, examples=tuple(told), do=do)


def _of_contradictions(c: Contradictions, seen: Audit, store: str) -> Finding | None:
    pairs = tuple(f"{p.name} without {p.implied}: {p.clips:,}" for p in c.pairs[:SHOWN])
    if c.why_not and c.label_set != "raw":
        what = f"label set {c.label_set} cannot be judged: {c.why_not}"
        do = f"make it again, with the ontology it needs: {_propagate(store, c.label_set)}"
        return Finding(level="check", count=1, what=what, do=do)
    if c.stale:
        what = f"label set {c.label_set} is stale: {_n(c.labels_lacking, 'label')} of its rule missing"
        if c.labels_beyond:
            what += f", {_n(c.labels_beyond, 'label')} beyond it"
        return Finding(
            level="fault",
            count=c.labels_lacking + c.labels_beyond,
            what=what,
            examples=pairs,
            do=_propagate(store, c.rule or c.label_set),
        )
    if not c.labels_lacking:
        return None
    others = [other.label_set for other in seen.contradictions if other.label_set != "raw"]
    what = (
        f"{_n(c.clips, 'clip')} without {_n(c.labels_lacking, 'label')} that raw ones imply by rule {c.rule}"
    )
    do = f"label set {', '.join(others)} has them" if others else _propagate(store, str(c.rule))
    return Finding(level="note", count=c.clips, what=what, examples=pairs, do=do)


def _propagate(store: str, rule: str) -> str:
    return f"ajepa-data propagate-labels {store} --rule {rule}"


def _of_gaps(seen: Audit) -> Iterator[Finding]:
    """By raw labels; of other label sets the number that is left."""
    held = any(split.held_out for split in seen.splits)
    for split in seen.splits:
        gaps = [g for g in seen.gaps if g.split == split.split]
        raw, others = gaps[0], gaps[1:]
        if not split.classes:
            continue
        level = "check" if split.held_out or not held else "note"
        if raw.none:
            what = f"{len(raw.none):,} of {_n(seen.classes, 'class')} without a clip in {split.split}"
            yield _gap(level, raw.none, what + _left(others, "none"), _undefined(split))
        if raw.few:
            what = f"{_n(len(raw.few), 'class')} with fewer than {seen.few} clips in {split.split}"
            rarest = sorted(raw.few, key=lambda told: told[1])
            names = tuple(f"{name}: {clips}" for name, clips in rarest)
            yield _gap(level, names, what + _left(others, "few"), _luck(split))


def _gap(level: str, names: tuple[str, ...], what: str, do: str) -> Finding:
    return Finding(level=level, count=len(names), what=what, examples=names[:SHOWN], do=do)


def _left(others: Sequence[Gaps], kind: str) -> str:
    return "".join(f"; {len(getattr(g, kind))} by label set {g.label_set}" for g in others)


def _undefined(split: Split) -> str:
    return "their average precision is undefined: mAP leaves them out" if split.held_out else ""


def _luck(split: Split) -> str:
    return "their average precision is mostly luck" if split.held_out else ""


def _of_sides(seen: Audit) -> Iterator[Finding]:
    if seen.sides is None:
        return
    held = " and ".join(seen.sides.held_out)
    if names := seen.sides.only_trained:
        what = f"{_n(len(names), 'class')} with clips to train on, and none in {held}"
        yield Finding(level="note", count=len(names), what=what, examples=names[:SHOWN])
    if names := seen.sides.only_held_out:
        what = f"{_n(len(names), 'class')} in {held}, without a clip to train on"
        do = "no probe can learn them: they pull mAP down"
        yield Finding(level="check", count=len(names), what=what, examples=names[:SHOWN], do=do)


def _of_labels(seen: Audit) -> Iterator[Finding]:
    if clips := sum(split.outside for split in seen.splits):
        what = (
            f"{_n(clips, 'clip')} with labels outside the class list, {_n(seen.outside_in_all, 'id')} in all"
        )
        told = tuple(f"{mid}: {count:,}" for mid, count in seen.outside[:SHOWN])
        do = "these labels count nowhere; the others of the same clips do"
        yield Finding(level="check", count=clips, what=what, examples=told, do=do)
    used = any(split.in_use for split in seen.splits)
    if used and not any(split.classes for split in seen.splits):
        yield Finding(level="note", count=0, what="no clip with a label: the store serves pre-training only")
        return
    for split in (split for split in seen.splits if split.unlabelled):
        what = f"{_n(split.unlabelled, 'clip')} of {split.split} without a label"
        level, do = "note", "they serve pre-training; a probe takes them for negatives of every class"
        if split.held_out:
            level, do = "check", "they count as negatives of every class; exclude them if they are not"
        yield Finding(level=level, count=split.unlabelled, what=what, do=do)


def _of_rows(seen: Audit, store: str) -> Iterator[Finding]:
    if seen.listed_again:
        what = f"{_n(seen.listed_again, 'row')} set aside by the build: the id stands elsewhere, and counts there"
        yield Finding(level="note", count=seen.listed_again, what=what)
    for name, _, clips in seen.exclude_lists:
        what = f"{_n(clips, 'clip')} excluded by {name}"
        do = f"take that back with: ajepa-data audit-labels {store} --no-exclude"
        yield Finding(level="note", count=clips, what=what, do=do)
    for split in (split for split in seen.splits if not split.in_use):
        yield Finding(level="check", count=0, what=f"split {split.split} without a clip in use")


def _n(count: int, word: str) -> str:
    plural = "es" if word.endswith("s") else "s"
    return f"{count:,} {word}{'' if count == 1 else plural}"


WIDTH = 80

NAME = 23


def table(seen: Audit, store: str) -> str:
    """What whoever asked for an audit reads: findings in the order of their weight, then tables."""
    in_use, listed = sum(split.in_use for split in seen.splits), sum(split.listed for split in seen.splits)
    head = f"{store}: {in_use:,} of {listed:,} listed clips in use; {seen.classes} class{'es' * (seen.classes != 1)}"
    blocks = [
        [head],
        list(_finding_lines(findings(seen, store))),
        list(_split_lines(seen)),
        list(_implied_lines(seen)),
        list(_pair_lines("stand together more often than chance", seen.pairs.more, seen.pairs.more_in_all)),
        list(_pair_lines("stand together less often than chance", seen.pairs.less, seen.pairs.less_in_all)),
        list(_side_lines(seen)),
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)


def write_json(seen: Audit, store: str, path: Path) -> None:
    """Everything that an audit has, and the findings as told; whole or not at all."""
    told = {"findings": [asdict(f) for f in findings(seen, store)], **asdict(seen)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _finding_lines(found: Sequence[Finding]) -> Iterator[str]:
    counted = {level: sum(f.level == level for f in found) for level in LEVELS}
    yield ", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counted.items())
    for finding in found:
        yield from _wrapped(f"{finding.level:<6}", finding.what)
        if finding.examples:
            yield from _wrapped("", f"such as {'; '.join(finding.examples)}")
        if finding.do.startswith("ajepa-data"):  # to be copied in one go
            yield f"{'':<9}-> {finding.do}"
        elif finding.do:
            yield from _wrapped("", f"-> {finding.do}")


def _wrapped(head: str, text: str) -> list[str]:
    """Words are kept whole: ids must be copied."""
    indent = f"  {head:<6} "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _split_lines(seen: Audit) -> Iterator[str]:
    heads = ("listed", "excluded", "in use", "no label", "labels", "classes", "effective")
    widths = (10, 9, 10, 10, 7, 8, 10)
    width = max(16, *(len(split.split) + 1 for split in seen.splits))
    yield "split".ljust(width) + "".join(map(str.rjust, heads, widths))
    for split in seen.splits:
        counts = (split.listed, split.excluded, split.in_use, split.unlabelled)
        cells = [*(f"{count:,}" for count in counts), f"{split.labels_a_clip:.3f}", f"{split.classes:,}"]
        cells += [f"{split.effective_classes:.1f}"]
        yield split.split.ljust(width) + "".join(map(str.rjust, cells, widths))
    yield "labels: of a clip, on average; effective: so many equal classes are as varied"


def _implied_lines(seen: Audit) -> Iterator[str]:
    for told in (c for c in seen.contradictions if c.pairs):
        yield f"{f'label set {told.label_set} lacks':<68}{'clips':>11}"
        for pair in told.pairs:
            yield f"  {_cut(pair.name, 30)} without {_cut(pair.implied, 27)}{pair.clips:>11,}"
        if (more := told.pairs_in_all - len(told.pairs)) > 0:
            yield f"  and {more:,} more pairs of classes"


def _pair_lines(what: str, pairs: Sequence[Pair], in_all: int) -> Iterator[str]:
    if not pairs:
        return
    yield f"{what:<{2 * NAME + 4}}{'clips':>9}{'by chance':>11}{'G2':>10}"
    for pair in pairs:
        names = f"  {_cut(pair.one)}  {_cut(pair.other)}"
        yield f"{names}{pair.clips:>9,}{pair.expected:>11,.1f}{pair.g2:>10,.0f}"
    if (more := in_all - len(pairs)) > 0:
        yield f"  and {more:,} more pairs of unrelated classes"


def _side_lines(seen: Audit) -> Iterator[str]:
    if (sides := seen.sides) is None or not sides.shifts:
        return
    head = f"{'share of the labelled clips with a class':<{2 * NAME + 4}}"
    yield f"{head}{'to train on':>13}{_cut(' + '.join(sides.held_out), 14).strip():>16}"
    for shift in sides.shifts:
        yield f"  {shift.name[: 2 * NAME]:<{2 * NAME + 2}}{shift.trained:>13.3%}{shift.held_out:>16.3%}"
    if (more := sides.shifts_in_all - len(sides.shifts)) > 0:
        yield f"  and {more:,} more classes that differ by more than chance"
    yield f"  {sides.shift:.1%} of the labels would have to change their class for both to be alike"


def _cut(name: str, width: int = NAME) -> str:
    return (name if len(name) <= width else name[: width - 1] + "…").ljust(width)
