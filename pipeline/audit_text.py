"""An audit as text: the findings, then the figures."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.audit import Audit
from pipeline.audit_findings import LEVELS, Finding, findings
from pipeline.audit_pairs import Pair
from pipeline.files import replacing

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
