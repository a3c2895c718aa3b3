"""The study of label propagation: every model trained on raw and on propagated labels, and measured on both.

Each training is a run of its own under OUT/runs, and its scores are kept beside it. A study that is run again trains
and measures only what is missing, and has the same result.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ajepa.evaluate.classifier_scores import classifier_logits_NC
from ajepa.evaluate.metrics import mean_average_precision
from ajepa.evaluate.tasks import Task
from ajepa.finetune.finetune import finetune
from ajepa.finetune.hlp_result import (
    FSD50K_LABELS,
    POSTHOC_SCORES,
    PROPAGATED_LABELS,
    RAW_LABELS,
    HlpResult,
    HlpScore,
    HlpTraining,
)
from ajepa.recipes.catalogue import recipe_to_json
from ajepa.recipes.finetune import Finetune
from ajepa.training.devices import pick_device
from ajepa.training.distributed import world_from_environment
from ajepa.training.run import Json, Run
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.errors import RunError
from pipeline.files import replacing_file
from pipeline.labels.label_sets import label_set_ontology
from pipeline.labels.ontology import ClassMap
from pipeline.labels.propagation import propagate_scores, rule_relation_CC
from pipeline.messages import print_to_stderr
from pipeline.progress import track_progress
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import probe_eval_splits, train_splits
from pipeline.tables import read_table

HLP_STUDY_FILE = "hlp-study.json"

HLP_SCORES_FILE = "hlp-scores.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HlpStudy:
    """The recipes to compare, by name, the stores of the same clips that they need, and the number of seeds.

    stores   one for each mel spec that the recipes need
    rule     the label set of the stores that is the propagated one
    fsd50k   stores of FSD50K, again one for each mel spec; none: no transfer is measured
    """

    recipes: dict[str, Finetune]
    stores: tuple[FeatureStore, ...]
    seeds: int = 3
    rule: str = "unambiguous"
    fsd50k: tuple[FeatureStore, ...] = ()

    def __post_init__(self) -> None:
        # Every recipe finds its features, and some of its classes in FSD50K.
        for recipe in self.recipes.values():
            store_of_recipe(recipe, self.stores)
            if self.fsd50k:
                ClassMap(source=self.stores[0].classes, target=store_of_recipe(recipe, self.fsd50k).classes)

        # All stores have both label sets, the same classes and the same clips.
        first = self.stores[0]
        for store in self.stores:
            if self.rule not in store.label_sets:
                raise RunError(
                    f"{store.location}: has no label set {self.rule}, it has {', '.join(store.label_sets)}; "
                    f"make it with: ajepa-data propagate-labels {store.location} --rule {self.rule}"
                )
            if store.classes.mids != first.classes.mids:
                raise RunError(f"{store.location}: its classes are not those of {first.location}")
            if has_other_clips(store, first):
                raise RunError(
                    f"{store.location}: its clips are not those of {first.location}; build both at once"
                )

    def label_set_of_arm(self, arm: str) -> str:
        """The stores' label set that an arm is trained on."""
        return self.rule if arm == PROPAGATED_LABELS else RAW_LABELS

    def planned_trainings(self) -> Iterator[tuple[str, str, int]]:
        """Yield every model, arm and seed to train: a seed of all models before the next seed."""
        for seed in range(self.seeds):
            for model in self.recipes:
                for arm in (RAW_LABELS, PROPAGATED_LABELS):
                    yield model, arm, seed


