"""Weights of clips by their classes, so that a `WeightedSampling` draws clips of rare classes more often.

The weights are computed from the rows of a sampling each time it is created; this takes under a second for all of
AudioSet. A stored table would be out of date as soon as labels are propagated, rows repaired or clips excluded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError
from pipeline.messages import suggest_known
from pipeline.store.joined_store import AnyStore


def ast_weights(clips_C: np.ndarray) -> np.ndarray:
    """Return the class weights of AST (arXiv 2104.01778, gen_weight_file.py), which Audio-MAE and A-JEPA also use.

    AST draws with replacement. Audio-MAE draws 200,000 clips an epoch without replacement.
    """
    return 1000 / (clips_C + 0.01)


def passt_weights(clips_C: np.ndarray) -> np.ndarray:
    """Return the class weights of PaSST (arXiv 2110.05069, audioset/dataset.py).

    PaSST draws 100,000 clips an epoch without replacement.
    """
    return 1000 / (clips_C + 100)


def panns_weights(clips_C: np.ndarray) -> np.ndarray:
    """Return class weights that draw clips as often as the balanced sampler of PANNs does.

    The sampler (arXiv 1912.10211, data_generator.py) goes through the classes in turn and takes the next clip of each.
    In the long run a clip's share of all draws is the sum of these weights over the labels of the clip.
    """
    return 1 / (np.count_nonzero(clips_C) * np.maximum(clips_C, 1))


WEIGHT_SCHEMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ast": ast_weights,
    "passt": passt_weights,
    "panns": panns_weights,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassWeights:
    """Weights of classes, computed from their numbers of clips; the weight of a clip is the sum over its labels."""

    scheme: str
    label_set: str
    clips_C: np.ndarray  # int64, number of clips with each class
    weights_C: np.ndarray  # float64; 0 where no clip has the class
    weights_N: np.ndarray  # float64, weight of each row; 0 for a row without labels, which is never drawn
    unlabelled_clips: int

    def __str__(self) -> str:
        classes = np.count_nonzero(self.clips_C)
        return (
            f"weights {self.scheme!r} of label set {self.label_set!r}: {len(self.weights_N):,} clips, of which "
            f"{self.unlabelled_clips:,} have no label and are never drawn; "
            f"{classes} of {len(self.clips_C)} classes occur"
        )


def balanced_weights(
    store: AnyStore, rows_N: np.ndarray, *, label_set: str = "raw", scheme: str = "ast"
) -> ClassWeights:
    """Return the weights of the rows from which a `WeightedSampling` draws.

    Raises InputError if the scheme is unknown or no row has a label, StoreError if the store lacks the label set.
    """
    if scheme not in WEIGHT_SCHEMES:
        raise InputError(f"weights {scheme!r} are unknown; {suggest_known(scheme, WEIGHT_SCHEMES)}")

    # The labels of all rows in one array: the class of each label, and the index in `rows_N` of its row.
    store_class_N, begins_N = store.flat_labels(label_set)
    label_count_N = begins_N[rows_N + 1] - begins_N[rows_N]
    place_N = np.repeat(np.arange(len(rows_N)), label_count_N)
    first_label_N = np.cumsum(label_count_N) - label_count_N
    class_N = store_class_N[np.arange(len(place_N)) + (begins_N[rows_N] - first_label_N)[place_N]]
    if not len(class_N):
        raise InputError(f"none of {len(rows_N)} clips has a label in {label_set!r}; draw without weights")

    # The weight of each class, then the sum over the labels of each row.
    clips_C = np.bincount(class_N, minlength=len(store.classes))
    weights_C = np.where(clips_C > 0, WEIGHT_SCHEMES[scheme](clips_C), 0.0)
    return ClassWeights(
        scheme=scheme,
        label_set=label_set,
        clips_C=clips_C,
        weights_C=weights_C,
        weights_N=np.bincount(place_N, weights_C[class_N], minlength=len(rows_N)),
        unlabelled_clips=int(np.count_nonzero(label_count_N == 0)),
    )
