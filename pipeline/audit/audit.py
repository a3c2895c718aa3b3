"""The audit of a store: the clips in use, and all figures about their splits, copies, labels and classes."""

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
from pipeline.messages import suggest_known
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import evaluation_split_names
from pipeline.store.summary import IS_GOOD_CLIP, label_set_names
from pipeline.tables import read_table

# With fewer positives, a class's average precision is mostly chance.
FEW_POSITIVES = 10

SURPRISES_KEPT = 10  # of each kind

OUTSIDE_CLASSES_KEPT = 20


AUDITED_COLUMNS = ("clip_id", "split", "status", "reason", "flags", "digest")  # of the manifest


# The clips of an audit.


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AuditedClips:
    """The clips and the labels of a store, and the data that decide which rows are in use."""

    manifest: pl.DataFrame  # AUDITED_COLUMNS of the manifest
    labels: pl.DataFrame
    provenance: dict[str, Any]  # of the label sets, from labels.parquet
    classes: ClassList
    recording: pl.Series  # the recording that each clip was cut from
    excluded_N: np.ndarray  # true for rows marked by an exclude list
    exclude_lists: tuple[tuple[str, str, int], ...]  # name, sha256, clips
    splits: tuple[str, ...]  # in the order of the manifest
    held_out_names: tuple[str, ...]  # names of the evaluation splits
    ontologies: dict[str, Ontology]  # by propagated label set, unless the ontology is missing

    @classmethod
    def of_store(cls, store: FeatureStore, held_out_names: Sequence[str] = ()) -> Self:
        """Return all clips of a store; by default, splits named eval or test are held out. Raises StoreError."""
        labels, provenance = read_table(store.path / "labels.parquet")
        splits = store.split_names
        if unknown := sorted(set(held_out_names) - set(splits)):
            suggestion = suggest_known(unknown[0], splits, there_are="It has")
            raise StoreError(f"{store.path}: no split {unknown[0]!r}; {suggestion}")

        # Everything that decides which rows count is read now, so that the audit itself reads no file. Sources are
        # read only where they tell the recording: two million file names take much memory.
        dataset = _source_dataset(store)
        columns = AUDITED_COLUMNS if dataset == "audioset" else (*AUDITED_COLUMNS, "source")
        manifest = store.manifest_columns(*columns)
        return cls(
            manifest=manifest,
            labels=labels,
            provenance=provenance,
            classes=store.classes,
            recording=clip_recordings(manifest, dataset),
            excluded_N=store.excluded_N,
            exclude_lists=tuple(store.exclusions.summarise_lists()),
            splits=splits,
            held_out_names=tuple(held_out_names) or evaluation_split_names(splits),
            ontologies=dict(_label_set_ontologies(store.path, provenance)),
        )

    @property
    def good_N(self) -> np.ndarray:
        """True for rows with usable audio."""
        return self.manifest.select(IS_GOOD_CLIP).to_series().to_numpy()

    @property
    def in_use_N(self) -> np.ndarray:
        """True for rows that are good and not excluded, so that loaders draw them."""
        return self.good_N & ~self.excluded_N

    @property
    def split_N(self) -> np.ndarray:
        """The index of each row's split."""
        enum = pl.Enum(list(self.splits))
        return self.manifest["split"].cast(enum).to_physical().to_numpy().astype(np.int64)

    @property
    def held_out_S(self) -> np.ndarray:
        """True for splits that are held out."""
        return np.isin(self.splits, self.held_out_names)

    def clips_in_use(self) -> pl.DataFrame:
        """Return the clips in use, with the columns that `copies.find_copies` needs.

        The audio of a silent clip is null, because all silent clips are equal without being copies.
        """
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
    """Yield the ontology of each propagated label set, except sets that name none or whose ontology is missing."""
    for label_set, source in provenance.items():
        if isinstance(source, dict) and source.get("rule") in PROPAGATION_RULES and "ontology" in source:
            with suppress(MissingOntologyError):
                yield label_set, label_set_ontology(store, source["rule"], source["ontology"])


