"""Fine-tuning against frozen probes, and these against log-mel statistics: over seeds, on one store.

python -m bench.finetune STORE RUN --out FOLDER

The metric is mAP, or accuracy where every clip has one label. A store in folds (`bench/esc50_shaped.py` makes one)
is cross-validated, and a seed's value is the mean over the folds. Probes pool as the recipe does. A seed of
fine-tuning decides head or its probe, order, augmentation and masking. RUN is a single pre-training; probes have
nothing random but the fifth of the clips on which their penalty is chosen.
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

OWN = TASKS["own"]

PROBES = ("linear", "knn")


def main() -> None:
    options = parse_options()
    print(machine("torch"))

    # Frozen probes, pooled as the recipe pools.
    frozen = evaluate_run(
        options.store,
        options.run,
        device="cpu",
        pooling=seed_recipe(options, None, 0).model.pooling,
        probes=PROBES,
        label_sets=[options.labels],
        out=options.out / "frozen.json",
    )
    metric = METRIC_TITLES[PRIMARY_METRIC[frozen.scores[0].kind]]
    labels = options.labels
    print(f"\n| | {metric}, trained on and measured on {labels} labels |\n| --- | --- |")
    for features in (STATISTICS, RANDOM, TRAINED):
        scores = {probe: frozen.find_score(features, probe, labels) for probe in PROBES}
        cells = [f"{probe} {score.primary_estimate.value:.3f}" for probe, score in scores.items()]
        print(f"| {features}, frozen | {', '.join(cells)} |", flush=True)

    # Fine-tuned runs, over seeds.
    start = TrainedRun.open(options.run)
    rows = {
        "fine-tuned": (start, options.seeds),
        "the same from random weights": (None, options.scratch),
    }
    for name, (encoder, seeds) in rows.items():
        values = [
            finetuned_score(options, encoder, seed, options.out / f"{name.replace(' ', '-')}-{seed}")
            for seed in range(seeds)
        ]
        if values:
            deviation = f" +- {np.std(values, ddof=1):.3f}" if seeds > 1 else ""
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"| {name}, {seeds} seeds | {np.mean(values):.3f}{deviation} ({each}) |", flush=True)


def parse_options() -> argparse.Namespace:
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
    return parser.parse_args()


def seed_recipe(options: argparse.Namespace, start: TrainedRun | None, seed: int) -> Finetune:
    """The recipe of one seed, with the encoder of the start."""
    recipe = finetune_recipe(options.recipe)
    if start:
        recipe = start.adapt_recipe(recipe)
    return finetune_with_counts(override_recipe(recipe, options.settings), epochs=options.epochs, seed=seed)


def finetuned_score(options: argparse.Namespace, start: TrainedRun | None, seed: int, path: Path) -> float:
    """The metric of one fine-tuned run, or the mean of one for each fold; a run that is there is carried on."""
    store = FeatureStore.open(options.store)
    recipe = seed_recipe(options, start, seed)
    how = {"start": start, "label_set": options.labels, "device": "cpu"}
    if task_folds(OWN, store):
        folds = cross_validate(store, OWN, recipe, path, **how)
        assert folds is not None  # in one process
        return folds.scores[0].primary_estimate.value
    run = finetune(store, OWN, recipe, path, **how)
    return Evaluation.read_json(run.path / EVALUATION_FILE).scores[0].primary_estimate.value


if __name__ == "__main__":
    main()
