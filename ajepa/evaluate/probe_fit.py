"""ProbeFit: frozen features and labels of all clips of an evaluation, with which probes are trained and measured."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ajepa.evaluate.features import ClipFeatures
from ajepa.evaluate.linear_probe import LinearProbe, PrincipalAxes, choose_l2
from ajepa.evaluate.probe_splits import ProbeFold, ProbeSplits
from ajepa.evaluate.probes import knn_scores_NC, standardise_features, train_attentive_probe
from ajepa.evaluate.result import Score
from ajepa.evaluate.true_labels import TrueLabels


@dataclass(frozen=True, kw_only=True)
class StandardisedFold:
    """The vectors of a fold's clips, standardised by those of the fit clips; shared by all probes and label sets."""

    train_ND: Tensor
    val_ND: Tensor
    fit_ND: Tensor
    eval_ND: Tensor

    @cached_property
    def train_axes(self) -> PrincipalAxes:
        """The principal axes of the train clips."""
        return PrincipalAxes.from_features(self.train_ND)

    @cached_property
    def fit_axes(self) -> PrincipalAxes:
        """The principal axes of the fit clips."""
        return PrincipalAxes.from_features(self.fit_ND)


@dataclass(frozen=True, kw_only=True)
class ProbeFit:
    """The features of all rows of the probe splits, and the probes that are trained on them under any label set."""

    features: ClipFeatures
    probe_splits: ProbeSplits
    seed: int
    device: torch.device

    @cached_property
    def standardised_folds(self) -> list[StandardisedFold]:
        """The standardised vectors of every fold, on the device."""
        return [self.standardise_fold(fold) for fold in self.probe_splits.folds]

    def standardise_fold(self, fold: ProbeFold) -> StandardisedFold:
        """The vectors of the train, val, fit and eval clips of a fold, all standardised by the fit clips."""
        rows = (fold.fit_N, fold.train_N, fold.val_N, fold.eval_N)
        plain = [self.features.vectors_ND[self.row_positions(rows_N)] for rows_N in rows]
        fit_ND, train_ND, val_ND, eval_ND = (x_ND.to(self.device) for x_ND in standardise_features(*plain))
        return StandardisedFold(fit_ND=fit_ND, train_ND=train_ND, val_ND=val_ND, eval_ND=eval_ND)

    def score_probe(self, features_name: str, probe: str, true_labels: TrueLabels, resamples: int) -> Score:
        """Train the probe for every fold and measure it there, with intervals from this many resamples."""
        scored_folds = []
        chosen_settings = []
        for number, fold in enumerate(self.probe_splits.folds):
            scores_NC, setting = self.fit_and_score(number, probe, true_labels)
            if setting is not None:
                chosen_settings.append(setting)
            positions_N = self.row_positions(fold.eval_N)
            scored_folds.append(
                true_labels.scored_fold(positions_N, scores_NC, resamples, self.seed + number)
            )
        return true_labels.summarise_folds(features_name, probe, scored_folds, chosen_settings)

    def fit_and_score(
        self, fold_number: int, probe: str, true_labels: TrueLabels
    ) -> tuple[np.ndarray, float | None]:
        """A trained probe's scores of the fold's eval clips, and the selected setting (None for nearest neighbours)."""
        # The attentive probe standardises its tokens itself, and selects its own number of steps
        fold = self.probe_splits.folds[fold_number]
        single = true_labels.kind == "single"
        fit_NC, train_NC, val_NC = (
            true_labels.labels_NC[self.row_positions(rows_N)]
            for rows_N in (fold.fit_N, fold.train_N, fold.val_N)
        )
        if probe == "attentive":
            attentive = train_attentive_probe(
                self.features_of_rows(fold.train_N),
                train_NC,
                self.features_of_rows(fold.val_N),
                val_NC,
                self.features_of_rows(fold.eval_N),
                seed=self.seed,
                single=single,
                device=self.device,
            )
            return attentive.scores_NC, attentive.steps

        # Nearest neighbours have no setting to select
        vectors = self.standardised_folds[fold_number]
        if probe == "knn":
            return knn_scores_NC(vectors.fit_ND, fit_NC, vectors.eval_ND), None

        # The val clips select the penalty of the linear probe; then all fit clips train the probe
        selected = LinearProbe.from_train_clips(
            vectors.train_ND, train_NC, single=single, axes=vectors.train_axes
        )
        l2 = choose_l2(selected, vectors.val_ND, val_NC)
        final = LinearProbe.from_train_clips(vectors.fit_ND, fit_NC, single=single, axes=vectors.fit_axes)
        return final.score_clips(final.fit(l2), vectors.eval_ND), l2

    def features_of_rows(self, rows_N: np.ndarray) -> ClipFeatures:
        return self.features.select_clips(self.row_positions(rows_N))

    def row_positions(self, rows_N: np.ndarray) -> np.ndarray:
        """The positions of some rows among all rows of the probe splits."""
        return np.searchsorted(self.probe_splits.rows_N, rows_N)
