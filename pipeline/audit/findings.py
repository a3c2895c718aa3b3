"""Findings: an audit in sentences, what weighs most first, each with what can be done.

An audit as text: the findings, then the figures.
"""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.audit.audit import RareClasses, SplitAudit, StoreAudit
from pipeline.audit.class_pairs import ClassPair
from pipeline.audit.copies import ClipCopies
from pipeline.audit.implied_labels import LabelContradictions
from pipeline.files import replacing_file
from pipeline.store.splits import evaluation_split_names

FINDING_LEVELS = {
    "leak": "what is measured on has been trained on",
    "fault": "the store is not what it says",
    "check": "may mislead: look at it",
    "note": "good to know",
}

FINDING_EXAMPLES_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditFinding:
    """One thing that is wrong or surprising."""

    level: str  # a key of LEVELS
    count: int  # of what the sentence begins with
    what: str
    examples: tuple[str, ...] = ()
    do: str = ""


def collect_findings(audit: StoreAudit, store: str) -> tuple[AuditFinding, ...]:
    """Everything that deserves a sentence, by level; `store` is named in the commands that help."""
    found = [
        *(_copies_finding(c, _suggest_command(audit, store)) for c in audit.copies),
        *(f for c in audit.contradictions if (f := _contradiction_finding(c, audit, store))),
        *_rare_class_findings(audit),
        *_one_sided_findings(audit),
        *_label_findings(audit),
        *_row_findings(audit, store),
    ]
    return tuple(sorted(found, key=lambda f: list(FINDING_LEVELS).index(f.level)))


def _suggest_command(audit: StoreAudit, store: str) -> str:
    """The command that writes a list of what leaks, and says how to record it beside the lists there are."""
    held = tuple(split.split for split in audit.splits if split.held_out)
    by_name = evaluation_split_names([split.split for split in audit.splits])
    named = "" if held == by_name else "".join(f" --eval {split}" for split in held)
    return f"ajepa-data audit-labels {store}{named} --suggest leaks.txt"


def _copies_finding(copies: ClipCopies, suggest_command: str) -> AuditFinding:
    one, other = copies.splits
    differ = f"; labels differ in {copies.labels_differ:,} of them" if copies.labels_differ else ""
    if one == other:
        if copies.kind == "id":
            what, do = (
                f"{_count_phrase(copies.groups, 'id')} more than once in {one}",
                "exclude all but one row of each",
            )
        else:
            what = f"{_count_phrase(copies.clips[0], 'clip')} of {one} with only {_count_phrase(copies.groups, 'exact sound')} among them{differ}"
            do = "each is drawn as often as it stands there; exclude some where that matters"
        return _build_copies_finding(copies, "check", what, do)
    if copies.kind == "audio":
        what = f"{_count_phrase(copies.clips[0], 'clip')} of {one} with the exact audio of {_count_phrase(copies.clips[1], 'clip')} of {other}{differ}"
    elif copies.kind == "id":
        what = f"{_count_phrase(copies.groups, 'id')} in {one} and again in {other}"
    else:
        what = f"{_count_phrase(copies.groups, 'recording')} with clips in {one} and in {other}"
    if copies.leak:
        return _build_copies_finding(copies, "leak", what, suggest_command)
    return _build_copies_finding(
        copies, "check", what, "they count twice where both splits are used together; exclude one of each"
    )


def _build_copies_finding(copies: ClipCopies, level: str, what: str, do: str) -> AuditFinding:
    told = (
        one if one == other else f"{one} = {other}" for one, other in copies.examples[:FINDING_EXAMPLES_SHOWN]
    )
    return AuditFinding(level=level, count=copies.groups, what=what, examples=tuple(told), do=do)


def _contradiction_finding(
    contradictions: LabelContradictions, audit: StoreAudit, store: str
) -> AuditFinding | None:
    pairs = tuple(
        f"{p.name} without {p.implied}: {p.clips:,}" for p in contradictions.pairs[:FINDING_EXAMPLES_SHOWN]
    )
    if contradictions.why_not and contradictions.label_set != "raw":
        what = f"label set {contradictions.label_set} cannot be judged: {contradictions.why_not}"
        do = f"make it again, with the ontology it needs: {_propagate_command(store, contradictions.label_set)}"
        return AuditFinding(level="check", count=1, what=what, do=do)
    if contradictions.is_stale:
        what = f"label set {contradictions.label_set} is stale: {_count_phrase(contradictions.labels_lacking, 'label')} of its rule missing"
        if contradictions.labels_beyond:
            what += f", {_count_phrase(contradictions.labels_beyond, 'label')} beyond it"
        return AuditFinding(
            level="fault",
            count=contradictions.labels_lacking + contradictions.labels_beyond,
            what=what,
            examples=pairs,
            do=_propagate_command(store, contradictions.rule or contradictions.label_set),
        )
    if not contradictions.labels_lacking:
        return None
    others = [other.label_set for other in audit.contradictions if other.label_set != "raw"]
    what = f"{_count_phrase(contradictions.clips, 'clip')} without {_count_phrase(contradictions.labels_lacking, 'label')} that raw ones imply by rule {contradictions.rule}"
    do = (
        f"label set {', '.join(others)} has them"
        if others
        else _propagate_command(store, str(contradictions.rule))
    )
    return AuditFinding(level="note", count=contradictions.clips, what=what, examples=pairs, do=do)


