"""EvaluationProtocol: the settings behind an evaluation, enough to tell whether two evaluations may be compared."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ajepa.evaluate.metrics import CONFIDENCE_LEVEL
from ajepa.evaluate.overlap import TrainingOverlap
from ajepa.training.run import Json, Run, software_versions
from ajepa.training.trained_run import INITIAL_CHECKPOINT
from pipeline.store.feature_store import FeatureStore

METRIC_NOTES: Json = {
    "map": "macro, classes without an eval clip skipped",
    "accuracy": "share of the clips whose highest score is that of their class",
    "clips": "good clips of the eval splits that have a label of the classes measured",
    "folds_mean": "every metric is computed within a fold, then averaged",
    "intervals": (
        "clips drawn again within each fold; percentiles moved to lie about the value; "
        "accuracy 0 or 1: exact binomial interval (Clopper-Pearson)"
    ),
    "confidence": CONFIDENCE_LEVEL,
}

# Keys in which two results must agree for one to replace the other; step and device, for example, may differ.
COMPARED_KEYS = (
    "store_id",
    "excluded",
    "checkpoint",
    "eval_splits",
    "folds",
    "kind",
    "classifier",
    "probes",
)

# Keys that decide, with the settings of the probes, the scores of a random encoder and of log-mel statistics.
BASELINE_KEYS = (
    *(
        "run",
        "recipe",
        "seed",
        "trained_on",
        "store_id",
        "excluded",
        "eval_splits",
        "eval_clips",
        "folds",
        "kind",
    ),
    *("resamples", "device", "precision", "versions"),
)

# Key under `probes`: a result may be replaced by a result of the same and additional probes.
PROBE_NAMES_KEY = "names"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierTraining:
    """How a classifier was trained before it was measured.

    start         step and digest of the encoder that training started from; None: from random weights
    ema           decay of the moving average of the weights; 0: none is kept
    train_clips   number of clips that trained the classifier; None: not recorded
    class_count   number of classes of the classifier; an evaluation on another store may measure fewer
    views         how a whole clip is cut to the model's length, in words
    """

    task: str
    kind: str
    label_set: str
    start: Json | None
    ema: float
    clips_per_step: int
    train_splits: tuple[str, ...]
    train_clips: int | None
    class_count: int
    views: str

    def to_json(self) -> Json:
        """The value under `classifier` in evaluation.json."""
        return {
            "task": self.task,
            "kind": self.kind,
            "label_set": self.label_set,
            "from": self.start,
            "ema": self.ema,
            "clips_per_step": self.clips_per_step,
            "train_splits": list(self.train_splits),
            "train_clips": self.train_clips,
            "classes": self.class_count,
            "views": self.views,
        }

    @classmethod
    def from_json(cls, record: Json) -> "ClassifierTraining":
        return cls(
            task=record["task"],
            kind=record["kind"],
            label_set=record["label_set"],
            start=record["from"],
            ema=record["ema"],
            clips_per_step=record["clips_per_step"],
            train_splits=tuple(record["train_splits"]),
            train_clips=record["train_clips"],
            class_count=record["classes"],
            views=record["views"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeTraining:
    """How probes were trained on frozen features, and on which clips.

    grid       the encoder's patches: rows, columns, frames and bands of a patch
    val_share  share of the train clips that selected settings; None: the val splits selected them
    notes      settings of every probe, in words
    """

    names: tuple[str, ...]
    pooling: str
    layer: str
    grid: Json
    train_splits: tuple[str, ...]
    val_splits: tuple[str, ...]
    train_clips: int
    val_clips: int
    val_share: float | None
    notes: Json

    def to_json(self) -> Json:
        """The value under `probes` in evaluation.json; each note is a key next to the settings."""
        return {
            "names": list(self.names),
            "pooling": self.pooling,
            "layer": self.layer,
            "grid": self.grid,
            "train_splits": list(self.train_splits),
            "val_splits": list(self.val_splits),
            "train_clips": self.train_clips,
            "val_clips": self.val_clips,
            "val_share": self.val_share,
            **self.notes,
        }

    @classmethod
    def from_json(cls, record: Json) -> "ProbeTraining":
        settings = {part.name: record[part.name] for part in fields(cls) if part.name != "notes"}
        lists = {name: tuple(record[name]) for name in ("names", "train_splits", "val_splits")}
        notes = {name: value for name, value in record.items() if name not in settings}
        return cls(**(settings | lists), notes=notes)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationProtocol:
    """The run, the clips and the settings of an evaluation; `to_json` is its form in evaluation.json.

    seed               seed of the run's recipe, which also draws the resamples
    checkpoint         requested checkpoint: last, best, init or a step; init names a warm start (`describe_checkpoint`)
    chosen_by          what chose that checkpoint, in words; None: the result is of format 3, which did not say
    weights_name       part of the checkpoint that is measured
    weights_sha256     digest of these weights; with folds, one digest per fold
    task               task that the run was fine-tuned on; None: the run was only pre-trained
    training_store_id  id of the store that the run was trained on
    store_name         file name of the measured store
    exclusions         digest of the clips that are excluded from the measured store; None: no clip is excluded
    unlabelled_clips   number of good clips of the eval splits that have no label of the measured classes
    folds              number of folds that the scores are means over; 0: no folds
    kind               requested number of labels per clip: auto, single or multi
    labels             digest of the clips' labels in each label set that probes are trained on; empty: not recorded
    metric_notes       definition of every metric, in words
    classifier         training of the measured classifier; None: only probes are measured
    probes             training of the measured probes; None: only a classifier is measured
    device             device of the evaluation, cpu or cuda
    precision          numbers that the network computed in, fp32, bf16 or fp16; heads, probes and metrics are fp32 in
                       all of them. None: the result is of format 3, which did not say
    training_overlap   number of measured clips whose sound trained the run; None: not known
    """

    # The run, and its weights at a checkpoint
    run_path: str
    recipe_name: str
    seed: int
    step: int
    checkpoint: str
    chosen_by: str | None
    weights_name: str
    weights_sha256: str | tuple[str, ...]

    # The run's training data, and the software versions of its training
    task: str | None
    training_store_id: str
    training_versions: Json

    # The store, and which of its clips are measured
    store_name: str
    store_id: str
    exclusions: str | None
    eval_splits: tuple[str, ...]
    eval_clips: int
    unlabelled_clips: int

    # The settings of the measurement
    folds: int
    kind: str
    labels: Json = field(default_factory=dict)
    metric_notes: Json = field(default_factory=METRIC_NOTES.copy)
    resamples: int
    classifier: ClassifierTraining | None
    probes: ProbeTraining | None

    # The device and the software versions of the evaluation
    device: str
    precision: str | None
    versions: Json

    training_overlap: TrainingOverlap | None = None

    def to_json(self) -> Json:
        """The protocol as stored in evaluation.json; the keys are the same for classifiers and probes."""
        digests = self.weights_sha256
        overlap = self.training_overlap
        return {
            # The run
            "run": self.run_path,
            "recipe": self.recipe_name,
            "seed": self.seed,
            "step": self.step,
            "checkpoint": self.checkpoint,
            "chosen_by": self.chosen_by,
            "weights": self.weights_name,
            "weights_sha256": digests if isinstance(digests, str) else list(digests),
            "task": self.task,
            "trained_on": self.training_store_id,
            "trained_with": self.training_versions,
            # The store
            "store": self.store_name,
            "store_id": self.store_id,
            "excluded": self.exclusions,
            "eval_splits": list(self.eval_splits),
            "eval_clips": self.eval_clips,
            "left_out": self.unlabelled_clips,
            **({} if overlap is None else {"training_overlap": overlap.to_json()}),
            # The measurement
            "folds": self.folds,
            "kind": self.kind,
            "labels": self.labels,
            **self.metric_notes,
            "resamples": self.resamples,
            "classifier": self.classifier and self.classifier.to_json(),
            "probes": self.probes and self.probes.to_json(),
            "device": self.device,
            "precision": self.precision,
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, record: Json) -> "EvaluationProtocol":
        """The protocol that `to_json` wrote; KeyError where a key is missing."""
        digests = record["weights_sha256"]
        classifier = record["classifier"]
        probes = record["probes"]
        overlap = record.get("training_overlap")
        return cls(
            # The run
            run_path=record["run"],
            recipe_name=record["recipe"],
            seed=record["seed"],
            step=record["step"],
            checkpoint=record["checkpoint"],
            chosen_by=record.get("chosen_by"),
            weights_name=record["weights"],
            weights_sha256=digests if isinstance(digests, str) else tuple(digests),
            task=record["task"],
            training_store_id=record["trained_on"],
            training_versions=record["trained_with"],
            # The store
            store_name=record["store"],
            store_id=record["store_id"],
            exclusions=record["excluded"],
            eval_splits=tuple(record["eval_splits"]),
            eval_clips=record["eval_clips"],
            unlabelled_clips=record["left_out"],
            # The measurement
            folds=record["folds"],
            kind=record["kind"],
            labels=record.get("labels", {}),
            metric_notes={name: record[name] for name in METRIC_NOTES if name in record},
            resamples=record["resamples"],
            classifier=classifier and ClassifierTraining.from_json(classifier),
            probes=probes and ProbeTraining.from_json(probes),
            device=record["device"],
            precision=record.get("precision"),
            versions=record["versions"],
            training_overlap=overlap and TrainingOverlap.from_json(overlap),
        )

    def gives_same_baselines(self, requested: "EvaluationProtocol") -> bool:
        """Whether a requested evaluation of the same run gives the same scores of what is not trained, to the bit."""
        old_record = self.to_json()
        new_record = requested.to_json()
        if self.probes is None or requested.probes is None:
            return False
        same_probes = replace(self.probes, names=()) == replace(requested.probes, names=())
        return same_probes and all(old_record[key] == new_record[key] for key in BASELINE_KEYS)

    def differences(self, requested: "EvaluationProtocol") -> list[str]:
        """The settings in which a requested protocol differs from this one, each as `setting: old, now new`.

        Only settings that change the measurement count, not steps, versions, devices or additional probes.
        """
        old_record = self.to_json()
        new_record = requested.to_json()
        before = {key: old_record[key] for key in COMPARED_KEYS}
        after = {key: new_record[key] for key in COMPARED_KEYS}
        return [
            f"{key}: {describe_setting(old)}, now {describe_setting(new)}"
            for key, old, new in protocol_differences(before, after)
        ]


def build_protocol(
    run: Run,
    store: FeatureStore,
    *,
    step: int,
    weights: dict[str, Tensor],
    weights_name: str,
    eval_splits: Sequence[str],
    eval_clips: int,
    unlabelled_clips: int,
    resamples: int,
    device: str,
    precision: str,
    chosen_by: str | None,
    checkpoint: str | int = "last",
    kind: str = "auto",
    labels: Json | None = None,
    folds: int = 0,
    classifier: ClassifierTraining | None = None,
    probes: ProbeTraining | None = None,
    overlap: TrainingOverlap | None = None,
) -> EvaluationProtocol:
    """The protocol of an evaluation of these weights on a store; EvaluationProtocol's fields explain the parameters."""
    return EvaluationProtocol(
        # The run
        run_path=str(run.path),
        recipe_name=run.recipe["name"],
        seed=run.recipe["seed"],
        step=step,
        checkpoint=describe_checkpoint(run, checkpoint),
        chosen_by=chosen_by,
        weights_name=weights_name,
        weights_sha256=weights_digest(weights),
        task=None if run.identity.task_identity is None else run.identity.task_identity.task,
        training_store_id=run.identity.store_id,
        training_versions=run.versions,
        # The store
        store_name=Path(store.location).name,
        store_id=store.store_id,
        exclusions=store.exclusions.digest,
        eval_splits=tuple(eval_splits),
        eval_clips=eval_clips,
        unlabelled_clips=unlabelled_clips,
        # The measurement
        folds=folds,
        kind=kind,
        labels=labels or {},
        resamples=resamples,
        classifier=classifier,
        probes=probes,
        device=device,
        precision=precision,
        versions=software_versions(),
        training_overlap=overlap,
    )


