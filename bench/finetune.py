"""Is fine-tuning worth more than frozen probes, and these more than log-mel statistics: over seeds, on one store.

python -m bench.finetune STORE RUN --out FOLDER

By mAP, where every clip has one label by accuracy; a store in folds (`bench/esc50_shaped.py` makes one) is
cross-validated, and a seed's value is the mean over the folds. Probes pool as the recipe does.
Only what fine-tuning draws varies with its seed: head or its probe, order, augmentation, masking. RUN is one
pre-training; probes have nothing random but the fifth of the clips on which their penalty is chosen.
"""

import argparse
from pathlib import Path

import numpy as np

from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import RANDOM, STATISTICS, TRAINED
from ajepa.evaluate.result import EVALUATION_FILE, METRIC_TITLES, PRIMARY_METRIC, Evaluation
from ajepa.evaluate.task_data import task_folds
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.cross_validation import cross_validate
from ajepa.finetune.finetune import finetune
from ajepa.recipes.catalogue import finetune_recipe, override_recipe
from ajepa.recipes.finetune import Finetune, finetune_with_counts
from ajepa.training.trained_run import TrainedRun
from bench.machine import machine
from pipeline.store.feature_store import FeatureStore

OWN, PROBES = TASKS["own"], ("linear", "knn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("run", type=Path, help="a pre-trained run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the fine-tuned runs")
    parser.add_argument("--recipe", default="own-small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--labels", default="raw")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--scratch", type=int, default=0, help="seeds that start from random weights")
    asked = parser.parse_args()
    print(machine("torch"))
    pooling = recipe_of(asked, None, 0).model.pooling
    frozen = evaluate_run(
        asked.store,
        asked.run,
        device="cpu",
        pooling=pooling,
        probes=PROBES,
        label_sets=[asked.labels],
        out=asked.out / "frozen.json",
    )
    metric = METRIC_TITLES[PRIMARY_METRIC[frozen.scores[0].kind]]
    print(f"\n| | {metric}, trained on and measured on {asked.labels} labels |\n| --- | --- |")
    for name in (STATISTICS, RANDOM, TRAINED):
        told = [
            f"{probe} {frozen.find_score(name, probe, asked.labels).primary_estimate.value:.3f}"
            for probe in PROBES
        ]
        print(f"| {name}, frozen | {', '.join(told)} |", flush=True)
    start = TrainedRun.open(asked.run)
    rows = {"fine-tuned": (start, asked.seeds), "the same from random weights": (None, asked.scratch)}
    for name, (begin, seeds) in rows.items():
        values = [
            tuned(asked, begin, seed, asked.out / f"{name.replace(' ', '-')}-{seed}") for seed in range(seeds)
        ]
        if values:
            spread = f" +- {np.std(values, ddof=1):.3f}" if seeds > 1 else ""
            of_each = ", ".join(f"{value:.3f}" for value in values)
            print(f"| {name}, {seeds} seeds | {np.mean(values):.3f}{spread} ({of_each}) |", flush=True)


def recipe_of(asked: argparse.Namespace, start: TrainedRun | None, seed: int) -> Finetune:
    """What was asked for, with the encoder of the start."""
    recipe = finetune_recipe(asked.recipe)
    recipe = start.adapt_recipe(recipe) if start else recipe
    return finetune_with_counts(override_recipe(recipe, asked.settings), epochs=asked.epochs, seed=seed)


def tuned(asked: argparse.Namespace, start: TrainedRun | None, seed: int, path: Path) -> float:
    """The metric of one fine-tuned run, or the mean of one for each fold; a run that is there is carried on."""
    store, recipe = FeatureStore.open(asked.store), recipe_of(asked, start, seed)
    how = {"start": start, "label_set": asked.labels, "device": "cpu"}
    if task_folds(OWN, store):
        folds = cross_validate(store, OWN, recipe, path, **how)
        assert folds is not None  # in one process
        return folds.scores[0].primary_estimate.value
    run = finetune(store, OWN, recipe, path, **how)
    return Evaluation.read_json(run.path / EVALUATION_FILE).scores[0].primary_estimate.value


if __name__ == "__main__":
    main()