def _propagate_command(store: str, rule: str) -> str:
    return f"ajepa-data propagate-labels {store} --rule {rule}"


def _rare_class_findings(audit: StoreAudit) -> Iterator[AuditFinding]:
    """By raw labels; of other label sets the number that is left."""
    held = any(split.held_out for split in audit.splits)
    for split in audit.splits:
        gaps = [g for g in audit.gaps if g.split == split.split]
        raw, others = gaps[0], gaps[1:]
        if not split.classes:
            continue
        level = "check" if split.held_out or not held else "note"
        if raw.none:
            what = f"{len(raw.none):,} of {_count_phrase(audit.classes, 'class')} without a clip in {split.split}"
            yield _build_class_finding(
                level, raw.none, what + _counts_by_label_set(others, "none"), _undefined_ap_advice(split)
            )
        if raw.few:
            what = (
                f"{_count_phrase(len(raw.few), 'class')} with fewer than {audit.few} clips in {split.split}"
            )
            rarest = sorted(raw.few, key=lambda told: told[1])
            names = tuple(f"{name}: {clips}" for name, clips in rarest)
            yield _build_class_finding(
                level, names, what + _counts_by_label_set(others, "few"), _unreliable_ap_advice(split)
            )


def _build_class_finding(level: str, names: tuple[str, ...], what: str, do: str) -> AuditFinding:
    return AuditFinding(
        level=level, count=len(names), what=what, examples=names[:FINDING_EXAMPLES_SHOWN], do=do
    )


def _counts_by_label_set(others: Sequence[RareClasses], kind: str) -> str:
    return "".join(f"; {len(getattr(g, kind))} by label set {g.label_set}" for g in others)


def _undefined_ap_advice(split: SplitAudit) -> str:
    return "their average precision is undefined: mAP leaves them out" if split.held_out else ""


def _unreliable_ap_advice(split: SplitAudit) -> str:
    return "their average precision is mostly luck" if split.held_out else ""


def _one_sided_findings(audit: StoreAudit) -> Iterator[AuditFinding]:
    if audit.sides is None:
        return
    held = " and ".join(audit.sides.held_out)
    if names := audit.sides.only_trained:
        what = f"{_count_phrase(len(names), 'class')} with clips to train on, and none in {held}"
        yield AuditFinding(level="note", count=len(names), what=what, examples=names[:FINDING_EXAMPLES_SHOWN])
    if names := audit.sides.only_held_out:
        what = f"{_count_phrase(len(names), 'class')} in {held}, without a clip to train on"
        do = "no probe can learn them: they pull mAP down"
        yield AuditFinding(
            level="check", count=len(names), what=what, examples=names[:FINDING_EXAMPLES_SHOWN], do=do
        )


def _label_findings(audit: StoreAudit) -> Iterator[AuditFinding]:
    if clips := sum(split.outside for split in audit.splits):
        what = f"{_count_phrase(clips, 'clip')} with labels outside the class list, {_count_phrase(audit.outside_in_all, 'id')} in all"
        told = tuple(f"{mid}: {count:,}" for mid, count in audit.outside[:FINDING_EXAMPLES_SHOWN])
        do = "these labels count nowhere; the others of the same clips do"
        yield AuditFinding(level="check", count=clips, what=what, examples=told, do=do)
    used = any(split.in_use for split in audit.splits)
    if used and not any(split.classes for split in audit.splits):
        yield AuditFinding(
            level="note", count=0, what="no clip with a label: the store serves pre-training only"
        )
        return
    for split in (split for split in audit.splits if split.unlabelled):
        what = f"{_count_phrase(split.unlabelled, 'clip')} of {split.split} without a label"
        level, do = "note", "they serve pre-training; a probe takes them for negatives of every class"
        if split.held_out:
            level, do = "check", "they count as negatives of every class; exclude them if they are not"
        yield AuditFinding(level=level, count=split.unlabelled, what=what, do=do)


def _row_findings(audit: StoreAudit, store: str) -> Iterator[AuditFinding]:
    if audit.listed_again:
        what = f"{_count_phrase(audit.listed_again, 'row')} set aside by the build: the id stands elsewhere, and counts there"
        yield AuditFinding(level="note", count=audit.listed_again, what=what)
    for name, _, clips in audit.exclude_lists:
        what = f"{_count_phrase(clips, 'clip')} excluded by {name}"
        do = f"take that back with: ajepa-data audit-labels {store} --no-exclude"
        yield AuditFinding(level="note", count=clips, what=what, do=do)
    for split in (split for split in audit.splits if not split.in_use):
        yield AuditFinding(level="check", count=0, what=f"split {split.split} without a clip in use")


def _count_phrase(count: int, word: str) -> str:
    plural = "es" if word.endswith("s") else "s"
    return f"{count:,} {word}{'' if count == 1 else plural}"


