"""TaskData: a task on a store: its train clips, its eval clips, their labels, and the classes to learn."""

from dataclasses import dataclass, replace

import numpy as np

from ajepa.evaluate.tasks import Task
from ajepa.recipes.finetune import Finetune
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.run_identity import RunIdentity, StartCheckpoint, TaskIdentity
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList
from pipeline.loading.class_weights import balanced_weights
from pipeline.loading.sampling import FULL_SHUFFLE, RowOrder, Sampling, WeightedSampling
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import FOLD_PATTERN, probe_eval_splits, train_splits

SHOWN_CLASSES = 5  # names of classes in an error


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskData:
    """The rows and classes of a task on a store.

    classes           the task's classes, in the order of the head
    single            whether each clip has exactly one of the classes
    train_N, eval_N   rows that train the classifier and rows that measure it; each has a label of the task
    merge_SC          1 where class S of the store is class C of the task, else 0; a row of zeros: not in the task
    unlabelled_clips  number of good clips of the eval splits that have no label of the task
    notes             sentences for the user about clips and classes that are left out
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
    notes: tuple[str, ...] = ()

    def labels_NC(self, rows_N: np.ndarray, label_set: str | None = None) -> np.ndarray:
        """Labels of some rows, float32: 1 where a row has a class, else 0; by default in the trained label set."""
        labels_NS = self.store.labels_BC(rows_N, label_set or self.label_set)
        return np.minimum(labels_NS @ self.merge_SC, 1.0)

    def identity(self, start: StartCheckpoint | None = None) -> RunIdentity:
        """The identity of a run that learns the task from these clips, from a start or from random weights."""
        mean, std = self.store.mean_and_std(self.train_splits)
        return RunIdentity(
            store_id=self.store.store_id,
            spec_id=self.store.spec_id,
            mel=self.store.spec,
            mean=mean,
            std=std,
            excluded=self.store.exclusions.digest,
            task_identity=TaskIdentity(
                task=self.task.name,
                kind="single" if self.single else "multi",
                label_set=self.label_set,
                train_splits=tuple(self.train_splits),
                eval_splits=tuple(self.eval_splits),
                classes=tuple(self.classes.mids),
                start=start,
            ),
        )

    def order(self, recipe: Finetune, world: World = SINGLE_PROCESS) -> RowOrder:
        """The order in which this rank reads training rows, sampled as the recipe requires.

        InputError if there are fewer rows than one step needs.
        """
        # Rows of rare classes are repeated, or rows are drawn by class weights, or each row is read once per epoch
        rows_N = self.train_N
        sampling: Sampling = FULL_SHUFFLE
        if recipe.sampling == "repeated":
            rows_N = repeat_rare_rows(rows_N, self.labels_NC(rows_N))
        if recipe.sampling.startswith("balanced"):
            sampling = self._balanced_sampling(recipe, recipe.clips_per_epoch or len(rows_N))
        elif recipe.clips_per_epoch:
            raise RunError(f"recipe {recipe.name}: clips_per_epoch is for balanced sampling; set it to 0")

        # Every rank reads its own share of each step's clips
        return RowOrder(
            rows_N=rows_N,
            clips=world.clips_per_rank(recipe.clips_per_step),
            seed=recipe.seed,
            rank=world.rank,
            world=world.size,
            sampling=sampling,
        )

    def _balanced_sampling(self, recipe: Finetune, clips_per_epoch: int) -> Sampling:
        weights = balanced_weights(self.store, self.train_N, label_set=self.label_set, scheme=recipe.weights)
        return WeightedSampling(
            weights_N=weights.weights_N,
            clips_per_epoch=clips_per_epoch,
            replacement=recipe.sampling != "balanced-once",
        )


def select_task_data(
    task: Task, store: FeatureStore, *, label_set: str = "raw", fold: int | None = None
) -> TaskData:
    """The clips and classes of a task on a store; `fold` is the number of the fold to measure, if the task has folds.

    RunError if the store does not fit the task, StoreError if it lacks the label set.
    """
    # The splits and the classes
    refuse_other_classes(task, store)
    train_names, eval_names = task_splits(task, store, fold)
    train_good_N = store.good_rows(train_names)
    eval_good_N = store.good_rows(eval_names)
    classes, merge_SC = task_classes(task, store, train_good_N, label_set)

    # Clips without a label of the task neither train nor measure
    rows = []
    notes = []
    for good_N, splits, purpose in (
        (train_good_N, train_names, "train on"),
        (eval_good_N, eval_names, "measure"),
    ):
        rows_N = rows_with_labels(store, good_N, label_set, merge_SC)
        split_names = " + ".join(splits)
        if not len(rows_N):
            raise RunError(
                f"{store.location}: nothing to {purpose}: no clip of {split_names} has a label of the task; "
                f"see: ajepa-data report {store.location}"
            )
        if unlabelled := len(good_N) - len(rows_N):
            notes.append(f"{unlabelled} clips of {split_names} have no label of the task and are left out")
        rows.append(rows_N)
    if task.classes is None and len(classes) < len(store.classes):
        notes.append(f"{len(classes)} of the store's {len(store.classes)} classes have a clip to train on")

    return with_label_kind(
        TaskData(
            task=task,
            store=store,
            label_set=label_set,
            classes=classes,
            single=False,
            train_splits=train_names,
            eval_splits=eval_names,
            train_N=rows[0],
            eval_N=rows[1],
            merge_SC=merge_SC,
            unlabelled_clips=len(eval_good_N) - len(rows[1]),
            notes=tuple(notes),
        )
    )


def rows_with_labels(
    store: FeatureStore, rows_N: np.ndarray, label_set: str, merge_SC: np.ndarray
) -> np.ndarray:
    """The rows that have a label of any class of a task; `merge_SC` as in `TaskData`."""
    return rows_N[(store.labels_BC(rows_N, label_set) @ merge_SC > 0).any(axis=1)]


def refuse_other_classes(task: Task, store: FeatureStore) -> None:
    """RunError if the store's classes are not the task's; the message gives both numbers and the missing classes."""
    if task.classes is None:
        return
    # The classes that only the task or only the store has
    task_mids = task.classes.mids
    store_mids = store.classes.mids
    known_to_task = set(task_mids)
    known_to_store = set(store_mids)
    missing = [mid for mid in task_mids if mid not in known_to_store]
    additional = [mid for mid in store_mids if mid not in known_to_task]

    # Both kinds of fault in one message
    faults = []
    if missing:
        faults.append(f"{len(missing)} of the task's are missing, such as {_shown_classes(missing)}")
    if additional:
        faults.append(
            f"{len(additional)} of the store's are not in the task, such as {_shown_classes(additional)}"
        )
    if faults:
        raise RunError(
            f"{store.location}: task {task.name} has {len(task_mids)} classes, the store {len(store_mids)}: "
            f"{'; '.join(faults)}; use --task own for other labels"
        )


def _shown_classes(mids: list[str]) -> str:
    return ", ".join(mids[:SHOWN_CLASSES])


def task_splits(task: Task, store: FeatureStore, fold: int | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The splits to train on and the splits to measure; RunError where the store lacks one of them."""
    splits = sorted(store.manifest["split"].unique())

    # Cross-validation: one fold is measured, the others train
    if folds := task_folds(task, store):
        fold_name = f"fold{fold}"
        if fold_name not in folds:
            raise RunError(f"{store.location}: fold {fold}: expected one of 1 to {len(folds)}")
        return tuple(split for split in folds if split != fold_name), (fold_name,)
    if fold is not None:
        raise RunError(
            f"{store.location}: --fold {fold}: task {task.name} has no folds; "
            f"the store's splits are {', '.join(splits)}"
        )

    # The task's own splits; a task without own splits uses those of the store, chosen by name
    for split in (*task.train_splits, *task.eval_splits):
        if split not in splits:
            raise RunError(
                f"{store.location}: task {task.name} needs the split {split}, the store has {', '.join(splits)}; "
                "build it from the task's own lists"
            )
    eval_names = task.eval_splits or tuple(probe_eval_splits(store))
    train_names = task.train_splits or tuple(
        split for split in train_splits(store) if split not in eval_names
    )
    return train_names, eval_names