def _source_dataset(store: FeatureStore) -> str | None:
    """Return the data set that the store was built from, as recorded in build.json; None if it is not recorded."""
    # `asked` is the key under which a build records its settings.
    try:
        settings = json.loads((store.path / "build.json").read_text())["asked"]
        return settings["dataset"] if isinstance(settings, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# The figures of an audit.


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitAudit:
    """The clips of a split; the fields from `unlabelled` on count raw labels of clips in use."""

    split: str
    held_out: bool
    listed: int
    good: int
    excluded: int  # good clips that an exclude list names
    in_use: int
    unlabelled: int
    outside: int  # clips with a label that the class list lacks
    labels_a_clip: float  # mean
    most_labels: int  # of any clip
    classes: int  # classes with a clip
    effective_classes: float  # the number of equally frequent classes with the same entropy
    gini: float  # of the clips per class: 0 if all are equally frequent, near 1 if one class has all


@dataclass(frozen=True, kw_only=True, slots=True)
class RareClasses:
    """The classes of a split, by one label set, with too few clips for a reliable average precision."""

    split: str
    label_set: str
    none: tuple[str, ...]  # classes without a clip: their average precision is undefined
    few: tuple[tuple[str, int], ...]  # classes with fewer clips than `StoreAudit.few`, and their clips


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainEvalShift:
    """The differences between the training splits and the held-out splits, by raw labels.

    shift  total variation of the class frequencies: 0 if they are equal, 1 if no class is on both sides
    """

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    only_trained: tuple[str, ...]  # classes with clips only in training splits
    only_held_out: tuple[str, ...]  # classes with clips only in held-out splits
    shift: float
    shifts: tuple[ClassShift, ...]  # most significant first
    shifts_in_all: int  # number of shifted classes, including those not in `shifts`


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreAudit:
    """Everything that is wrong or surprising about the clips in use."""

    few: int  # classes with fewer clips are reported as rare
    classes: int  # number of classes of the class list
    splits: tuple[SplitAudit, ...]
    listed_again: int  # rows that the build left out, because another row with the same id counts
    exclude_lists: tuple[tuple[str, str, int], ...]  # name, sha256, clips
    copies: tuple[ClipCopies, ...]
    contradictions: tuple[LabelContradictions, ...]  # one per label set
    gaps: tuple[RareClasses, ...]  # one per split and label set
    outside: tuple[tuple[str, int], ...]  # ids that the class list lacks, and the number of clips with each
    outside_in_all: int  # number of such ids, including those not in `outside`
    pairs: SurprisingPairs
    sides: TrainEvalShift | None  # None if no split, or every split, is held out


def audit_clips(
    rows: AuditedClips,
    *,
    ontology: Ontology | None = None,
    few: int = FEW_POSITIVES,
    top: int = SURPRISES_KEPT,
) -> StoreAudit:
    """Audit every clip; two million clips take seconds. OntologyError if a label is null or is no class.

    Each propagated set is checked by the ontology that it was made with. `ontology` decides which labels raw labels
    imply and which classes are related. It defaults to the ontology of the first propagated set, and to AudioSet's if
    there is none. Classes with fewer than `few` positives are reported; `top` surprises of each kind are kept.
    """
    # The labels as arrays, and the classes that the ontology knows.
    common = ontology or next(iter(rows.ontologies.values()), None) or load_ontology()
    subset = OntologySubset.of_classes(common, rows.classes)
    labels = _AuditedLabels.of_clips(rows)
    row_N, class_N = np.divmod(labels.keys_in_use["raw"], len(rows.classes))

    # Count the ids that the class list lacks, the most frequent first.
    outside = rows.labels.select("outside").filter(rows.in_use_N).to_series().explode().drop_nulls()
    outside_counts = outside.value_counts().sort(["count", "outside"], descending=[True, False])

    return StoreAudit(
        few=few,
        classes=len(rows.classes),
        splits=tuple(_audit_splits(rows, labels)),
        listed_again=rows.manifest.select((pl.col("reason") == "duplicate").sum()).item(),
        exclude_lists=rows.exclude_lists,
        copies=find_copies(rows.clips_in_use(), rows.splits, rows.held_out_names),
        contradictions=tuple(_check_label_sets(rows, labels, subset, top)),
        gaps=tuple(_rare_classes(rows, labels, few)),
        outside=tuple(outside_counts.head(OUTSIDE_CLASSES_KEPT).rows()),
        outside_in_all=outside_counts.height,
        pairs=find_surprising_pairs(row_N, class_N, rows.classes.names, subset.related_pairs(), top=top),
        sides=_train_eval_shift(rows, labels, top),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _AuditedLabels:
    """The labels of each label set, as ascending keys row * classes + class, and their counts in use."""

    all_keys: dict[str, np.ndarray]
    keys_in_use: dict[str, np.ndarray]  # of the clips in use
    clips_SC: dict[str, np.ndarray]  # clips in use of each split and class
    labelled_S: np.ndarray  # clips in use of each split with a raw label

    @classmethod
    def of_clips(cls, rows: AuditedClips) -> Self:
        in_use_N = rows.in_use_N
        split_N = rows.split_N
        class_count = len(rows.classes)
        split_count = len(rows.splits)

        # Every label set as keys, and the number of labels in each split and class.
        all_keys = {name: label_keys(rows.labels[name], class_count) for name in label_set_names(rows.labels)}
        keys_in_use = {}
        clips_SC = {}
        for name, keys_N in all_keys.items():
            used_keys_N = keys_N[in_use_N[keys_N // class_count]]
            row_N, class_N = np.divmod(used_keys_N, class_count)
            cells_N = split_N[row_N] * class_count + class_N
            counts_N = np.bincount(cells_N, minlength=split_count * class_count)
            keys_in_use[name] = used_keys_N
            clips_SC[name] = counts_N.reshape(split_count, class_count)

        # Keys ascend, so that a clip's first label is where the row changes.
        row_N = keys_in_use["raw"] // class_count
        labelled_rows_N = row_N[np.diff(row_N, prepend=-1) > 0]
        return cls(
            all_keys=all_keys,
            keys_in_use=keys_in_use,
            clips_SC=clips_SC,
            labelled_S=np.bincount(split_N[labelled_rows_N], minlength=split_count),
        )


def _audit_splits(rows: AuditedClips, labels: _AuditedLabels) -> Iterator[SplitAudit]:
    # Find the figures of every row.
    good_N = rows.good_N
    in_use_N = rows.in_use_N
    split_N = rows.split_N
    has_outside_N = (rows.labels["outside"].list.len() > 0).to_numpy()
    label_count_N = np.bincount(labels.keys_in_use["raw"] // len(rows.classes), minlength=len(in_use_N))

    # Sum them up split by split.
    for index, split in enumerate(rows.splits):
        in_split_N = split_N == index
        clips_C = labels.clips_SC["raw"][index]
        in_use = int((in_split_N & in_use_N).sum())
        yield SplitAudit(
            split=split,
            held_out=split in rows.held_out_names,
            listed=int(in_split_N.sum()),
            good=int((in_split_N & good_N).sum()),
            excluded=int((in_split_N & good_N & ~in_use_N).sum()),
            in_use=in_use,
            unlabelled=in_use - int(labels.labelled_S[index]),
            outside=int((in_split_N & in_use_N & has_outside_N).sum()),
            labels_a_clip=float(clips_C.sum() / max(in_use, 1)),
            most_labels=int(label_count_N[in_split_N].max(initial=0)),
            classes=int((clips_C > 0).sum()),
            effective_classes=effective_class_count(clips_C),
            gini=gini_coefficient(clips_C),
        )


def effective_class_count(clips_C: np.ndarray) -> float:
    """Return the number of equally frequent classes with the same entropy; 0 if no class has a clip."""
    # The exponential of the entropy, also called perplexity.
    share_C = clips_C[clips_C > 0] / max(clips_C.sum(), 1)
    return float(np.exp(-(share_C * np.log(share_C)).sum())) if len(share_C) else 0.0


def gini_coefficient(clips_C: np.ndarray) -> float:
    """Return the Gini coefficient of the counts: 0 if all are equal, (C - 1) / C if one class has all clips."""
    total = clips_C.sum()
    if not total:
        return 0.0

    # In ascending order, each count is weighted by its rank.
    classes = len(clips_C)
    rank_C = np.arange(1, classes + 1)
    return float(2 * (rank_C * np.sort(clips_C)).sum() / (classes * total) - (classes + 1) / classes)


def _check_label_sets(
    rows: AuditedClips, labels: _AuditedLabels, common_subset: OntologySubset, top: int
) -> Iterator[LabelContradictions]:
    """Compare the raw set with the labels that it implies, and every other set with the result of its rule."""
    split_N = rows.split_N
    class_count = len(rows.classes)
    for name, all_keys_N in labels.all_keys.items():
        # Check by the set's own rule and ontology, if they are known.
        subset = common_subset
        if name in rows.ontologies:
            subset = OntologySubset.of_classes(rows.ontologies[name], rows.classes)
        rule, why_not = rule_to_check(name, rows.provenance.get(name), subset)
        if rule is None:
            yield LabelContradictions(label_set=name, rule=None, why_not=why_not)
            continue

        # Check raw labels in the clips in use, a propagated set in all clips of its propagated splits.
        if name == "raw":
            raw_N = present_N = labels.keys_in_use["raw"]
        else:
            is_covered_S = np.isin(rows.splits, rows.provenance[name]["splits"])
            raw_keys_N = labels.all_keys["raw"]
            raw_N = raw_keys_N[is_covered_S[split_N[raw_keys_N // class_count]]]
            present_N = all_keys_N[is_covered_S[split_N[all_keys_N // class_count]]]
        implied_pairs = subset.implied_pairs(rule)
        yield find_contradictions(
            name, raw_N, present_N, implied_pairs, rows.classes.names, rule=rule, top=top
        )


def _rare_classes(rows: AuditedClips, labels: _AuditedLabels, few: int) -> Iterator[RareClasses]:
    names = np.array(rows.classes.names, object)
    for index, split in enumerate(rows.splits):
        for label_set, clips_SC in labels.clips_SC.items():
            clips_C = clips_SC[index]

            # List classes without a clip separately, because their average precision is undefined.
            rare = np.flatnonzero((clips_C > 0) & (clips_C < few))
            yield RareClasses(
                split=split,
                label_set=label_set,
                none=tuple(names[clips_C == 0]),
                few=tuple((names[i], int(clips_C[i])) for i in rare),
            )


def _train_eval_shift(rows: AuditedClips, labels: _AuditedLabels, top: int) -> TrainEvalShift | None:
    held_out_S = rows.held_out_S
    if held_out_S.all() or not held_out_S.any():
        return None

    # Clips of each class, and labelled clips, on both sides.
    clips_SC = labels.clips_SC["raw"]
    train_C = clips_SC[~held_out_S].sum(0)
    held_out_C = clips_SC[held_out_S].sum(0)
    train_clips = int(labels.labelled_S[~held_out_S].sum())
    held_out_clips = int(labels.labelled_S[held_out_S].sum())

    # Class by class, and all classes together.
    shifts, shifts_in_all = find_class_shifts(
        train_C, held_out_C, train_clips, held_out_clips, rows.classes.names, top=top
    )
    train_share_C = train_C / max(train_C.sum(), 1)
    held_out_share_C = held_out_C / max(held_out_C.sum(), 1)
    names = np.array(rows.classes.names, object)
    return TrainEvalShift(
        trained=tuple(split for split in rows.splits if split not in rows.held_out_names),
        held_out=rows.held_out_names,
        only_trained=tuple(names[(train_C > 0) & (held_out_C == 0)]),
        only_held_out=tuple(names[(train_C == 0) & (held_out_C > 0)]),
        shift=float(abs(train_share_C - held_out_share_C).sum() / 2),
        shifts=shifts,
        shifts_in_all=shifts_in_all,
    )
