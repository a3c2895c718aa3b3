"""Rows: what an audit looks at: every clip of a store, which of them are in use, and which splits are held out.

An audit: what is wrong or surprising about the clips and labels of a store.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from pipeline.audit.class_pairs import ClassShift, SurprisingPairs, find_class_shifts, find_surprising_pairs
from pipeline.audit.copies import ClipCopies, clip_recordings, find_copies
from pipeline.audit.implied_labels import (
    LabelContradictions,
    OntologySubset,
    find_contradictions,
    label_keys,
    rule_to_check,
)
from pipeline.errors import StoreError
from pipeline.labels.label_sets import MissingOntologyError, label_set_ontology
from pipeline.labels.ontology import ClassList, Ontology, load_ontology
from pipeline.labels.propagation import PROPAGATION_RULES
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import evaluation_split_names
from pipeline.store.summary import IS_GOOD_CLIP, label_set_names
from pipeline.tables import read_table


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AuditedClips:
    """A manifest, labels.parquet beside it, and what each row counts as."""

    manifest: pl.DataFrame
    labels: pl.DataFrame
    provenance: dict[str, Any]  # of the label sets, as labels.parquet has it
    classes: ClassList
    recording: pl.Series  # what each clip was cut from
    excluded_N: np.ndarray  # marked by an exclude list
    exclude_lists: tuple[tuple[str, str, int], ...]  # the exclude lists: name, sha256, clips
    splits: tuple[str, ...]  # in the order of the manifest
    held_out_names: tuple[str, ...]  # those held out
    ontologies: dict[str, Ontology]  # of the propagated sets, where they can be had

    @classmethod
    def of_store(cls, store: FeatureStore, held_out_names: Sequence[str] = ()) -> Self:
        """All of a store; held out are the splits named, or else those named eval or test. StoreError."""
        labels, provenance = read_table(store.path / "labels.parquet")
        splits = tuple(store.manifest["split"].unique(maintain_order=True))
        if unknown := sorted(set(held_out_names) - set(splits)):
            raise StoreError(f"{store.path}: no split {unknown[0]!r}; it has: {', '.join(splits)}")
        return cls(
            manifest=store.manifest,
            labels=labels,
            provenance=provenance,
            classes=store.classes,
            recording=clip_recordings(store.manifest, _source_dataset(store)),
            excluded_N=store.exclusions.excluded_mask_N(store.manifest),
            exclude_lists=tuple(store.exclusions.summarise_lists()),
            splits=splits,
            held_out_names=tuple(held_out_names) or evaluation_split_names(splits),
            ontologies=dict(_label_set_ontologies(store.path, provenance)),
        )

    @property
    def good_N(self) -> np.ndarray:
        return self.manifest.select(IS_GOOD_CLIP).to_series().to_numpy()

    @property
    def in_use_N(self) -> np.ndarray:
        """Good, and not excluded: what loaders draw from."""
        return self.good_N & ~self.excluded_N

    @property
    def split_N(self) -> np.ndarray:
        """The index of each row's split."""
        enum = pl.Enum(list(self.splits))
        return self.manifest["split"].cast(enum).to_physical().to_numpy().astype(np.int64)

    @property
    def held_out_S(self) -> np.ndarray:
        """Whether each split is held out."""
        return np.isin(self.splits, self.held_out_names)

    def clips_in_use(self) -> pl.DataFrame:
        """The clips in use, as `audit_copies.copies` wants them. One silence is like another: it is not compared."""
        audio = pl.when(~pl.col("flags").list.contains("silent")).then("digest")
        return self.manifest.select(
            "clip_id",
            audio=audio,
            row=pl.int_range(pl.len(), dtype=pl.Int64),
            split=pl.Series(self.split_N),
            recording=self.recording,
            raw=self.labels["raw"],
        ).filter(self.in_use_N)


def _label_set_ontologies(store: Path, provenance: dict[str, Any]) -> Iterator[tuple[str, Ontology]]:
    """Of each propagated label set; a set that does not say which, or whose is gone, is left out."""
    for name, by in provenance.items():
        if isinstance(by, dict) and by.get("rule") in PROPAGATION_RULES and "ontology" in by:
            with suppress(MissingOntologyError):
                yield name, label_set_ontology(store, by["rule"], by["ontology"])