def task_folds(task: Task, store: FeatureStore) -> tuple[str, ...]:
    """The splits that cross-validate the task; empty if the task is not cross-validated on this store.

    RunError if the task has folds and the store has other splits.
    """
    splits = sorted(store.manifest["split"].unique(), key=lambda split: (len(split), split))
    if task.fold_count:
        folds = [f"fold{number}" for number in range(1, task.fold_count + 1)]
        if splits != folds:
            raise RunError(
                f"{store.location}: task {task.name} needs the splits {folds[0]} to {folds[-1]}, "
                f"the store has {', '.join(splits)}; build it from the task's own lists"
            )
        return tuple(folds)
    are_folds = len(splits) > 1 and all(FOLD_PATTERN.fullmatch(split) for split in splits)
    return tuple(splits) if task.classes is None and are_folds else ()


def task_classes(
    task: Task, store: FeatureStore, train_N: np.ndarray, label_set: str
) -> tuple[ClassList, np.ndarray]:
    """The task's classes, and `merge_SC`, which assigns the store's classes to them (see `TaskData`).

    RunError if the task's classes are those of the training clips and no such clip has a label.
    """
    store_classes = store.classes

    # Own labels: the classes that a training clip has
    if task.classes is None:
        class_S = np.flatnonzero(store.labels_BC(train_N, label_set).any(axis=0))
        if not len(class_S):
            raise RunError(
                f"{store.location}: no clip to train on has a label; build the store from labelled clips"
            )
        mids = tuple(store_classes.mids[index] for index in class_S)
        names = tuple(store_classes.names[index] for index in class_S)
        identity_SS = np.eye(len(store_classes), dtype=np.float32)
        return ClassList(mids=mids, names=names), identity_SS[:, class_S]

    # The store's classes in the order of the task's
    if not task.distinct_classes:
        place_C = [store_classes.index_of[mid] for mid in task.classes.mids]
        return task.classes, np.eye(len(store_classes), dtype=np.float32)[:, place_C]

    # The distinct classes as they are, all others merged into one class
    mids = (*task.distinct_classes, task.other_class)
    merge_SC = np.zeros((len(store_classes), len(mids)), np.float32)
    for index, mid in enumerate(store_classes.mids):
        name = mid if mid in task.distinct_classes else task.other_class
        merge_SC[index, mids.index(name)] = 1.0
    return ClassList(mids=mids, names=mids), merge_SC


