"""Weights: how often to draw a clip, so that rare classes come more often than they lie in the store.

They are counted anew wherever a sampling is made, from the very rows that it draws from, in under a second for all of
AudioSet: what is not stored cannot be stale when labels are propagated again, rows repaired, or clips excluded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError
from pipeline.messages import closest_word
from pipeline.store.joined_store import AnyStore


def ast_weights(clips_C: np.ndarray) -> np.ndarray:
    """AST (arXiv 2104.01778, gen_weight_file.py), and after it Audio-MAE and A-JEPA; AST draws with replacement,
    Audio-MAE 200,000 clips an epoch without."""
    return 1000 / (clips_C + 0.01)


def passt_weights(clips_C: np.ndarray) -> np.ndarray:
    """PaSST (arXiv 2110.05069, audioset/dataset.py), summed over labels too; 100,000 clips an epoch without
    replacement."""
    return 1000 / (clips_C + 100)


def panns_weights(clips_C: np.ndarray) -> np.ndarray:
    """PANNs' balanced sampler (arXiv 1912.10211, data_generator.py) takes each class in turn, then the next of its
    clips: in the long run each clip as often as this sums to over its labels, of all draws."""
    return 1 / (np.count_nonzero(clips_C) * np.maximum(clips_C, 1))


WEIGHT_SCHEMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ast": ast_weights,
    "passt": passt_weights,
    "panns": panns_weights,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassWeights:
    """Of classes, by how many of some clips have them, and of these clips: the sum over their labels."""

    scheme: str
    label_set: str
    clips_C: np.ndarray  # int64, clips with each class
    weights_C: np.ndarray  # float64; 0 where no clip has the class
    weights_N: np.ndarray  # float64, one of each row that was counted; 0 without labels: it is never drawn
    unlabelled_clips: int

    def __str__(self) -> str:
        classes = np.count_nonzero(self.clips_C)
        return (
            f"weights {self.scheme!r} of label set {self.label_set!r}: {len(self.weights_N):,} clips, of which "
            f"{self.unlabelled_clips:,} have no label and are never drawn; {classes} of {len(self.clips_C)} classes occur"
        )


def balanced_weights(
    store: AnyStore, rows_N: np.ndarray, *, label_set: str = "raw", scheme: str = "ast"
) -> ClassWeights:
    """The weights of some rows of a store, those that are to be drawn from, for `sampling.Weighted`.

    InputError where the scheme is unknown or no row has a label, StoreError where the label set is not there.
    """
    if scheme not in WEIGHT_SCHEMES:
        known = ", ".join(WEIGHT_SCHEMES)
        raise InputError(
            f"weights {scheme!r} are unknown; did you mean {closest_word(scheme, WEIGHT_SCHEMES)!r}? There are: {known}"
        )
    class_N, begins_N = store.flat_labels(label_set)
    labels_N = begins_N[rows_N + 1] - begins_N[rows_N]
    owner_N = np.repeat(np.arange(len(rows_N)), labels_N)  # of each label of these rows
    first_N = np.cumsum(labels_N) - labels_N
    class_N = class_N[np.arange(len(owner_N)) + (begins_N[rows_N] - first_N)[owner_N]]
    if not len(class_N):
        raise InputError(f"none of {len(rows_N)} clips has a label in {label_set!r}; draw without weights")
    clips_C = np.bincount(class_N, minlength=len(store.classes))
    weights_C = np.where(clips_C > 0, WEIGHT_SCHEMES[scheme](clips_C), 0.0)
    return ClassWeights(
        scheme=scheme,
        label_set=label_set,
        clips_C=clips_C,
        weights_C=weights_C,
        weights_N=np.bincount(owner_N, weights_C[class_N], minlength=len(rows_N)),
        unlabelled_clips=int(np.count_nonzero(labels_N == 0)),
    )