def _source_dataset(store: FeatureStore) -> str | None:
    """What build.json says the store was built from; None where it does not say."""
    try:
        asked = json.loads((store.path / "build.json").read_text())["asked"]
        return asked["dataset"] if isinstance(asked, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


FEW_POSITIVES = 10  # positives, under which a class's average precision is mostly luck

SURPRISES_KEPT = 10  # shown of each kind of surprise

OUTSIDE_CLASSES_KEPT = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitAudit:
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
class RareClasses:
    """The classes of a split that can hardly be measured, by one label set."""

    split: str
    label_set: str
    none: tuple[str, ...]  # without a clip: average precision is undefined
    few: tuple[tuple[str, int], ...]  # with fewer than `Audit.few`, and how many


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainEvalShift:
    """The splits to train on against those held out, by raw labels.

    shift  total variation of the class frequencies: 0 where they are equal, 1 where they share no class
    """

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    only_trained: tuple[str, ...]  # classes
    only_held_out: tuple[str, ...]
    shift: float
    shifts: tuple[ClassShift, ...]
    shifts_in_all: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreAudit:
    """What is wrong or surprising about the clips in use."""

    few: int
    classes: int
    splits: tuple[SplitAudit, ...]
    listed_again: int  # rows that the build set aside: their id stands elsewhere, and counts there
    exclude_lists: tuple[tuple[str, str, int], ...]  # name, sha256, clips
    copies: tuple[ClipCopies, ...]
    contradictions: tuple[LabelContradictions, ...]  # one a label set
    gaps: tuple[RareClasses, ...]  # one a split and label set
    outside: tuple[tuple[str, int], ...]  # labels that the class list does not know, and their clips
    outside_in_all: int
    pairs: SurprisingPairs
    sides: TrainEvalShift | None  # None where no split, or every split, is held out


def audit_clips(
    rows: AuditedClips,
    *,
    ontology: Ontology | None = None,
    few: int = FEW_POSITIVES,
    top: int = SURPRISES_KEPT,
) -> StoreAudit:
    """Look at every clip; seconds for two million. OntologyError where a label is null or no class.

    A propagated set is judged by the ontology it was made with; what raw labels imply, and which classes are related,
    by `ontology`, else by that of the first propagated set, else by AudioSet's.
    `few` positives make a class measurable; `top` of each kind of surprise are kept.
    """
    common = ontology or next(iter(rows.ontologies.values()), None) or load_ontology()
    tree, counted = OntologySubset.of_classes(common, rows.classes), _AuditedLabels.of_clips(rows)
    row_N, class_N = np.divmod(counted.keys_in_use["raw"], len(rows.classes))
    outside = rows.labels.select("outside").filter(rows.in_use_N).to_series().explode().drop_nulls()
    odd = outside.value_counts().sort(["count", "outside"], descending=[True, False])
    return StoreAudit(
        few=few,
        classes=len(rows.classes),
        splits=tuple(_audit_splits(rows, counted)),
        listed_again=rows.manifest.select((pl.col("reason") == "duplicate").sum()).item(),
        exclude_lists=rows.exclude_lists,
        copies=find_copies(rows.clips_in_use(), rows.splits, rows.held_out_names),
        contradictions=tuple(_check_label_sets(rows, counted, tree, top)),
        gaps=tuple(_rare_classes(rows, counted, few)),
        outside=tuple(odd.head(OUTSIDE_CLASSES_KEPT).rows()),
        outside_in_all=odd.height,
        pairs=find_surprising_pairs(row_N, class_N, rows.classes.names, tree.related_pairs(), top=top),
        sides=_train_eval_shift(rows, counted, top),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _AuditedLabels:
    """The labels of the clips in use, by label set."""

    keys_in_use: dict[str, np.ndarray]  # ascending: row * classes + class
    all_keys: dict[str, np.ndarray]  # of every clip, in use or not
    clips_SC: dict[str, np.ndarray]  # of each split and class
    labelled_S: np.ndarray  # clips of each split with a raw label

    @classmethod
    def of_clips(cls, rows: AuditedClips) -> "_AuditedLabels":
        use_N, split_N, classes = rows.in_use_N, rows.split_N, len(rows.classes)
        keys, clips_SC = {}, {}
        all_keys = {name: label_keys(rows.labels[name], classes) for name in label_set_names(rows.labels)}
        for name, all_N in all_keys.items():
            keys[name] = all_N[use_N[all_N // classes]]
            row_N, class_N = np.divmod(keys[name], classes)
            flat_N = np.bincount(split_N[row_N] * classes + class_N, minlength=len(rows.splits) * classes)
            clips_SC[name] = flat_N.reshape(len(rows.splits), classes)
        row_N = keys["raw"] // classes
        first_N = row_N[np.diff(row_N, prepend=-1) > 0]
        return cls(
            keys_in_use=keys,
            all_keys=all_keys,
            clips_SC=clips_SC,
            labelled_S=np.bincount(split_N[first_N], minlength=len(rows.splits)),
        )


def _audit_splits(rows: AuditedClips, label_totals: _AuditedLabels) -> Iterator[SplitAudit]:
    good_N, use_N, split_N = rows.good_N, rows.in_use_N, rows.split_N
    odd_N = (rows.labels["outside"].list.len() > 0).to_numpy()
    labels_N = np.bincount(label_totals.keys_in_use["raw"] // len(rows.classes), minlength=len(use_N))
    for place, split in enumerate(rows.splits):
        ours_N, clips_C = split_N == place, label_totals.clips_SC["raw"][place]
        in_use = int((ours_N & use_N).sum())
        yield SplitAudit(
            split=split,
            held_out=split in rows.held_out_names,
            listed=int(ours_N.sum()),
            good=int((ours_N & good_N).sum()),
            excluded=int((ours_N & good_N & ~use_N).sum()),
            in_use=in_use,
            unlabelled=in_use - int(label_totals.labelled_S[place]),
            outside=int((ours_N & use_N & odd_N).sum()),
            labels_a_clip=float(clips_C.sum() / max(in_use, 1)),
            most_labels=int(labels_N[ours_N].max(initial=0)),
            classes=int((clips_C > 0).sum()),
            effective_classes=effective_class_count(clips_C),
            gini=gini_coefficient(clips_C),
        )


def effective_class_count(clips_C: np.ndarray) -> float:
    """How many equally frequent classes have the entropy of these; 0 where there is none."""
    share_C = clips_C[clips_C > 0] / max(clips_C.sum(), 1)
    return float(np.exp(-(share_C * np.log(share_C)).sum())) if len(share_C) else 0.0


def gini_coefficient(clips_C: np.ndarray) -> float:
    """Inequality of the counts: 0 where all are equal, (C - 1) / C where one class has all."""
    ascending_C, classes = np.sort(clips_C), len(clips_C)
    if not ascending_C.sum():
        return 0.0
    rank_C = np.arange(1, classes + 1)
    return float(2 * (rank_C * ascending_C).sum() / (classes * ascending_C.sum()) - (classes + 1) / classes)


def _check_label_sets(
    rows: AuditedClips, label_totals: _AuditedLabels, ontology_subset: OntologySubset, top: int
) -> Iterator[LabelContradictions]:
    """The raw set by what the clips in use lack, any other by what its rule gives in the splits it was made for."""
    split_N, classes = rows.split_N, len(rows.classes)
    for name, all_N in label_totals.all_keys.items():
        own = (
            OntologySubset.of_classes(rows.ontologies[name], rows.classes)
            if name in rows.ontologies
            else ontology_subset
        )
        rule, why_not = rule_to_check(name, rows.provenance.get(name), own)
        if rule is None:
            yield LabelContradictions(label_set=name, rule=None, why_not=why_not)
            continue
        raw_N, held_N = label_totals.keys_in_use["raw"], label_totals.keys_in_use["raw"]
        if name != "raw":
            done_S = np.isin(rows.splits, rows.provenance[name]["splits"])
            raw_N, held_N = (k[done_S[split_N[k // classes]]] for k in (label_totals.all_keys["raw"], all_N))
        yield find_contradictions(
            name, raw_N, held_N, own.implied_pairs(rule), rows.classes.names, rule=rule, top=top
        )


def _rare_classes(rows: AuditedClips, label_totals: _AuditedLabels, few: int) -> Iterator[RareClasses]:
    names = np.array(rows.classes.names, object)
    for place, split in enumerate(rows.splits):
        for name, clips_SC in label_totals.clips_SC.items():
            clips_C = clips_SC[place]
            rare = np.flatnonzero((clips_C > 0) & (clips_C < few))
            yield RareClasses(
                split=split,
                label_set=name,
                none=tuple(names[clips_C == 0]),
                few=tuple((names[i], int(clips_C[i])) for i in rare),
            )


def _train_eval_shift(rows: AuditedClips, label_totals: _AuditedLabels, top: int) -> TrainEvalShift | None:
    measured_S, clips_SC = rows.held_out_S, label_totals.clips_SC["raw"]
    if measured_S.all() or not measured_S.any():
        return None
    trained_C, held_C = clips_SC[~measured_S].sum(0), clips_SC[measured_S].sum(0)
    trained, held = (
        int(label_totals.labelled_S[~measured_S].sum()),
        int(label_totals.labelled_S[measured_S].sum()),
    )
    names = np.array(rows.classes.names, object)
    shifts, shifts_in_all = find_class_shifts(trained_C, held_C, trained, held, rows.classes.names, top=top)
    shares = (clips_C / max(clips_C.sum(), 1) for clips_C in (trained_C, held_C))
    return TrainEvalShift(
        trained=tuple(s for s in rows.splits if s not in rows.held_out_names),
        held_out=rows.held_out_names,
        only_trained=tuple(names[(trained_C > 0) & (held_C == 0)]),
        only_held_out=tuple(names[(trained_C == 0) & (held_C > 0)]),
        shift=float(abs(next(shares) - next(shares)).sum() / 2),
        shifts=shifts,
        shifts_in_all=shifts_in_all,
    )
