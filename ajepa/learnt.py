"""Learnt: a classifier as a fine-tuned run left it, and what of any store it can be measured on."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ajepa.assignment import Assignment
from ajepa.classifier import ENCODER, Classifier, VitSpec
from ajepa.devices import precision
from ajepa.evaluation import EVALUATION
from ajepa.features import Views
from ajepa.finetune_recipes import FINETUNE_PIECES
from ajepa.finetuner import AVERAGE, CLASSIFIER
from ajepa.finetuning import Finetune
from ajepa.models import built
from ajepa.partition import FOLD
from ajepa.recipes import from_json
from ajepa.run import Json, Run
from ajepa.scores import Held, logits_of
from ajepa.stamp import is_own, protocol_in
from ajepa.tasks.catalogue import TASKS
from ajepa.training_set import eval_splits
from ajepa.vit import EncoderSpec
from pipeline.errors import RunError
from pipeline.ontology import ClassList
from pipeline.store import FeatureStore


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Learnt:
    """The weights that a fine-tuned run is measured by, at one of its checkpoints: their average where there is one."""

    run: Run
    recipe: Finetune
    step: int
    part: str
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, run: Run, at: str | int = "last") -> Self:
        """RunError where there is no such checkpoint."""
        recipe = from_json(run.recipe, FINETUNE_PIECES)
        part = AVERAGE if recipe.ema else CLASSIFIER
        loaded = run.load(part, at=at)
        return cls(run=run, recipe=recipe, step=loaded.step, part=part, weights=loaded.parts[part])

    def classifier(self, device: torch.device) -> Classifier:
        model = built(self.recipe.model, len(self.run.identity["classes"]), self.recipe.seed).to(device)
        model.load_state_dict(self.weights)
        return model

    def encoder(self) -> tuple[EncoderSpec, dict[str, Tensor]]:
        """Its encoder's shape and weights; RunError where it has none."""
        if not isinstance(self.recipe.model, VitSpec):
            told = f"its {type(self.recipe.model).__name__} has no encoder to probe"
            raise RunError(f"{self.run.path}: {told}; leave out --probe to measure the classifier itself")
        mine = {name: value for name, value in self.weights.items() if name.startswith(ENCODER)}
        return self.recipe.model.encoder, {name.removeprefix(ENCODER): value for name, value in mine.items()}

    def logits_NC(self, store: FeatureStore, rows_N: np.ndarray, device: torch.device) -> np.ndarray:
        """What it says of some clips of a store, whole, normalised as its own were."""
        mean, std = self.run.identity["mean"], self.run.identity["std"]
        views = Views(store=store, frames=self.recipe.model.frames, mean=mean, std=std)
        return logits_of(self.classifier(device), views, rows_N, device, bf16=precision(device)[0])

    def held(self, assignment: Assignment, device: torch.device) -> Held:
        """What the classifier says of the clips to measure, of the classes of the assignment alone."""
        logits_NC = self.logits_NC(assignment.store, assignment.eval_N, device)
        place_of = {mid: place for place, mid in enumerate(self.run.identity["classes"])}
        places = [place_of[mid] for mid in assignment.classes.mids]
        return Held(assignment=assignment, logits_NC=logits_NC[:, places])

    @property
    def train_clips(self) -> int | None:
        """On how many clips it was trained, if the run was measured at its end."""
        held = protocol_in(self.run.path / EVALUATION)
        return held["classifier"]["train_clips"] if held and held["classifier"] else None


def splits_of_run(run: Run, store: FeatureStore) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The splits that a fine-tuned run was trained and measured on, where they mean the same in this store.

    They do in its own, and where both are cut into the same folds; else None.
    """
    train, measured = (tuple(run.identity[name]) for name in ("train_splits", "eval_splits"))
    there = set(store.manifest["split"].unique())
    in_folds = all(FOLD.fullmatch(split) for split in (*train, *measured)) and {*train, *measured} <= there
    return (train, measured) if is_own(run, store) or in_folds else None


def held_out(run: Run, store: FeatureStore) -> Assignment:
    """What of a store a fine-tuned run's classifier is measured on: clips held out that have a class of both.

    Its own splits where `splits_of_run` has them; of another store those kept to measure on, or all folds.
    RunError where no class is of both, or no clip has one.
    """
    identity, mine = run.identity, splits_of_run(run, store)
    there = sorted(store.manifest["split"].unique())
    folds = tuple(there) if all(FOLD.fullmatch(split) for split in there) else ()
    train, measured = mine or ((), folds or tuple(eval_splits(store)))
    label_set = identity["label_set"] if identity["label_set"] in store.label_sets else "raw"
    classes, merge_SC = shared_classes(identity, store)
    kept, good = [], [store.good_rows(list(splits)) for splits in (train, measured)]
    for rows_N in good:
        kept.append(rows_N[(store.labels_BC(rows_N, label_set) @ merge_SC > 0).any(axis=1)])
    if not len(kept[1]):
        told = f"no clip of {' + '.join(measured)} has a class of {run.path}"
        raise RunError(f"{store.place}: nothing to measure: {told}; see: ajepa-data report {store.place}")
    return Assignment(
        task=TASKS.get(identity["task"], TASKS["own"]),
        store=store,
        label_set=label_set,
        classes=classes,
        single=identity["kind"] == "single",
        train_splits=train,
        eval_splits=measured,
        train_N=kept[0],
        eval_N=kept[1],
        merge_SC=merge_SC,
        left_out=len(good[1]) - len(kept[1]),
    )


def shared_classes(identity: Json, store: FeatureStore) -> tuple[ClassList, np.ndarray]:
    """The classifier's classes that a store has, in its order, and which of them each of the store's is, `SC`.

    A word that its task does not tell apart is of the one class for such. RunError where there is none.
    """
    held, mids = store.classes, identity["classes"]
    task = TASKS.get(identity["task"])
    others = task.others if task and task.told_apart else None
    merged = set(task.classes.mids) if task and task.classes else set()
    place_of = {mid: place for place, mid in enumerate(mids)}
    merge_SC = np.zeros((len(held), len(mids)), np.float32)
    for index, mid in enumerate(held.mids):
        if mid in place_of:
            merge_SC[index, place_of[mid]] = 1.0
        elif others is not None and mid in merged:
            merge_SC[index, place_of[others]] = 1.0
    shared_C = np.flatnonzero(merge_SC.any(axis=0))
    if not len(shared_C):
        raise RunError(
            f"{store.place}: none of its {len(held)} classes, such as {held.mids[0]}, is one of the classifier's "
            f"{len(mids)}, such as {mids[0]}; probe its encoder on them: --probe linear"
        )
    names = dict(zip(held.mids, held.names, strict=True))
    found = [mids[place] for place in shared_C]
    return ClassList(mids=tuple(found), names=tuple(names.get(mid, mid) for mid in found)), merge_SC[
        :, shared_C
    ]