def describe_checkpoint(run: Run, checkpoint: str | int) -> str:
    """The requested checkpoint in words: `init` of a warm-started run is no random encoder, which is said here."""
    if checkpoint == INITIAL_CHECKPOINT and run.warm_start is not None:
        return f"{checkpoint}, the warm start from {run.warm_start['location']}"
    return str(checkpoint)


def count_folds(folds: Sequence[object]) -> int:
    """The number of folds that the scores are means over; a single entry is not cross-validated and counts as 0."""
    return len(folds) if len(folds) > 1 else 0


def weights_digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors, independent of the file that stores them."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)} ".encode())
        digest.update(weights[name].contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_training_store(run: Run, store: FeatureStore) -> bool:
    """Whether the run was trained on this store, alone or among others."""
    return store.store_id in {run.identity.store_id, *run.identity.stores}


def protocol_differences(stored: Json, requested: Json, prefix: str = "") -> list[tuple[str, object, object]]:
    """Every setting that differs, as dotted key, old value and new value; additional probes do not count."""
    changes: list[tuple[str, object, object]] = []
    for key in dict.fromkeys([*stored, *requested]):
        old = stored.get(key)
        new = requested.get(key)

        # Nested settings are named by their path
        if isinstance(old, dict) and isinstance(new, dict):
            changes += protocol_differences(old, new, f"{prefix}{key}.")
        elif old != new and not (key == PROBE_NAMES_KEY and set(old or ()) <= set(new or ())):
            changes.append((f"{prefix}{key}", old, new))
    return changes


def describe_setting(value: object) -> str:
    """A setting in a few words."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "some"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