def run_hlp_study(
    study: HlpStudy,
    out: Path,
    *,
    device: str = "auto",
    loader: Literal["dali", "plain"] = "dali",
    progress: bool = False,
    say: Callable[[str], None] = print_to_stderr,
) -> HlpResult:
    """Train and measure whatever is missing under `out`; the result, which is also kept as OUT/hlp-study.json.

    A study is interrupted and carried on as a run of `pretrain` is. RunError or StoreError where stores and recipes
    do not fit.
    """
    if world_from_environment().size > 1:
        raise RunError("hlp-study is one process for all its runs: start it without torchrun")

    # Train and measure, one run after the other.
    trainings: list[HlpTraining] = []
    planned = list(study.planned_trainings())
    for model, arm, seed in track_progress(
        planned, len(planned), label="study", unit="training", shown=progress
    ):
        recipe = replace(study.recipes[model], seed=seed)
        label_set = study.label_set_of_arm(arm)
        run = finetune(
            store_of_recipe(recipe, study.stores),
            hlp_study_task(study.stores[0]),
            recipe,
            out / "runs" / f"{model}-{label_set}-seed{seed}",
            label_set=label_set,
            device=device,
            loader=loader,
            progress=progress,
            say=say,
        )
        trainings += load_or_measure_trainings(study, run, model, arm, device)

    # Put the scores together.
    result = assemble_hlp_result(study, trainings)
    with replacing_file(out / HLP_STUDY_FILE) as scratch:
        scratch.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
    return result


def hlp_study_task(store: FeatureStore) -> Task:
    """The task of all classes of a store, several to a clip, so that all arms have the same head."""
    eval_splits = tuple(probe_eval_splits(store))
    return Task(
        name="hlp-study",
        recipe="",
        kind="multi",
        classes=store.classes,
        train_splits=tuple(split for split in train_splits(store) if split not in eval_splits),
        eval_splits=eval_splits,
    )


def load_or_measure_trainings(
    study: HlpStudy, run: Run, model: str, arm: str, device: str
) -> list[HlpTraining]:
    """The scores of a finished run: those in RUN/hlp-scores.json if they are still right, else measured and kept."""
    dependencies = score_dependencies(study, run)
    scores_file = run.path / HLP_SCORES_FILE
    if scores_file.is_file():
        record = json.loads(scores_file.read_text())
        if record["of"] == dependencies:
            return [HlpTraining.from_json(training) for training in record["trainings"]]

    trainings = list(measure_trainings(study, run, model, arm, device))
    record = {"of": dependencies, "trainings": [asdict(training) for training in trainings]}
    with replacing_file(scores_file) as scratch:
        scratch.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return trainings


def score_dependencies(study: HlpStudy, run: Run) -> Json:
    """Everything that scores depend on beside the run's own recipe and store."""
    return {"step": run.newest_step, "rule": study.rule, "fsd50k": [store.store_id for store in study.fsd50k]}


def measure_trainings(study: HlpStudy, run: Run, model: str, arm: str, device: str) -> Iterator[HlpTraining]:
    """Yield a run's scores by raw and by propagated labels; of an arm on raw labels also with propagated scores."""
    # Logits of the held-out clips, and of FSD50K's.
    recipe = study.recipes[model]
    trained = TrainedRun.open(run)
    torch_device = pick_device(device)
    store = store_of_recipe(recipe, study.stores)
    rows_N = labelled_eval_rows(store)
    logits_NC = classifier_logits_NC(trained, store, rows_N, torch_device)
    transfer_NC = None
    if study.fsd50k:
        fsd50k = store_of_recipe(recipe, study.fsd50k)
        fsd50k_N = labelled_eval_rows(fsd50k)
        transfer_NC = classifier_logits_NC(trained, fsd50k, fsd50k_N, torch_device)

    arms = [arm, POSTHOC_SCORES] if arm == RAW_LABELS else [arm]
    for name in arms:
        # Instead of the labels, the scores are propagated.
        if name == POSTHOC_SCORES:
            adds_CC = added_classes_CC(store, study.rule)
            logits_NC = propagate_scores(logits_NC, adds_CC)
            if transfer_NC is not None:
                transfer_NC = propagate_scores(transfer_NC, adds_CC)

        # Score by both kinds of labels, and by FSD50K's on the classes that it shares.
        scores = [
            score_by_labels(labels, store.labels_BC(rows_N, study.label_set_of_arm(labels)), logits_NC)
            for labels in (RAW_LABELS, PROPAGATED_LABELS)
        ]
        if transfer_NC is not None:
            class_map = ClassMap(source=store.classes, target=fsd50k.classes)
            shared_N = class_map.target_N
            labels_NT = fsd50k.labels_BC(fsd50k_N, RAW_LABELS)
            scores_NT = class_map.map_scores(transfer_NC, absent_score=-np.inf)
            scores.append(score_by_labels(FSD50K_LABELS, labels_NT[:, shared_N], scores_NT[:, shared_N]))
        yield HlpTraining(model=model, arm=name, seed=run.recipe["seed"], scores=tuple(scores))


