"""Probed head: a classifier's head as the linear probe on its frozen encoder has it, before any step."""

import numpy as np
import torch
from torch import Tensor

from ajepa.assignment import Assignment
from ajepa.classifier import Vit
from ajepa.features import Views, features
from ajepa.partition import HELD_SHARE
from ajepa.probes import chosen_l2, linear_NC, standardised

CLIPS = 20_000  # to probe on at most


def probed_head(model: Vit, views: Views, assignment: Assignment, seed: int) -> tuple[Tensor, Tensor]:
    """Weight `CD` and bias `C` of the probe on the frozen encoder, trained on the clips to train on alone.

    Probing first and fine-tuning then (arXiv 2202.10054): a head drawn at random pulls at the encoder until it has
    learnt what the encoder already knows. Of more than 20,000 clips so many are drawn.
    """
    drawn_N = np.random.default_rng([seed, 0]).permutation(assignment.train_N)[:CLIPS]
    rows_N = np.sort(drawn_N)
    labels_NC = assignment.labels_NC(rows_N)
    plain_ND = features(views, rows_N, model.encoder.eval(), pooling=model.spec.pooling)
    width = plain_ND.shape[1]
    asked_ND = np.concatenate([np.zeros((1, width)), np.eye(width)]).astype(np.float32)
    train_ND, at_ND = standardised(plain_ND, asked_ND)  # features that tell the probe's bias and weights
    l2 = penalty(train_ND, labels_NC, seed)
    scores_NC = torch.from_numpy(linear_NC(train_ND, labels_NC, at_ND, l2=l2))
    return (scores_NC[1:] - scores_NC[:1]).T.contiguous(), scores_NC[0]


def penalty(train_ND: Tensor, labels_NC: np.ndarray, seed: int) -> float:
    """The probe's, chosen on a fifth of the clips, drawn by the seed; all of them train it then."""
    order_N = np.random.default_rng([seed, 1]).permutation(len(train_ND))
    held_N, kept_N = np.split(order_N, [int(len(order_N) * HELD_SHARE)])
    return chosen_l2(train_ND[kept_N], labels_NC[kept_N], train_ND[held_N], labels_NC[held_N])
