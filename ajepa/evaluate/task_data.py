"""Assignment: a task on a store: which clips are trained on and measured, and what their labels are there."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ajepa.evaluate.tasks import Task
from ajepa.recipes.finetune import Finetune
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.run import Json
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.loading.class_weights import balanced_weights
from pipeline.loading.sampling import FULL_SHUFFLE, RowOrder, Sampling, WeightedSampling
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import FOLD_PATTERN, probe_eval_splits, train_splits

SHOWN_CLASSES = 5  # names of classes in an error


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskData:
    """Rows and classes of a task on a store.

    merge_SC  which class of the task each class of the store is, 0 or 1; a row of zeros is no class of it
    left_out  good clips of the splits to measure that have no label of the task
    notes     what whoever trains should know
    """

    task: Task
    store: FeatureStore
    label_set: str
    classes: ClassList
    single: bool
    train_splits: tuple[str, ...]
    eval_splits: tuple[str, ...]
    train_N: np.ndarray
    eval_N: np.ndarray
    merge_SC: np.ndarray
    unlabelled_clips: int = 0
    notes: tuple[str, ...] = field(default=())

    def labels_NC(self, rows_N: np.ndarray, label_set: str | None = None) -> np.ndarray:
        """1 where a row has a class of the task, else 0, float32."""
        labels_NS = self.store.labels_BC(rows_N, label_set or self.label_set)
        return np.minimum(labels_NS @ self.merge_SC, 1.0)

    def identity(self) -> Json:
        """What is learnt from what: compared on resume, and needed to use what was learnt."""
        mean, std = self.store.mean_and_std(self.train_splits)
        told: Json = {
            "store_id": self.store.store_id,
            "spec_id": self.store.spec_id,
            "mel": self.store.spec.to_json(),
            "mean": mean,
            "std": std,
            "task": self.task.name,
            "kind": "single" if self.single else "multi",
            "label_set": self.label_set,
            "train_splits": list(self.train_splits),
            "eval_splits": list(self.eval_splits),
            "classes": list(self.classes.mids),
        }
        if self.store.exclusions.digest is not None:
            told["excluded"] = self.store.exclusions.digest
        return told

    def order(self, recipe: Finetune, world: World = SINGLE_PROCESS) -> RowOrder:
        """Which clips come when to this rank, as the recipe samples them; InputError where there are too few."""
        rows_N = self.train_N
        sampling: Sampling = FULL_SHUFFLE
        if recipe.sampling == "repeated":
            rows_N = repeat_rare_rows(rows_N, self.labels_NC(rows_N))
        if recipe.sampling.startswith("balanced"):
            sampling = self._weighted_sampling(recipe, recipe.clips_per_epoch or len(rows_N))
        elif recipe.clips_per_epoch:
            raise RunError(f"recipe {recipe.name}: clips_per_epoch is for balanced sampling; set it to 0")
        return RowOrder(
            rows_N=rows_N,
            clips=world.clips_per_rank(recipe.clips_per_step),
            seed=recipe.seed,
            rank=world.rank,
            world=world.size,
            sampling=sampling,
        )

    def _weighted_sampling(self, recipe: Finetune, clips: int) -> Sampling:
        weights = balanced_weights(self.store, self.train_N, label_set=self.label_set, scheme=recipe.weights)
        return WeightedSampling(
            weights_N=weights.weights_N, clips_per_epoch=clips, replacement=recipe.sampling != "balanced-once"
        )


def select_task_data(
    task: Task, store: FeatureStore, *, label_set: str = "raw", fold: int | None = None
) -> TaskData:
    """The task on the store; `fold` where it has such. RunError or StoreError names what does not fit."""
    refuse_other_classes(task, store)
    train, measured = task_splits(task, store, fold)
    train_N, eval_N = store.good_rows(train), store.good_rows(measured)
    classes, merge_SC = task_classes(task, store, train_N, label_set)
    kept, notes = [], []
    for rows_N, splits, what in ((train_N, train, "train on"), (eval_N, measured, "measure")):
        count_N = (store.labels_BC(rows_N, label_set) @ merge_SC > 0).sum(axis=1)
        kept.append(rows_N[count_N > 0])
        if not len(kept[-1]):
            told = f"no clip of {' + '.join(splits)} has a label of the task"
            raise RunError(
                f"{store.location}: nothing to {what}: {told}; see: ajepa-data report {store.location}"
            )
        if len(kept[-1]) < len(rows_N):
            left, where = len(rows_N) - len(kept[-1]), " + ".join(splits)
            notes.append(f"{left} clips of {where} have no label of the task and are left out")
    if task.classes is None and len(classes) < len(store.classes):
        notes.append(f"{len(classes)} of the store's {len(store.classes)} classes have a clip to train on")
    made = TaskData(
        task=task,
        store=store,
        label_set=label_set,
        classes=classes,
        single=False,
        train_splits=train,
        eval_splits=measured,
        train_N=kept[0],
        eval_N=kept[1],
        merge_SC=merge_SC,
        unlabelled_clips=len(eval_N) - len(kept[1]),
        notes=tuple(notes),
    )
    return with_label_kind(made)


def task_splits(task: Task, store: FeatureStore, fold: int | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which splits are trained on, and which are measured; RunError where the store has them not."""
    there = sorted(store.manifest["split"].unique())
    if folds := task_folds(task, store):
        name = f"fold{fold}"
        if name not in folds:
            raise RunError(f"{store.location}: fold {fold}: expected one of 1 to {len(folds)}")
        return tuple(split for split in folds if split != name), (name,)
    if fold is not None:
        raise RunError(
            f"{store.location}: --fold {fold}: its splits are {', '.join(there)}, task {task.name} has no folds"
        )
    for split in (*task.train_splits, *task.eval_splits):
        if split not in there:
            told = f"no split {split}, it has {', '.join(there)}"
            raise RunError(
                f"{store.location}: task {task.name} needs {told}; build it from the task's own lists"
            )
    measured = task.eval_splits or tuple(probe_eval_splits(store))
    train = task.train_splits or tuple(split for split in train_splits(store) if split not in measured)
    return train, measured