def with_label_kind(task_data: TaskData) -> TaskData:
    """The task data with `single` set; RunError if a task of single labels has a clip with several."""
    task = task_data.task
    store = task_data.store
    if task.kind == "multi":
        return task_data

    # Labels are single unless some clip has several
    rows_N = np.concatenate([task_data.train_N, task_data.eval_N])
    several_N = rows_N[task_data.labels_NC(rows_N).sum(axis=1) > 1]
    if len(several_N) and task.kind == "single":
        clip_id = store.manifest["clip_id"][int(several_N[0])]
        raise RunError(
            f"{store.location}: task {task.name} has one class per clip, "
            f"but {len(several_N)} clips have several labels, such as {clip_id}"
        )
    return replace(task_data, single=not len(several_N))


def repeat_rare_rows(rows_N: np.ndarray, labels_NC: np.ndarray) -> np.ndarray:
    """All rows, those of rare classes repeated: each class gets at least half as many rows as the largest class has."""
    class_N = labels_NC.argmax(axis=1)
    min_rows = int(np.bincount(class_N).max()) // 2
    repeated = []
    for index in np.unique(class_N):
        class_rows_M = rows_N[class_N == index]
        repeated.append(np.resize(class_rows_M, max(min_rows, len(class_rows_M))))
    return np.concatenate(repeated)
