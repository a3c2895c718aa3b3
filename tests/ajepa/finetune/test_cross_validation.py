"""Cross-validation: folds whose runs know different classes."""

from types import SimpleNamespace

import numpy as np

from ajepa.evaluate.classifier_scores import HeldOutScores, classifier_evaluation
from ajepa.evaluate.task_data import TaskData
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.cross_validation import align_fold_classes
from pipeline.labels.ontology import ClassList

# Clips 0 to 2 are fold 1, the others fold 2; only fold 2 has a clip of c.
CLASS_N = np.array([0, 1, 0, 1, 2, 0])


def held_out_scores(mids: tuple[str, ...], rows_N: np.ndarray, logits_NC: np.ndarray) -> HeldOutScores:
    """A fold's clips, and what a run that knows these classes says of them."""
    store = SimpleNamespace(
        location="some.zarr",
        classes=ClassList(mids=("a", "b", "c"), names=("A", "B", "C")),
        label_sets=("raw",),
        labels_BC=lambda rows_N, label_set: np.eye(3, dtype=np.float32)[CLASS_N[rows_N]],
    )
    task_data = TaskData(
        task=TASKS["own"],
        store=store,
        label_set="raw",
        classes=ClassList(mids=mids, names=mids),
        single=True,
        train_splits=(),
        eval_splits=("fold1",),
        train_N=np.arange(0),
        eval_N=rows_N,
        merge_SC=np.eye(3, dtype=np.float32)[:, [store.classes.index_of[mid] for mid in mids]],
    )
    return HeldOutScores(task_data=task_data, logits_NC=logits_NC.astype(np.float32))


def test_a_class_of_one_fold_alone_is_of_account_where_a_run_knows_it():
    """Fold 2's own run never saw c, and leaves that clip out; fold 1's knows c, and has no clip of it."""
    first = held_out_scores(("a", "b", "c"), np.array([0, 1, 2]), np.array([[2, 1, 0], [0, 2, 1], [0, 1, 2]]))
    second = held_out_scores(("a", "b"), np.array([3, 5]), np.array([[0, 1], [1, 0]]))
    one, two = align_fold_classes([first, second])
    assert one.task_data.classes.mids == two.task_data.classes.mids == ("a", "b", "c")
    assert two.task_data.classes.names == ("A", "B", "C")
    assert two.task_data.labels_NC(two.task_data.eval_N).tolist() == [[0, 1, 0], [1, 0, 0]]
    (score,) = classifier_evaluation(SimpleNamespace(resamples=20, seed=0), [one, two]).scores
    assert score.by_fold["accuracy"] == (np.float32(2 / 3), 1.0)
    assert (score.classes, score.skipped, score.per_class_recall) == (2, 1, (0.75, 1.0, None))


def test_folds_of_the_same_classes_stay_as_they_are():
    both = [held_out_scores(("a", "b", "c"), np.array([place]), np.eye(3)[[place]]) for place in (0, 1)]
    assert align_fold_classes(both) == both
