"""Probed head: a classifier's head as the linear probe on its frozen encoder has it, before any step."""

import numpy as np
import torch
from torch import Tensor

from ajepa.assignment import Assignment
from ajepa.classifier import Vit
from ajepa.features import Views, features
from ajepa.partition import HELD_SHARE
from ajepa.probes import L2_GRID, LinearProbe, entropy, linear_NC, standardised

CLIPS = 20_000  # to probe on at most


def probed_head(
    model: Vit, views: Views, assignment: Assignment, seed: int, *, single: bool
) -> tuple[Tensor, Tensor]:
    """Weight `CD` and bias `C` of the probe on the frozen encoder, trained on the clips to train on alone.

    `single`: over all classes at once, else each by itself; as fine-tuning will go on.

    Probing first and fine-tuning then (arXiv 2202.10054): a head drawn at random pulls at the encoder until it has
    learnt what the encoder already knows. Of more than 20,000 clips so many are drawn; a class that none of these
    has begins at the lowest that the probe says of any of them.
    """
    drawn_N = np.random.default_rng([seed, 0]).permutation(assignment.train_N)[:CLIPS]
    rows_N = np.sort(drawn_N)
    labels_NC = assignment.labels_NC(rows_N)
    plain_ND = features(views, rows_N, model.encoder.eval(), pooling=model.spec.pooling)
    width = plain_ND.shape[1]
    asked_ND = np.concatenate([np.zeros((1, width)), np.eye(width)]).astype(np.float32)
    train_ND, at_ND = standardised(plain_ND, asked_ND)  # features that tell the probe's bias and weights
    l2 = penalty(train_ND, labels_NC, seed, single=single)
    scores_NC = torch.from_numpy(linear_NC(train_ND, labels_NC, at_ND, l2=l2, single=single))
    weight_CD, bias_C = (scores_NC[1:] - scores_NC[:1]).T.contiguous(), scores_NC[0]
    seen_C = torch.from_numpy(labels_NC.any(axis=0))
    told_NC = torch.from_numpy(plain_ND) @ weight_CD[seen_C].T + bias_C[seen_C]
    bias_C[~seen_C] = told_NC.min()
    return weight_CD, bias_C


def penalty(train_ND: Tensor, labels_NC: np.ndarray, seed: int, *, single: bool) -> float:
    """That of the probe which loses least on a fifth of the clips, drawn by the seed; all of them train it then.

    Cross-entropy and not mAP, which does not mind weights however large: training begins where this ends.
    """
    order_N = np.random.default_rng([seed, 1]).permutation(len(train_ND))
    held_N, kept_N = np.split(order_N, [int(len(order_N) * HELD_SHARE)])
    probe = LinearProbe.of(train_ND[kept_N], labels_NC[kept_N], single=single)
    held_NC = torch.from_numpy(labels_NC[held_N][:, probe.seen_C])

    def loss(l2: float) -> float:
        scores_NC = probe.scores_NC(train_ND[held_N], l2=l2)[:, probe.seen_C]
        return entropy(torch.from_numpy(scores_NC), held_NC, single=single).item()

    return min(L2_GRID, key=loss)
