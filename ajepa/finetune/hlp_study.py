"""The study of label propagation: every model trained on raw and on propagated labels, and measured on both.

Each training is a run of its own under OUT/runs; what it scored is kept beside it. Run again, the study trains and
measures only what is missing, and says the same.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from ajepa.evaluate.classifier_scores import classifier_logits_NC
from ajepa.evaluate.metrics import mean_average_precision
from ajepa.evaluate.tasks import Task
from ajepa.finetune.finetune import finetune
from ajepa.finetune.hlp_result import (
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
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import probe_eval_splits, train_splits
from pipeline.tables import read_table

HLP_STUDY_FILE, HLP_SCORES_FILE = "hlp-study.json", "hlp-scores.json"

FSD50K_LABELS = "FSD50K"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HlpStudy:
    """What is compared: some recipes by name, on stores of the same clips, with so many seeds.

    stores   one for each mel spec that the recipes need
    rule     which label set of the stores is the propagated one
    fsd50k   stores of FSD50K, again one for each mel spec; none: no transfer is measured
    """

    recipes: dict[str, Finetune]
    stores: tuple[FeatureStore, ...]
    seeds: int = 3
    rule: str = "unambiguous"
    fsd50k: tuple[FeatureStore, ...] = ()

    def __post_init__(self) -> None:
        for recipe in self.recipes.values():
            store_of_recipe(recipe, self.stores)
            if self.fsd50k:
                ClassMap(source=self.stores[0].classes, target=store_of_recipe(recipe, self.fsd50k).classes)
        for store in self.stores:
            if self.rule not in store.label_sets:
                raise RunError(
                    f"{store.location}: has no label set {self.rule}, it has {', '.join(store.label_sets)}; "
                    f"make it with: ajepa-data propagate-labels {store.location} --rule {self.rule}"
                )
            if store.classes.mids != self.stores[0].classes.mids:
                raise RunError(f"{store.location}: its classes are not those of {self.stores[0].location}")
            if has_other_clips(store, self.stores[0]):
                raise RunError(
                    f"{store.location}: its clips are not those of {self.stores[0].location}; build both at once"
                )

    def label_set_of_arm(self, arm: str) -> str:
        return self.rule if arm == PROPAGATED_LABELS else RAW_LABELS

    def planned_trainings(self) -> Iterator[tuple[str, str, int]]:
        """Every model, arm and seed to train: a seed of all models before the next seed."""
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
    """Train and measure what is not yet under `out`; the result, kept as OUT/hlp-study.json.

    Interrupted and carried on as `pretrain` is. RunError or StoreError where stores and recipes do not fit.
    """
    if world_from_environment().size > 1:
        raise RunError("hlp-study is one process for all its runs: start it without torchrun")
    made: list[HlpTraining] = []
    todo = list(study.planned_trainings())
    for model, arm, seed in tqdm(todo, unit="training", disable=None if progress else True):
        recipe, name = (
            replace(study.recipes[model], seed=seed),
            f"{model}-{study.label_set_of_arm(arm)}-seed{seed}",
        )
        store = store_of_recipe(recipe, study.stores)
        run = finetune(
            store,
            hlp_study_task(study.stores[0]),
            recipe,
            out / "runs" / name,
            label_set=study.label_set_of_arm(arm),
            device=device,
            loader=loader,
            progress=progress,
            say=say,
        )
        made += measured(study, run, model, arm, device)
    result = assemble_hlp_result(study, made)
    with replacing_file(out / HLP_STUDY_FILE) as scratch:
        scratch.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
    return result


def hlp_study_task(store: FeatureStore) -> Task:
    """All classes of a store, several to a clip, whatever labels are trained on: so all arms have the same head."""
    load_or_measure = tuple(probe_eval_splits(store))
    train = tuple(split for split in train_splits(store) if split not in load_or_measure)
    return Task(
        name="hlp-study",
        recipe="",
        kind="multi",
        classes=store.classes,
        train_splits=train,
        eval_splits=load_or_measure,
    )


def measured(study: HlpStudy, run: Run, model: str, arm: str, device: str) -> list[HlpTraining]:
    """What a finished run scores, from RUN/hlp-scores.json where that was of the same; kept there if not."""
    told = score_dependencies(study, run)
    place = run.path / HLP_SCORES_FILE
    if place.is_file():
        kept = json.loads(place.read_text())
        if kept["of"] == told:
            return [HlpTraining.from_json(training) for training in kept["trainings"]]
    made = list(measure_trainings(study, run, model, arm, device))
    with replacing_file(place) as scratch:
        kept = {"of": told, "trainings": [asdict(training) for training in made]}
        scratch.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
    return made


def score_dependencies(study: HlpStudy, run: Run) -> Json:
    """What scores depend on beside the run's own recipe and store."""
    return {"step": run.newest_step, "rule": study.rule, "fsd50k": [store.store_id for store in study.fsd50k]}


