"""Seen: a run with the store that its page shows it on, and what it says of clips that it never saw."""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch

from ajepa.features import Views, features
from ajepa.finetuning import Finetune
from ajepa.learnt import Learnt, held_out
from ajepa.partition import measured_rows
from ajepa.probes import standardised
from ajepa.recipes import Pretrain, from_json
from ajepa.run import Run
from ajepa.subject import TRAINED, Subject
from pipeline.pictures import title
from pipeline.report import label_table
from pipeline.store import FeatureStore

MAP_CLIPS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A run with the store that it is shown on, and what it says of some clips that it never saw."""

    run: Run
    recipe: Pretrain | Finetune
    store: FeatureStore
    labels: pl.DataFrame
    rows_N: np.ndarray  # eval clips
    features_ND: np.ndarray  # of those, standardised: its encoder's, or its classifier's logits

    @classmethod
    def of(cls, store: FeatureStore, run: Run) -> "Seen":
        """RunError where the run has no checkpoint, StoreError or RunError where the store has nothing to show."""
        cpu = torch.device("cpu")
        recipe: Pretrain | Finetune
        if run.finetuned:
            learnt, assignment = Learnt.of(run), held_out(run, store)
            recipe, rows_N = learnt.recipe, some(assignment.eval_N, learnt.recipe.seed)
            said_ND = learnt.held(replace(assignment, eval_N=rows_N), cpu).logits_NC
        else:
            recipe = pretrained = from_json(run.recipe)
            rows_N = some(measured_rows(store), recipe.seed)
            mean, std = run.identity["mean"], run.identity["std"]
            views = Views(store=store, frames=pretrained.view_frames, mean=mean, std=std)
            said_ND = features(views, rows_N, Subject.of(run).encoders(cpu)[TRAINED])
        features_ND = standardised(said_ND, said_ND)[0].numpy()
        labels = label_table(store)[0]
        return cls(run=run, recipe=recipe, store=store, labels=labels, rows_N=rows_N, features_ND=features_ND)

    @property
    def teller(self) -> str:
        """Who says what is said of the clips."""
        return "classifier" if self.run.finetuned else "frozen encoder"

    def title(self, row: int) -> str:
        return title(self.store, self.labels, row, letters=60)


def some(rows_N: np.ndarray, seed: int) -> np.ndarray:
    """As many of the rows as a map can hold, in their order."""
    return np.sort(np.random.default_rng([seed, 2]).permutation(rows_N)[:MAP_CLIPS])
