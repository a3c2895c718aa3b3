"""Probe bench: the frozen features of some clips, on which a probe is trained part by part and measured."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ajepa import attentive
from ajepa.evaluation import Score
from ajepa.features import Features
from ajepa.partition import Part, Partition
from ajepa.probes import chosen_l2, knn_NC, linear_NC, standardised
from ajepa.truth import Truth


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The features of a partition's rows and what is true of them: what a probe is put on."""

    found: Features
    partition: Partition
    truth: Truth
    seed: int
    device: torch.device

    def score(self, features: str, probe: str, count: int) -> Score:
        """Train the probe on every part and measure it there; intervals from `count` resamples."""
        folds, chosen = [], []
        for place, part in enumerate(self.partition.parts):
            said_NC, setting = self.said(part, probe)
            chosen += [] if setting is None else [setting]
            folds.append(self.truth.measured(self.places(part.eval_N), said_NC, count, self.seed + place))
        return self.truth.score(features, probe, folds, chosen)

    def said(self, part: Part, probe: str) -> tuple[np.ndarray, float | None]:
        """A probe's scores of the clips to measure on, and what was chosen for it."""
        single = self.truth.kind == "single"
        if probe == "attentive":
            told = attentive.attended(
                self.of(part.train_N),
                self.labels(part.train_N),
                self.of(part.val_N),
                self.labels(part.val_N),
                self.of(part.eval_N),
                seed=self.seed,
                single=single,
                device=self.device,
            )
            return told.scores_NC, told.steps
        train_ND, val_ND, fit_ND, eval_ND = self.vectors(part)
        if probe == "knn":
            return knn_NC(fit_ND, self.labels(part.fit_N), eval_ND), None
        labels_NC, val_NC = self.labels(part.train_N), self.labels(part.val_N)
        l2 = chosen_l2(train_ND, labels_NC, val_ND, val_NC, single=single)
        return linear_NC(fit_ND, self.labels(part.fit_N), eval_ND, l2=l2, single=single), l2

    def vectors(self, part: Part) -> Iterator[Tensor]:
        """Of the clips to train on, to choose with, to fit in the end and to measure on, all standardised alike."""
        rows = (part.fit_N, part.train_N, part.val_N, part.fit_N, part.eval_N)
        told = standardised(*(self.of(rows_N).vectors_ND for rows_N in rows))
        return (vectors_ND.to(self.device) for vectors_ND in told[1:])

    def of(self, rows_N: np.ndarray) -> Features:
        return self.found.of(self.places(rows_N))

    def labels(self, rows_N: np.ndarray) -> np.ndarray:
        return self.truth.labels_NC[self.places(rows_N)]

    def places(self, rows_N: np.ndarray) -> np.ndarray:
        """Where some rows stand among those of the partition."""
        return np.searchsorted(self.partition.rows_N, rows_N)