def measure_trainings(study: HlpStudy, run: Run, model: str, arm: str, device: str) -> Iterator[HlpTraining]:
    """A run's scores by raw and by propagated labels; of one trained on raw ones also with propagated scores."""
    recipe, seed = study.recipes[model], run.recipe["seed"]
    store = store_of_recipe(recipe, study.stores)
    rows_N = labelled_eval_rows(store)
    trained = TrainedRun.open(run)
    on = pick_device(device)
    logits_NC = classifier_logits_NC(trained, store, rows_N, on)
    transfer_NC = labels_NT = None
    if study.fsd50k:
        other = store_of_recipe(recipe, study.fsd50k)
        other_N = labelled_eval_rows(other)
        transfer_NC, labels_NT = (
            classifier_logits_NC(trained, other, other_N, on),
            other.labels_BC(other_N, RAW_LABELS),
        )
    for name in (arm, POSTHOC_SCORES) if arm == RAW_LABELS else (arm,):
        if name == POSTHOC_SCORES:
            adds_CC = added_classes_CC(store, study.rule)
            logits_NC = propagate_scores(logits_NC, adds_CC)
            transfer_NC = None if transfer_NC is None else propagate_scores(transfer_NC, adds_CC)
        scores = [
            score_by_labels(labels, store.labels_BC(rows_N, study.label_set_of_arm(labels)), logits_NC)
            for labels in (RAW_LABELS, PROPAGATED_LABELS)
        ]
        if transfer_NC is not None and labels_NT is not None:
            classes = ClassMap(source=store.classes, target=store_of_recipe(recipe, study.fsd50k).classes)
            shared = classes.target_N
            mapped_NT = classes.map_scores(transfer_NC, absent_score=-np.inf)
            scores.append(score_by_labels(FSD50K_LABELS, labels_NT[:, shared], mapped_NT[:, shared]))
        yield HlpTraining(model=model, arm=name, seed=seed, scores=tuple(scores))


def added_classes_CC(store: FeatureStore, rule: str) -> np.ndarray:
    """What each class of a store adds by a rule, bool `CC`, with the ontology that its label set was made with."""
    digest = read_table(store.path / "labels.parquet")[1][rule]["ontology"]
    return rule_relation_CC(
        rule, ontology=label_set_ontology(store.path, rule, digest), classes=store.classes
    )


def labelled_eval_rows(store: FeatureStore) -> np.ndarray:
    """The good clips of the splits to measure that have a label."""
    rows_N = store.good_rows(probe_eval_splits(store))
    return rows_N[store.labels_BC(rows_N, RAW_LABELS).any(axis=1)]


def score_by_labels(labels: str, labels_NC: np.ndarray, logits_NC: np.ndarray) -> HlpScore:
    result = mean_average_precision(labels_NC, logits_NC)
    per_class = tuple(float(value) if np.isfinite(value) else None for value in result.per_class_C)
    return HlpScore(labels=labels, map=result.value, chance=result.chance, per_class=per_class)


def assemble_hlp_result(study: HlpStudy, trainings: list[HlpTraining]) -> HlpResult:
    """The result with its protocol: what was trained on what, and how much propagation adds there."""
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
    """The store that holds a recipe's features, clips of any length; RunError: none does."""
    wanted = preset_mel_spec(recipe.mel)
    for store in stores:
        if store.spec.same_front_end(wanted):
            return store
    held = ", ".join(f"{store.location} ({store.spec.name})" for store in stores)
    raise RunError(
        f"recipe {recipe.name} needs mel spec {recipe.mel}, there is {held}; give a store of it with --store"
    )


def has_other_clips(one: FeatureStore, other: FeatureStore) -> bool:
    """Whether two stores are not of the same clips with the same splits and labels."""
    same = one.manifest.select("clip_id", "split").equals(other.manifest.select("clip_id", "split"))
    return not same or not np.array_equal(one.flat_labels(RAW_LABELS)[0], other.flat_labels(RAW_LABELS)[0])
