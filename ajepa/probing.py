"""The probe of a run that is under way: the target encoder on some labelled clips, small enough to be asked often."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ajepa.features import Views, features
from ajepa.health import uncompiled
from ajepa.jepa import Jepa
from ajepa.loop import SCORE
from ajepa.metrics import mean_average_precision
from ajepa.partition import probe_rows
from ajepa.probes import knn_NC, linear_NC, standardised
from ajepa.recipes import Pretrain
from ajepa.run import Json
from ajepa.training_set import kept_splits
from pipeline.errors import BrokenClip
from pipeline.joined import AnyStore

PROBE_L2 = 0.1  # one penalty instead of a search: near the best of the four recipes' encoders that were tried
EVAL_SHARE = 0.5  # clips that are measured on, at most, for each that is trained on


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probe:
    """Clips that stay the same for a whole run, and every label set that can be measured on them.

    probe_linear_SET  mAP of a linear probe with the penalty PROBE_L2, trained and measured on that label set
    probe_knn_SET     mAP of `probes.knn_NC`
    probe_map         the mean of them all: by it the best checkpoint is told (`loop.SCORE`)
    """

    views: Views
    train_N: np.ndarray
    eval_N: np.ndarray
    label_sets: tuple[str, ...]
    on_broken: Literal["raise", "skip"] = "raise"
    broken: set[int] = field(default_factory=set)  # rows that turned out to be unreadable

    def scores(self, model: Jepa) -> Json:
        """mAP of the model's target encoder as it is now; nothing is drawn and nothing of it is changed."""
        with uncompiled(model):
            train_N, train_ND = self.features(model, self.train_N)
            eval_N, eval_ND = self.features(model, self.eval_N)
        known, asked = standardised(train_ND, eval_ND)
        store, told = self.views.store, {}
        for name in self.label_sets:
            train_NC, eval_NC = store.labels_BC(train_N, name), store.labels_BC(eval_N, name)
            linear = linear_NC(known, train_NC, asked, l2=PROBE_L2)
            told[f"probe_linear_{name}"] = mean_average_precision(eval_NC, linear).value
            told[f"probe_knn_{name}"] = mean_average_precision(eval_NC, knn_NC(known, train_NC, asked)).value
        return {**told, SCORE: float(np.mean(list(told.values())))}

    def features(self, model: Jepa, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows that can be read, and a vector for each; BrokenClip where none may be left out."""
        while True:
            rows_N = rows_N[~np.isin(rows_N, list(self.broken))]
            try:
                return rows_N, features(self.views, rows_N, model.target)
            except BrokenClip as error:
                if self.on_broken == "raise":
                    raise
                self.broken.add(error.row)


def open_probe(
    store: AnyStore,
    recipe: Pretrain,
    identity: Json,
    on_broken: Literal["raise", "skip"],
    say: Callable[[str], None],
) -> Probe | None:
    """The recipe's probe; None where it has none, or the store nothing to measure on, which is said once."""
    if not recipe.probe_every:
        return None
    kept = kept_splits(store)
    if not kept or not len(store.good_rows(kept)):
        say(f"{store.place}: no probe while training: no clip of a split named eval or test")
        return None
    train_N, eval_N = probe_rows(store, recipe.seed, recipe.probe_clips)
    most = int(EVAL_SHARE * recipe.probe_clips)
    eval_N = np.sort(np.random.default_rng([recipe.seed, 2]).permutation(eval_N)[:most])
    label_sets = tuple(name for name in store.label_sets if store.labels_BC(eval_N, name).any())
    if not label_sets:
        say(f"{store.place}: no probe while training: no clip to measure on has a label")
        return None
    views = Views(store=store, frames=recipe.view_frames, mean=identity["mean"], std=identity["std"])
    return Probe(views=views, train_N=train_N, eval_N=eval_N, label_sets=label_sets, on_broken=on_broken)
