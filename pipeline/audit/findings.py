"""The findings of an audit, each a sentence with advice, worst first; and the whole audit as text and as JSON."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.audit.audit import SplitAudit, StoreAudit
from pipeline.audit.class_pairs import ClassPair
from pipeline.audit.copies import ClipCopies
from pipeline.audit.implied_labels import LabelContradictions
from pipeline.files import replacing_file
from pipeline.messages import count_phrase
from pipeline.store.splits import evaluation_split_names

# The levels with their meanings, the most severe first.
FINDING_LEVELS = {
    "leak": "evaluation clips are also trained on",
    "fault": "the store contradicts its own records",
    "check": "may mislead: check it",
    "note": "good to know",
}

FINDING_EXAMPLES_SHOWN = 3

AUDIT_TEXT_WIDTH = 80

CLASS_NAME_WIDTH = 23


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditFinding:
    """One thing that is wrong or surprising."""

    level: str  # a key of FINDING_LEVELS
    count: int  # the number that the sentence begins with
    what: str  # the sentence
    examples: tuple[str, ...] = ()
    do: str = ""  # advice, or a command to copy


def collect_findings(audit: StoreAudit, store: str) -> tuple[AuditFinding, ...]:
    """Return all findings, sorted by level; `store` is the path in suggested commands."""
    suggest_command = _suggest_command(audit, store)
    findings = [
        *(_copies_finding(copies, suggest_command) for copies in audit.copies),
        *_contradiction_findings(audit, store),
        *_rare_class_findings(audit),
        *_one_sided_findings(audit),
        *_label_findings(audit),
        *_row_findings(audit, store),
    ]

    # The sort is stable: within a level the order above stays.
    levels = list(FINDING_LEVELS)
    return tuple(sorted(findings, key=lambda finding: levels.index(finding.level)))


def format_audit(audit: StoreAudit, store: str) -> str:
    """Return an audit as text for the terminal: the findings, the most severe first, then tables."""
    in_use = sum(split.in_use for split in audit.splits)
    listed = sum(split.listed for split in audit.splits)
    has_labels = any(split.classes for split in audit.splits)
    classes = "no labels" if in_use and not has_labels else count_phrase(audit.classes, "class")
    head = f"{store}: {in_use:,} of {listed:,} listed clips in use; {classes}"
    pairs = audit.pairs
    blocks = [
        [head],
        list(_finding_lines(collect_findings(audit, store))),
        list(_split_table_lines(audit)),
        list(_contradiction_lines(audit)),
        list(_class_pair_lines("occur together more often than by chance", pairs.more, pairs.more_in_all)),
        list(_class_pair_lines("occur together less often than by chance", pairs.less, pairs.less_in_all)),
        list(_class_shift_lines(audit)),
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)


def write_audit_json(audit: StoreAudit, store: str, path: Path) -> None:
    """Write every figure of an audit, and its findings, as JSON; whole or not at all."""
    findings = [asdict(finding) for finding in collect_findings(audit, store)]
    text = json.dumps({"findings": findings, **asdict(audit)}, indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


# Findings about copies.


def _copies_finding(copies: ClipCopies, suggest_command: str) -> AuditFinding:
    # Within a split, copies only count more than other clips; across splits, they may leak.
    one, other = copies.splits
    if one == other:
        level = "check"
        advice = "each copy is drawn, so the sound counts more often; exclude some if that matters"
        if copies.kind == "id":
            advice = "exclude all but one row of each"
    elif copies.leak:
        level = "leak"
        advice = suggest_command
    else:
        level = "check"
        advice = "they count twice if both splits are used together; exclude one of each"
    return AuditFinding(
        level=level,
        count=copies.groups,
        what=_copies_sentence(copies),
        examples=tuple(
            first if first == second else f"{first} = {second}"
            for first, second in copies.examples[:FINDING_EXAMPLES_SHOWN]
        ),
        do=advice,
    )


def _copies_sentence(copies: ClipCopies) -> str:
    one, other = copies.splits
    clips, other_clips = (count_phrase(count, "clip") for count in copies.clips)

    # Ids and recordings: the labels of two rows of one id are not compared.
    if copies.kind == "id":
        ids = count_phrase(copies.groups, "id")
        return f"{ids} more than once in {one}" if one == other else f"{ids} in {one} and again in {other}"
    if copies.kind == "recording" and one != other:
        return f"{count_phrase(copies.groups, 'recording')} with clips in {one} and in {other}"

    # Exact audio: copies should have the same labels.
    if one == other:
        sounds = count_phrase(copies.groups, "exact sound")
        sentence = f"{clips} of {one} with only {sounds} among them"
    else:
        sentence = f"{clips} of {one} with the exact audio of {other_clips} of {other}"
    if copies.labels_differ:
        sentence += f"; labels differ in {copies.labels_differ:,} of them"
    return sentence


def _suggest_command(audit: StoreAudit, store: str) -> str:
    """Return the command that lists the leaking clips; its output shows how to record that list."""
    # --eval is needed only if the audit did not use the default splits.
    held_out = tuple(split.split for split in audit.splits if split.held_out)
    default = evaluation_split_names([split.split for split in audit.splits])
    options = "" if held_out == default else "".join(f" --eval {split}" for split in held_out)
    return f"ajepa-data audit-labels {store}{options} --suggest leaks.txt"


# Findings about labels that imply others.


def _contradiction_findings(audit: StoreAudit, store: str) -> Iterator[AuditFinding]:
    propagated_sets = [entry.label_set for entry in audit.contradictions if entry.label_set != "raw"]
    for contradictions in audit.contradictions:
        if contradictions.why_not and contradictions.label_set != "raw":
            yield _unjudged_finding(contradictions, store)
        elif contradictions.is_stale:
            yield _stale_finding(contradictions, store)
        elif contradictions.labels_lacking:
            yield _raw_lack_finding(contradictions, propagated_sets, store)


def _unjudged_finding(contradictions: LabelContradictions, store: str) -> AuditFinding:
    label_set = contradictions.label_set
    return AuditFinding(
        level="check",
        count=1,
        what=f"label set {label_set} cannot be checked: {contradictions.why_not}",
        do=f"make it again, with the ontology it needs: {_propagate_command(store, label_set)}",
    )


def _stale_finding(contradictions: LabelContradictions, store: str) -> AuditFinding:
    label_set = contradictions.label_set
    missing = count_phrase(contradictions.labels_lacking, "label")
    sentence = f"label set {label_set} is stale: {missing} of its rule missing"
    if contradictions.labels_beyond:
        sentence += f", {count_phrase(contradictions.labels_beyond, 'label')} beyond it"
    return AuditFinding(
        level="fault",
        count=contradictions.labels_lacking + contradictions.labels_beyond,
        what=sentence,
        examples=_unmet_examples(contradictions),
        do=_propagate_command(store, contradictions.rule or label_set),
    )


def _raw_lack_finding(
    contradictions: LabelContradictions, propagated_sets: Sequence[str], store: str
) -> AuditFinding:
    clips = count_phrase(contradictions.clips, "clip")
    labels = count_phrase(contradictions.labels_lacking, "label")
    if propagated_sets:
        advice = f"label set {', '.join(propagated_sets)} has them"
    else:
        advice = _propagate_command(store, str(contradictions.rule))
    return AuditFinding(
        level="note",
        count=contradictions.clips,
        what=f"{clips} without {labels} that raw ones imply by rule {contradictions.rule}",
        examples=_unmet_examples(contradictions),
        do=advice,
    )


def _unmet_examples(contradictions: LabelContradictions) -> tuple[str, ...]:
    return tuple(
        f"{pair.name} without {pair.implied}: {pair.clips:,}"
        for pair in contradictions.pairs[:FINDING_EXAMPLES_SHOWN]
    )


def _propagate_command(store: str, rule: str) -> str:
    return f"ajepa-data propagate-labels {store} --rule {rule}"


# Findings about classes with few clips or none.


def _rare_class_findings(audit: StoreAudit) -> Iterator[AuditFinding]:
    """Yield findings about raw labels; the sentence adds the number of such classes in each other label set."""
    any_held_out = any(split.held_out for split in audit.splits)
    for split in audit.splits:
        # A split without any label has one finding of its own, not one per class.
        if not split.classes:
            continue
        raw, *others = [gaps for gaps in audit.gaps if gaps.split == split.split]

        # If no split is held out, any split may be used for evaluation.
        level = "check" if split.held_out or not any_held_out else "note"
        if raw.none:
            classes = f"{len(raw.none):,} of {count_phrase(audit.classes, 'class')}"
            left = "".join(f"; {len(gaps.none)} by label set {gaps.label_set}" for gaps in others)
            yield AuditFinding(
                level=level,
                count=len(raw.none),
                what=f"{classes} without a clip in {split.split}{left}",
                examples=raw.none[:FINDING_EXAMPLES_SHOWN],
                do=_if_held_out(split, "their average precision is undefined: mAP leaves them out"),
            )
        if raw.few:
            classes = f"{count_phrase(len(raw.few), 'class')} with fewer than {audit.few} clips"
            left = "".join(f"; {len(gaps.few)} by label set {gaps.label_set}" for gaps in others)
            rarest = sorted(raw.few, key=lambda name_and_clips: name_and_clips[1])
            yield AuditFinding(
                level=level,
                count=len(raw.few),
                what=f"{classes} in {split.split}{left}",
                examples=tuple(f"{name}: {clips}" for name, clips in rarest[:FINDING_EXAMPLES_SHOWN]),
                do=_if_held_out(split, "their average precision is mostly chance"),
            )


def _if_held_out(split: SplitAudit, advice: str) -> str:
    return advice if split.held_out else ""


def _one_sided_findings(audit: StoreAudit) -> Iterator[AuditFinding]:
    if audit.sides is None:
        return
    held_out = " and ".join(audit.sides.held_out)
    if names := audit.sides.only_trained:
        yield AuditFinding(
            level="note",
            count=len(names),
            what=f"{count_phrase(len(names), 'class')} with clips to train on, and none in {held_out}",
            examples=names[:FINDING_EXAMPLES_SHOWN],
        )
    if names := audit.sides.only_held_out:
        yield AuditFinding(
            level="check",
            count=len(names),
            what=f"{count_phrase(len(names), 'class')} in {held_out}, without a clip to train on",
            examples=names[:FINDING_EXAMPLES_SHOWN],
            do="no probe can learn them: they pull mAP down",
        )


# Findings about clips without usable labels, and about rows.


def _label_findings(audit: StoreAudit) -> Iterator[AuditFinding]:
    # Labels that the class list lacks.
    if clips := sum(split.outside for split in audit.splits):
        ids = count_phrase(audit.outside_in_all, "id")
        yield AuditFinding(
            level="check",
            count=clips,
            what=f"{count_phrase(clips, 'clip')} with labels outside the class list, {ids} in all",
            examples=tuple(f"{mid}: {count:,}" for mid, count in audit.outside[:FINDING_EXAMPLES_SHOWN]),
            do="these labels count nowhere; the others of the same clips do",
        )

    # A store without any label is made for pre-training; otherwise each split is checked.
    any_in_use = any(split.in_use for split in audit.splits)
    if any_in_use and not any(split.classes for split in audit.splits):
        sentence = "no clip with a label: the store serves pre-training only"
        yield AuditFinding(level="note", count=0, what=sentence)
        return
    for split in audit.splits:
        if not split.unlabelled:
            continue
        level = "note"
        advice = "they are useful for pre-training; a probe treats them as negatives of every class"
        if split.held_out:
            level = "check"
            advice = "they count as negatives of every class; exclude them if they are not"
        sentence = f"{count_phrase(split.unlabelled, 'clip')} of {split.split} without a label"
        yield AuditFinding(level=level, count=split.unlabelled, what=sentence, do=advice)


def _row_findings(audit: StoreAudit, store: str) -> Iterator[AuditFinding]:
    if audit.listed_again:
        rows = count_phrase(audit.listed_again, "row")
        sentence = f"{rows} left out by the build, because another row with the same id counts"
        yield AuditFinding(level="note", count=audit.listed_again, what=sentence)
    for name, _, clips in audit.exclude_lists:
        sentence = f"{count_phrase(clips, 'clip')} excluded by {name}"
        advice = f"remove all lists with: ajepa-data audit-labels {store} --no-exclude"
        yield AuditFinding(level="note", count=clips, what=sentence, do=advice)
    for split in audit.splits:
        if not split.in_use:
            yield AuditFinding(level="check", count=0, what=f"split {split.split} without a clip in use")


# Lines of text.


def _finding_lines(findings: Sequence[AuditFinding]) -> Iterator[str]:
    counts = {level: sum(finding.level == level for finding in findings) for level in FINDING_LEVELS}
    yield ", ".join(count_phrase(count, level) for level, count in counts.items())
    for finding in findings:
        yield from _wrap_with_head(f"{finding.level:<6}", finding.what)
        if finding.examples:
            yield from _wrap_with_head("", f"such as {'; '.join(finding.examples)}")

        # A command stays on one line, so that it can be copied.
        if finding.do.startswith("ajepa-data"):
            yield f"{'':<9}-> {finding.do}"
        elif finding.do:
            yield from _wrap_with_head("", f"-> {finding.do}")


def _wrap_with_head(head: str, text: str) -> list[str]:
    """Return indented lines with a head before the first; words are not broken, so that ids can be copied."""
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
    # The column of names is as wide as the longest name.
    heads = ("listed", "excluded", "in use", "no label", "labels", "classes", "effective")
    widths = (10, 9, 10, 10, 7, 8, 10)
    name_width = max(16, *(len(split.split) + 1 for split in audit.splits))
    yield "split".ljust(name_width) + "".join(map(str.rjust, heads, widths))
    for split in audit.splits:
        cells = (
            f"{split.listed:,}",
            f"{split.excluded:,}",
            f"{split.in_use:,}",
            f"{split.unlabelled:,}",
            f"{split.labels_a_clip:.3f}",
            f"{split.classes:,}",
            f"{split.effective_classes:.1f}",
        )
        yield split.split.ljust(name_width) + "".join(map(str.rjust, cells, widths))
    yield "labels: mean per clip; effective: equally frequent classes with the same entropy"


def _contradiction_lines(audit: StoreAudit) -> Iterator[str]:
    for contradictions in audit.contradictions:
        if not contradictions.pairs:
            continue
        yield f"{f'label set {contradictions.label_set} lacks':<68}{'clips':>11}"
        for pair in contradictions.pairs:
            name = _fit_class_name(pair.name, 30)
            yield f"  {name} without {_fit_class_name(pair.implied, 27)}{pair.clips:>11,}"
        if (more := contradictions.pairs_in_all - len(contradictions.pairs)) > 0:
            yield f"  and {more:,} more pairs of classes"


def _class_pair_lines(title: str, pairs: Sequence[ClassPair], total: int) -> Iterator[str]:
    if not pairs:
        return
    yield f"{title:<{2 * CLASS_NAME_WIDTH + 4}}{'clips':>9}{'by chance':>11}{'G2':>10}"
    for pair in pairs:
        names = f"  {_fit_class_name(pair.one)}  {_fit_class_name(pair.other)}"
        yield f"{names}{pair.clips:>9,}{pair.expected:>11,.1f}{pair.g2:>10,.0f}"
    if (more := total - len(pairs)) > 0:
        yield f"  and {more:,} more pairs of unrelated classes"


def _class_shift_lines(audit: StoreAudit) -> Iterator[str]:
    sides = audit.sides
    if sides is None or not sides.shifts:
        return

    # Names of classes and of splits are cut to the width of their columns.
    title = "share of the labelled clips with a class"
    held_out = _fit_class_name(" + ".join(sides.held_out), 14).strip()
    yield f"{title:<{2 * CLASS_NAME_WIDTH + 4}}{'to train on':>13}{held_out:>16}"
    for shift in sides.shifts:
        name = shift.name[: 2 * CLASS_NAME_WIDTH].ljust(2 * CLASS_NAME_WIDTH + 2)
        yield f"  {name}{shift.trained:>13.3%}{shift.held_out:>16.3%}"
    if (more := sides.shifts_in_all - len(sides.shifts)) > 0:
        yield f"  and {more:,} more classes that differ by more than chance"
    yield f"  {sides.shift:.1%} of the labels would have to change their class to make both equal"


def _fit_class_name(name: str, width: int = CLASS_NAME_WIDTH) -> str:
    return (name if len(name) <= width else name[: width - 1] + "…").ljust(width)