AUDIT_TEXT_WIDTH = 80

CLASS_NAME_WIDTH = 23


def format_audit(audit: StoreAudit, store: str) -> str:
    """What whoever asked for an audit reads: findings in the order of their weight, then tables."""
    in_use, listed = sum(split.in_use for split in audit.splits), sum(split.listed for split in audit.splits)
    head = f"{store}: {in_use:,} of {listed:,} listed clips in use; {audit.classes} class{'es' * (audit.classes != 1)}"
    blocks = [
        [head],
        list(_finding_lines(collect_findings(audit, store))),
        list(_split_table_lines(audit)),
        list(_contradiction_lines(audit)),
        list(
            _class_pair_lines(
                "stand together more often than chance", audit.pairs.more, audit.pairs.more_in_all
            )
        ),
        list(
            _class_pair_lines(
                "stand together less often than chance", audit.pairs.less, audit.pairs.less_in_all
            )
        ),
        list(_class_shift_lines(audit)),
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)


def write_audit_json(audit: StoreAudit, store: str, path: Path) -> None:
    """Everything that an audit has, and the findings as told; whole or not at all."""
    told = {"findings": [asdict(f) for f in collect_findings(audit, store)], **asdict(audit)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _finding_lines(findings: Sequence[AuditFinding]) -> Iterator[str]:
    counted = {level: sum(f.level == level for f in findings) for level in FINDING_LEVELS}
    yield ", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counted.items())
    for finding in findings:
        yield from _wrap_with_head(f"{finding.level:<6}", finding.what)
        if finding.examples:
            yield from _wrap_with_head("", f"such as {'; '.join(finding.examples)}")
        if finding.do.startswith("ajepa-data"):  # to be copied in one go
            yield f"{'':<9}-> {finding.do}"
        elif finding.do:
            yield from _wrap_with_head("", f"-> {finding.do}")


def _wrap_with_head(head: str, text: str) -> list[str]:
    """Words are kept whole: ids must be copied."""
    indent = f"  {head:<6} "
    return textwrap.wrap(
        text,
        AUDIT_TEXT_WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _split_table_lines(audit: StoreAudit) -> Iterator[str]:
    heads = ("listed", "excluded", "in use", "no label", "labels", "classes", "effective")
    widths = (10, 9, 10, 10, 7, 8, 10)
    width = max(16, *(len(split.split) + 1 for split in audit.splits))
    yield "split".ljust(width) + "".join(map(str.rjust, heads, widths))
    for split in audit.splits:
        counts = (split.listed, split.excluded, split.in_use, split.unlabelled)
        cells = [*(f"{count:,}" for count in counts), f"{split.labels_a_clip:.3f}", f"{split.classes:,}"]
        cells += [f"{split.effective_classes:.1f}"]
        yield split.split.ljust(width) + "".join(map(str.rjust, cells, widths))
    yield "labels: of a clip, on average; effective: so many equal classes are as varied"


def _contradiction_lines(audit: StoreAudit) -> Iterator[str]:
    for told in (c for c in audit.contradictions if c.pairs):
        yield f"{f'label set {told.label_set} lacks':<68}{'clips':>11}"
        for pair in told.pairs:
            yield f"  {_fit_class_name(pair.name, 30)} without {_fit_class_name(pair.implied, 27)}{pair.clips:>11,}"
        if (more := told.pairs_in_all - len(told.pairs)) > 0:
            yield f"  and {more:,} more pairs of classes"


def _class_pair_lines(what: str, pairs: Sequence[ClassPair], in_all: int) -> Iterator[str]:
    if not pairs:
        return
    yield f"{what:<{2 * CLASS_NAME_WIDTH + 4}}{'clips':>9}{'by chance':>11}{'G2':>10}"
    for pair in pairs:
        names = f"  {_fit_class_name(pair.one)}  {_fit_class_name(pair.other)}"
        yield f"{names}{pair.clips:>9,}{pair.expected:>11,.1f}{pair.g2:>10,.0f}"
    if (more := in_all - len(pairs)) > 0:
        yield f"  and {more:,} more pairs of unrelated classes"


def _class_shift_lines(audit: StoreAudit) -> Iterator[str]:
    if (sides := audit.sides) is None or not sides.shifts:
        return
    head = f"{'share of the labelled clips with a class':<{2 * CLASS_NAME_WIDTH + 4}}"
    yield f"{head}{'to train on':>13}{_fit_class_name(' + '.join(sides.held_out), 14).strip():>16}"
    for shift in sides.shifts:
        yield f"  {shift.name[: 2 * CLASS_NAME_WIDTH]:<{2 * CLASS_NAME_WIDTH + 2}}{shift.trained:>13.3%}{shift.held_out:>16.3%}"
    if (more := sides.shifts_in_all - len(sides.shifts)) > 0:
        yield f"  and {more:,} more classes that differ by more than chance"
    yield f"  {sides.shift:.1%} of the labels would have to change their class for both to be alike"


def _fit_class_name(name: str, width: int = CLASS_NAME_WIDTH) -> str:
    return (name if len(name) <= width else name[: width - 1] + "…").ljust(width)
