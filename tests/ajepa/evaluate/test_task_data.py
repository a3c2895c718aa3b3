"""Tasks on stores: which clips train and which are measured, with which classes and labels."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from tiny import tiny_finetune

from ajepa.evaluate.task_data import repeat_rare_rows, select_task_data, task_classes, task_splits
from ajepa.evaluate.tasks import TASKS, class_list_from_words, find_task
from ajepa.recipes.catalogue import FINETUNE_RECIPES
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList

OWN = TASKS["own"]

COUNTS = {"audioset": 527, "esc50": 50, "fsd50k": 200, "speech-commands-v1": 30, "speech-commands-v2": 35}


def store_of(*mids: str, splits: tuple[str, ...] = ("train", "test")) -> SimpleNamespace:
    """The part of a store of these classes that is read before any of its clips."""
    manifest = pl.DataFrame({"split": splits})
    return SimpleNamespace(location="some.zarr", classes=ClassList(mids=mids, names=mids), manifest=manifest)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_has_its_classes_and_a_recipe_of_its_name(name):
    """The numbers of classes are those of the publications."""
    task = TASKS[name]
    assert task.recipe in FINETUNE_RECIPES
    if name != "own":
        assert len(task.classes) == {**COUNTS, "voxceleb1-sid": 1251}[name]
        assert set(task.distinct_classes) <= set(task.classes.mids)


def test_a_misspelt_task_is_answered_with_the_nearest():
    with pytest.raises(RunError, match=r"did you mean 'esc50'.*There are: audioset, esc50"):
        find_task("esc-50")


def test_clips_without_a_label_are_left_out_with_a_note(store):
    """A missing label does not show that a class is absent, but a network would learn that it is."""
    task_data = select_task_data(OWN, store)
    for rows_N in (task_data.train_N, task_data.eval_N):
        assert task_data.labels_NC(rows_N).any(axis=1).all()
    assert set(task_data.train_N) < set(store.good_rows(["a_train"]))
    assert any(
        "clips of a_train have no label of the task and are left out" in note for note in task_data.notes
    )
    assert (task_data.train_splits, task_data.eval_splits) == (("a_train",), ("eval",))
    assert not task_data.single


def test_own_has_the_classes_that_its_training_clips_have(store):
    """With 527 outputs for five classes, 522 outputs would learn nothing."""
    task_data = select_task_data(OWN, store)
    assert len(task_data.classes) == int(store.labels_BC(task_data.train_N).any(axis=0).sum())
    places_C = [store.classes.index_of[mid] for mid in task_data.classes.mids]
    assert np.array_equal(
        task_data.labels_NC(task_data.eval_N), store.labels_BC(task_data.eval_N)[:, places_C]
    )
    assert len(select_task_data(TASKS["audioset"], store).classes) == 527


def test_the_heads_order_is_the_tasks_whatever_the_stores():
    """A logit must have the same meaning for every store of a task."""
    task = replace(OWN, classes=class_list_from_words("b a c"))
    classes, merge_SC = task_classes(task, store_of("a", "b", "c"), np.arange(0), "raw")
    assert classes.mids == ("b", "a", "c")
    assert (np.array([[1.0, 0.0, 0.0]]) @ merge_SC).tolist() == [[0.0, 1.0, 0.0]]


def test_words_that_a_task_does_not_tell_apart_are_one_class():
    """Speech Commands v1: ten commands, and twenty words that are unknown."""
    v1 = TASKS["speech-commands-v1"]
    classes, merge_SC = task_classes(v1, store_of(*v1.classes.mids), np.arange(0), "raw")
    assert classes.mids == (*v1.distinct_classes, "unknown")
    assert merge_SC.sum(axis=1).tolist() == [1.0] * 30
    assert merge_SC.sum(axis=0).tolist() == [1.0] * 10 + [20.0]


def test_a_store_of_other_classes_is_refused_with_both_sizes_and_what_is_missing():
    task = replace(OWN, name="some", classes=class_list_from_words("a b c"))
    with pytest.raises(RunError) as refusal:
        select_task_data(task, store_of("a", "d"))
    assert str(refusal.value) == (
        "some.zarr: task some has 3 classes, the store 2: 2 of the task's are missing, such as b, c; "
        "1 of the store's are not in the task, such as d; use --task own for other labels"
    )


def test_a_task_takes_its_own_splits_and_folds():
    """Validation clips are neither trained on nor measured; a fold is measured once."""
    words = store_of("a", splits=("train", "validation", "test"))
    assert task_splits(TASKS["speech-commands-v2"], words, None) == (("train",), ("test",))
    folds = store_of("a", splits=tuple(f"fold{number}" for number in range(1, 6)))
    assert task_splits(TASKS["esc50"], folds, 2) == (("fold1", "fold3", "fold4", "fold5"), ("fold2",))
    with pytest.raises(
        RunError, match="task esc50 needs the splits fold1 to fold5, the store has test, train"
    ):
        task_splits(TASKS["esc50"], store_of("a"), 1)
    with pytest.raises(RunError, match="task fsd50k needs the split eval, the store has test, train"):
        task_splits(TASKS["fsd50k"], store_of("a"), None)


def test_a_task_of_one_class_to_a_clip_refuses_a_clip_of_two(store):
    """The message names the clip, so that the user can check it."""
    with pytest.raises(RunError, match="has one class per clip, but 9 clips have several labels, such as"):
        select_task_data(replace(OWN, kind="single"), store)


def test_rare_classes_are_repeated_until_they_are_half_as_many_as_the_largest():
    """The papers balance "unknown" in this way. Larger classes do not change, and every clip is used at least once."""
    class_N = np.array([0] * 10 + [1] * 2 + [2] * 7)
    rows_N = repeat_rare_rows(np.arange(19), np.eye(3)[class_N])
    assert np.bincount(class_N[rows_N]).tolist() == [10, 5, 7]
    assert set(rows_N) == set(range(19))


def test_balanced_sampling_draws_rare_classes_as_often(store):
    """With replacement an epoch has as many clips as the store; without, no clip is drawn twice."""
    task_data = select_task_data(OWN, store)
    with_replacement = task_data.order(tiny_finetune(sampling="balanced"))
    assert with_replacement.clips_per_epoch == len(task_data.train_N)
    once = task_data.order(tiny_finetune(sampling="balanced-once", clips_per_epoch=16))
    assert once.steps_per_epoch == 2
    epoch_N = np.concatenate([once.rows_at_step(step) for step in range(2)])
    assert len(set(epoch_N)) == 16