def task_folds(task: Task, store: FeatureStore) -> tuple[str, ...]:
    """The splits to cross-validate over, if it is to be; RunError where a task has folds and the store other splits."""
    there = sorted(store.manifest["split"].unique(), key=lambda split: (len(split), split))
    if task.fold_count:
        wanted = [f"fold{number}" for number in range(1, task.fold_count + 1)]
        if there != wanted:
            told = f"needs the splits {wanted[0]} to {wanted[-1]}, it has {', '.join(there)}"
            raise RunError(f"{store.location}: task {task.name} {told}; build it from the task's own lists")
        return tuple(wanted)
    all_folds = (
        task.classes is None and len(there) > 1 and all(FOLD_PATTERN.fullmatch(split) for split in there)
    )
    return tuple(there) if all_folds else ()


def task_classes(
    task: Task, store: FeatureStore, train_N: np.ndarray, label_set: str
) -> tuple[ClassList, np.ndarray]:
    """The task's classes, and which of them each of the store's is, `merge_SC`; RunError where no clip has one."""
    held = store.classes
    if task.classes is None:
        class_S = np.flatnonzero(store.labels_BC(train_N, label_set).any(axis=0))
        if not len(class_S):
            raise RunError(
                f"{store.location}: no clip to train on has a label; build the store from labelled clips"
            )
        names = zip(*((held.mids[index], held.names[index]) for index in class_S), strict=True)
        mids, spoken = names
        return ClassList(mids=mids, names=spoken), np.eye(len(held), dtype=np.float32)[:, class_S]
    if not task.distinct_classes:
        place_C = [held.index_of[mid] for mid in task.classes.mids]
        return task.classes, np.eye(len(held), dtype=np.float32)[:, place_C]
    mids = (*task.distinct_classes, task.other_class)
    merge_SC = np.zeros((len(held), len(mids)), np.float32)
    for index, mid in enumerate(held.mids):
        merge_SC[index, mids.index(mid) if mid in task.distinct_classes else -1] = 1.0
    return ClassList(mids=mids, names=mids), merge_SC


def refuse_other_classes(task: Task, store: FeatureStore) -> None:
    """RunError where the store's class list is not the task's: how many both have, and what is missing."""
    if task.classes is None:
        return
    wanted, held = task.classes.mids, store.classes.mids
    missing, more = (
        [c for c in one if c not in set(other)] for one, other in ((wanted, held), (held, wanted))
    )
    if not missing and not more:
        return
    told = [
        f"{len(odd)} of {whose} are {what}, such as {', '.join(odd[:SHOWN_CLASSES])}"
        for odd, whose, what in (
            (missing, "the task's", "missing"),
            (more, "the store's", "none of the task"),
        )
        if odd
    ]
    raise RunError(
        f"{store.location}: task {task.name} has {len(wanted)} classes, the store {len(held)}: {'; '.join(told)}; "
        "use --task own for other labels"
    )


def with_label_kind(task_data: TaskData) -> TaskData:
    """The assignment with `single` decided; RunError where the task has one class to a clip and a clip has more."""
    if task_data.task.kind == "multi":
        return task_data
    rows_N = np.concatenate([task_data.train_N, task_data.eval_N])
    labels_NC = task_data.labels_NC(rows_N)
    several_N = rows_N[labels_NC.sum(axis=1) > 1]
    if len(several_N) and task_data.task.kind == "single":
        clip_id = task_data.store.manifest["clip_id"][int(several_N[0])]
        told = f"{len(several_N)} clips have several labels, such as {clip_id}"
        raise RunError(
            f"{task_data.store.location}: task {task_data.task.name} has one class to a clip, but {told}"
        )
    return TaskData(
        **{name: getattr(task_data, name) for name in task_data.__slots__} | {"single": not len(several_N)}
    )


def repeat_rare_rows(rows_N: np.ndarray, labels_NC: np.ndarray) -> np.ndarray:
    """The rows of each class again and again until they are half as many as those of the largest class."""
    class_N = labels_NC.argmax(axis=1)
    least = int(np.bincount(class_N).max()) // 2
    return np.concatenate(list(_rows_of_each_class(rows_N, class_N, least)))


def _rows_of_each_class(rows_N: np.ndarray, class_N: np.ndarray, min_rows: int) -> Iterator[np.ndarray]:
    for index in np.unique(class_N):
        mine_N = rows_N[class_N == index]
        yield np.resize(mine_N, max(min_rows, len(mine_N)))