def added_classes_CC(store: FeatureStore, rule: str) -> np.ndarray:
    """The classes that each class of a store adds by a rule, bool `CC`, by the ontology of the store's label set."""
    digest = read_table(store.path / "labels.parquet")[1][rule]["ontology"]
    ontology = label_set_ontology(store.path, rule, digest)
    return rule_relation_CC(rule, ontology=ontology, classes=store.classes)


def labelled_eval_rows(store: FeatureStore) -> np.ndarray:
    """The good clips of the splits to measure that have a raw label."""
    rows_N = store.good_rows(probe_eval_splits(store))
    return rows_N[store.labels_BC(rows_N, RAW_LABELS).any(axis=1)]


def score_by_labels(labels: str, labels_NC: np.ndarray, logits_NC: np.ndarray) -> HlpScore:
    """The mAP of logits against one kind of labels."""
    result = mean_average_precision(labels_NC, logits_NC)
    per_class = tuple(float(value) if np.isfinite(value) else None for value in result.per_class_C)
    return HlpScore(labels=labels, map=result.value, chance=result.chance, per_class=per_class)


def assemble_hlp_result(study: HlpStudy, trainings: list[HlpTraining]) -> HlpResult:
    """The result with its protocol: what was trained on which clips, and how many labels propagation adds there."""
    # Clips of each class, of all clips to train on.
    store = study.stores[0]
    train_N = store.good_rows(hlp_study_task(store).train_splits)
    train_N = train_N[store.labels_BC(train_N, RAW_LABELS).any(axis=1)]
    before_C, after_C = (
        store.labels_BC(train_N, label_set).sum(axis=0).astype(int).tolist()
        for label_set in (RAW_LABELS, study.rule)
    )

    protocol: Json = {
        "stores": [store.store_id for store in study.stores],
        "rule": study.rule,
        "seeds": list(range(study.seeds)),
        "train_clips": len(train_N),
        "eval_clips": len(labelled_eval_rows(store)),
        "recipes": {name: recipe_to_json(recipe) for name, recipe in study.recipes.items()},
        "fsd50k": [store.store_id for store in study.fsd50k],
    }
    return HlpResult(
        protocol=protocol,
        classes=store.classes.names,
        clips_before=tuple(before_C),
        clips_after=tuple(after_C),
        trainings=tuple(trainings),
    )


def store_of_recipe(recipe: Finetune, stores: tuple[FeatureStore, ...]) -> FeatureStore:
    """The store that holds a recipe's features, its clips of any length; RunError where none does."""
    wanted_spec = preset_mel_spec(recipe.mel)
    for store in stores:
        if store.spec.same_front_end(wanted_spec):
            return store
    there_are = ", ".join(f"{store.location} ({store.spec.name})" for store in stores)
    raise RunError(
        f"recipe {recipe.name} needs mel spec {recipe.mel}, there is {there_are}; give a store of it with --store"
    )


def has_other_clips(store: FeatureStore, other: FeatureStore) -> bool:
    """Whether two stores differ in their clips, or in the splits or raw labels of these."""
    clips, other_clips = (each.manifest.select("clip_id", "split") for each in (store, other))
    labels, other_labels = (each.flat_labels(RAW_LABELS)[0] for each in (store, other))
    return not clips.equals(other_clips) or not np.array_equal(labels, other_labels)
