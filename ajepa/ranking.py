"""Ranking: average precision and area under the ROC curve of one class, for many weightings of the clips at once.

With weight 1 for every clip they are scikit-learn's `average_precision_score` and `roc_auc_score`, ties included;
with whole numbers those of a sample in which each clip lies so many times. Clips are sorted once: every weighting
then needs only how much of it lies above, at and below each score that a positive has.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The clips in the order of a class's scores, those of equal scores together: G such ties hold a positive.

    order_N    clips from the highest score down to the end of the last tie
    cuts       where ties start and end in `order_N`: `[0, start, end, start, end, ...]`, 2G + 1 places
    members_R  the positives, tie after tie; those of tie g end before `ends_G[g]`
    """

    order_N: np.ndarray
    cuts: np.ndarray
    members_R: np.ndarray
    ends_G: np.ndarray
    clips: int

    @classmethod
    def of(cls, labels_N: np.ndarray, scores_N: np.ndarray) -> "Ranking":
        """Of the clips where `labels_N` is above 0 against all others; there is at least one of the former."""
        order_N = np.argsort(-scores_N, kind="stable")
        sorted_N = scores_N[order_N]
        starts_T = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
        ends_T = np.append(starts_T[1:], len(order_N))
        places_R = np.flatnonzero(labels_N[order_N] > 0)
        tie_R = np.searchsorted(ends_T, places_R, side="right")
        ties_G, count_G = np.unique(tie_R, return_counts=True)
        cuts = np.concatenate([[0], np.stack([starts_T[ties_G], ends_T[ties_G]], axis=1).ravel()])
        return cls(
            order_N=order_N[: cuts[-1]],
            cuts=cuts,
            members_R=order_N[places_R],
            ends_G=np.cumsum(count_G),
            clips=len(order_N),
        )

    def precision_and_area(self, weights_NB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Average precision `B` (nan where no positive has weight) and area `B` (nan: or no negative has)."""
        cumulated_2GB = np.cumsum(self._pieces @ weights_NB, axis=0)
        above_GB, with_GB = cumulated_2GB[::2], cumulated_2GB[1::2]
        positive_GB = self._positives @ weights_NB
        found_GB = np.cumsum(positive_GB, axis=0)
        positives_B = found_GB[-1]
        negatives_B = weights_NB.sum(axis=0) - positives_B
        precise_GB = found_GB / np.maximum(with_GB, 1)  # a tie without weight counts 0 times
        beaten_GB = negatives_B - (with_GB - found_GB) + (with_GB - above_GB - positive_GB) / 2
        with np.errstate(invalid="ignore"):  # 0/0 is nan, as promised
            precision_B = (positive_GB * precise_GB).sum(axis=0) / positives_B
            area_B = (positive_GB * beaten_GB).sum(axis=0) / (positives_B * negatives_B)
        return precision_B, area_B

    @cached_property
    def _pieces(self) -> csr_matrix:
        """`[2G, clips]`: what lies between two ties, and then the tie, in turns."""
        return _sums(self.order_N, self.cuts, self.clips)

    @cached_property
    def _positives(self) -> csr_matrix:
        """`[G, clips]`: the positives of each tie."""
        return _sums(self.members_R, np.concatenate([[0], self.ends_G]), self.clips)


def _sums(clips_M: np.ndarray, cuts: np.ndarray, clips: int) -> csr_matrix:
    """A matrix that adds up what the clips between each two cuts weigh."""
    return csr_matrix((np.ones(len(clips_M), np.float32), clips_M, cuts), shape=(len(cuts) - 1, clips))


def ranked_CB(
    labels_NC: np.ndarray, scores_NC: np.ndarray, weights_NB: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and area of every class under every weighting, both `[C, B]`; nan where no clip has it."""
    precision_CB = np.full((labels_NC.shape[1], weights_NB.shape[1]), np.nan, np.float64)
    area_CB = precision_CB.copy()
    for index in np.flatnonzero((labels_NC > 0).any(axis=0)):
        ranking = Ranking.of(labels_NC[:, index], scores_NC[:, index])
        precision_CB[index], area_CB[index] = ranking.precision_and_area(weights_NB)
    return precision_CB, area_CB
