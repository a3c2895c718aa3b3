"""An audit: what is wrong or surprising about the clips and labels of a store."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.audit_copies import Copies, copies
from pipeline.audit_implied import Contradictions, Tree, contradictions, keys_of, rule_of
from pipeline.audit_pairs import Pairs, Shift, pairs_of, shifts_of
from pipeline.audit_rows import Rows
from pipeline.ontology import Ontology, load_ontology
from pipeline.report import label_sets

FEW = 10  # positives, under which a class's average precision is mostly luck
TOP = 10  # shown of each kind of surprise
OUTSIDE_SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The clips of a split; from `unlabelled` on by the raw labels of clips in use: good, and not excluded."""

    split: str
    held_out: bool
    listed: int
    good: int
    excluded: int  # good ones
    in_use: int
    unlabelled: int
    outside: int  # clips with a label that the class list does not know
    labels_a_clip: float
    most_labels: int
    classes: int  # with a clip
    effective_classes: float  # so many equally frequent classes would have the same entropy
    gini: float  # of clips a class: 0 where all are equally frequent, near 1 where one has all


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaps:
    """The classes of a split that can hardly be measured, by one label set."""

    split: str
    label_set: str
    none: tuple[str, ...]  # without a clip: average precision is undefined
    few: tuple[tuple[str, int], ...]  # with fewer than `Audit.few`, and how many


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """The splits to train on against those held out, by raw labels.

    shift  total variation of the class frequencies: 0 where they are equal, 1 where they share no class
    """

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    only_trained: tuple[str, ...]  # classes
    only_held_out: tuple[str, ...]
    shift: float
    shifts: tuple[Shift, ...]
    shifts_in_all: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What is wrong or surprising about the clips in use."""

    few: int
    classes: int
    splits: tuple[Split, ...]
    listed_again: int  # rows that the build set aside: their id stands elsewhere, and counts there
    exclude_lists: tuple[tuple[str, str, int], ...]  # name, sha256, clips
    copies: tuple[Copies, ...]
    contradictions: tuple[Contradictions, ...]  # one a label set
    gaps: tuple[Gaps, ...]  # one a split and label set
    outside: tuple[tuple[str, int], ...]  # labels that the class list does not know, and their clips
    outside_in_all: int
    pairs: Pairs
    sides: Sides | None  # None where no split, or every split, is held out


def audit(rows: Rows, *, ontology: Ontology | None = None, few: int = FEW, top: int = TOP) -> Audit:
    """Look at every clip; seconds for two million. OntologyError where a label is null or no class.

    A propagated set is judged by the ontology it was made with; what raw labels imply, and which classes are related,
    by `ontology`, else by that of the first propagated set, else by AudioSet's.
    `few` positives make a class measurable; `top` of each kind of surprise are kept.
    """
    common = ontology or next(iter(rows.ontologies.values()), None) or load_ontology()
    tree, counted = Tree.of(common, rows.classes), _Counted.of(rows)
    row_N, class_N = np.divmod(counted.keys["raw"], len(rows.classes))
    outside = rows.labels.select("outside").filter(rows.use_N).to_series().explode().drop_nulls()
    odd = outside.value_counts().sort(["count", "outside"], descending=[True, False])
    return Audit(
        few=few,
        classes=len(rows.classes),
        splits=tuple(_splits(rows, counted)),
        listed_again=rows.manifest.select((pl.col("reason") == "duplicate").sum()).item(),
        exclude_lists=rows.lists,
        copies=copies(rows.clips(), rows.splits, rows.measured),
        contradictions=tuple(_contradictions(rows, counted, tree, top)),
        gaps=tuple(_gaps(rows, counted, few)),
        outside=tuple(odd.head(OUTSIDE_SHOWN).rows()),
        outside_in_all=odd.height,
        pairs=pairs_of(row_N, class_N, rows.classes.names, tree.related(), top=top),
        sides=_sides(rows, counted, top),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Counted:
    """The labels of the clips in use, by label set."""

    keys: dict[str, np.ndarray]  # ascending: row * classes + class
    all_keys: dict[str, np.ndarray]  # of every clip, in use or not
    clips_SC: dict[str, np.ndarray]  # of each split and class
    labelled_S: np.ndarray  # clips of each split with a raw label

    @classmethod
    def of(cls, rows: Rows) -> "_Counted":
        use_N, split_N, classes = rows.use_N, rows.split_N, len(rows.classes)
        keys, clips_SC = {}, {}
        all_keys = {name: keys_of(rows.labels[name], classes) for name in label_sets(rows.labels)}
        for name, all_N in all_keys.items():
            keys[name] = all_N[use_N[all_N // classes]]
            row_N, class_N = np.divmod(keys[name], classes)
            flat_N = np.bincount(split_N[row_N] * classes + class_N, minlength=len(rows.splits) * classes)
            clips_SC[name] = flat_N.reshape(len(rows.splits), classes)
        row_N = keys["raw"] // classes
        first_N = row_N[np.diff(row_N, prepend=-1) > 0]
        return cls(
            keys=keys,
            all_keys=all_keys,
            clips_SC=clips_SC,
            labelled_S=np.bincount(split_N[first_N], minlength=len(rows.splits)),
        )


def _splits(rows: Rows, counted: _Counted) -> Iterator[Split]:
    good_N, use_N, split_N = rows.good_N, rows.use_N, rows.split_N
    odd_N = (rows.labels["outside"].list.len() > 0).to_numpy()
    labels_N = np.bincount(counted.keys["raw"] // len(rows.classes), minlength=len(use_N))
    for place, split in enumerate(rows.splits):
        ours_N, clips_C = split_N == place, counted.clips_SC["raw"][place]
        in_use = int((ours_N & use_N).sum())
        yield Split(
            split=split,
            held_out=split in rows.measured,
            listed=int(ours_N.sum()),
            good=int((ours_N & good_N).sum()),
            excluded=int((ours_N & good_N & ~use_N).sum()),
            in_use=in_use,
            unlabelled=in_use - int(counted.labelled_S[place]),
            outside=int((ours_N & use_N & odd_N).sum()),
            labels_a_clip=float(clips_C.sum() / max(in_use, 1)),
            most_labels=int(labels_N[ours_N].max(initial=0)),
            classes=int((clips_C > 0).sum()),
            effective_classes=effective(clips_C),
            gini=gini(clips_C),
        )


def effective(clips_C: np.ndarray) -> float:
    """How many equally frequent classes have the entropy of these; 0 where there is none."""
    share_C = clips_C[clips_C > 0] / max(clips_C.sum(), 1)
    return float(np.exp(-(share_C * np.log(share_C)).sum())) if len(share_C) else 0.0


def gini(clips_C: np.ndarray) -> float:
    """Inequality of the counts: 0 where all are equal, (C - 1) / C where one class has all."""
    ascending_C, classes = np.sort(clips_C), len(clips_C)
    if not ascending_C.sum():
        return 0.0
    rank_C = np.arange(1, classes + 1)
    return float(2 * (rank_C * ascending_C).sum() / (classes * ascending_C.sum()) - (classes + 1) / classes)


def _contradictions(rows: Rows, counted: _Counted, tree: Tree, top: int) -> Iterator[Contradictions]:
    """The raw set by what the clips in use lack, any other by what its rule gives in the splits it was made for."""
    split_N, classes = rows.split_N, len(rows.classes)
    for name, all_N in counted.all_keys.items():
        own = Tree.of(rows.ontologies[name], rows.classes) if name in rows.ontologies else tree
        rule, why_not = rule_of(name, rows.provenance.get(name), own)
        if rule is None:
            yield Contradictions(label_set=name, rule=None, why_not=why_not)
            continue
        raw_N, held_N = counted.keys["raw"], counted.keys["raw"]
        if name != "raw":
            done_S = np.isin(rows.splits, rows.provenance[name]["splits"])
            raw_N, held_N = (k[done_S[split_N[k // classes]]] for k in (counted.all_keys["raw"], all_N))
        yield contradictions(name, raw_N, held_N, own.adds(rule), rows.classes.names, rule=rule, top=top)


def _gaps(rows: Rows, counted: _Counted, few: int) -> Iterator[Gaps]:
    names = np.array(rows.classes.names, object)
    for place, split in enumerate(rows.splits):
        for name, clips_SC in counted.clips_SC.items():
            clips_C = clips_SC[place]
            rare = np.flatnonzero((clips_C > 0) & (clips_C < few))
            yield Gaps(
                split=split,
                label_set=name,
                none=tuple(names[clips_C == 0]),
                few=tuple((names[i], int(clips_C[i])) for i in rare),
            )


def _sides(rows: Rows, counted: _Counted, top: int) -> Sides | None:
    measured_S, clips_SC = rows.measured_S, counted.clips_SC["raw"]
    if measured_S.all() or not measured_S.any():
        return None
    trained_C, held_C = clips_SC[~measured_S].sum(0), clips_SC[measured_S].sum(0)
    trained, held = int(counted.labelled_S[~measured_S].sum()), int(counted.labelled_S[measured_S].sum())
    names = np.array(rows.classes.names, object)
    shifts, shifts_in_all = shifts_of(trained_C, held_C, trained, held, rows.classes.names, top=top)
    shares = (clips_C / max(clips_C.sum(), 1) for clips_C in (trained_C, held_C))
    return Sides(
        trained=tuple(s for s in rows.splits if s not in rows.measured),
        held_out=rows.measured,
        only_trained=tuple(names[(trained_C > 0) & (held_C == 0)]),
        only_held_out=tuple(names[(trained_C == 0) & (held_C > 0)]),
        shift=float(abs(next(shares) - next(shares)).sum() / 2),
        shifts=shifts,
        shifts_in_all=shifts_in_all,
    )
