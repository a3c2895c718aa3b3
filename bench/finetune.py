"""Is fine-tuning worth more than frozen probes, and these more than log-mel statistics: mAP over seeds, one store.

python -m bench.finetune STORE RUN --out FOLDER

Only what fine-tuning draws varies with its seed: head or its probe, order, augmentation, masking. RUN is one
pre-training; probes have nothing random but the fifth of the clips on which their penalty is chosen.
"""

import argparse
from pathlib import Path

import numpy as np

from ajepa.evaluate import evaluate
from ajepa.evaluation import EVALUATION, Evaluation
from ajepa.finetune import finetune
from ajepa.finetune_recipes import FINETUNE_PIECES, finetune_recipe, resized
from ajepa.overrides import overridden
from ajepa.start import Start
from ajepa.subject import RANDOM, STATISTICS, TRAINED
from ajepa.tasks.catalogue import TASKS
from bench.machine import machine


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
    print(f"\n| | mAP, trained on and measured on {asked.labels} labels |\n| --- | --- |")
    frozen = evaluate(asked.store, asked.run, device="cpu", out=asked.out / "frozen.json")
    for name in (STATISTICS, RANDOM, TRAINED):
        told = [f"{probe} {frozen.of(name, probe, asked.labels).map:.3f}" for probe in ("linear", "knn")]
        print(f"| {name}, frozen | {', '.join(told)} |", flush=True)
    start = Start.of(asked.run)
    rows = {"fine-tuned": (start, asked.seeds), "the same from random weights": (None, asked.scratch)}
    for name, (begin, seeds) in rows.items():
        values = [
            tuned(asked, begin, seed, asked.out / f"{name.replace(' ', '-')}-{seed}") for seed in range(seeds)
        ]
        if values:
            spread = f" +- {np.std(values, ddof=1):.3f}" if seeds > 1 else ""
            of_each = ", ".join(f"{value:.3f}" for value in values)
            print(f"| {name}, {seeds} seeds | {np.mean(values):.3f}{spread} ({of_each}) |", flush=True)


def tuned(asked: argparse.Namespace, start: Start | None, seed: int, path: Path) -> float:
    """mAP of one fine-tuned run; a run that is there is carried on."""
    recipe = finetune_recipe(asked.recipe)
    recipe = start.adopted(recipe) if start else recipe
    recipe = resized(overridden(recipe, asked.settings, FINETUNE_PIECES), epochs=asked.epochs, seed=seed)
    run = finetune(asked.store, TASKS["own"], recipe, path, start=start, label_set=asked.labels, device="cpu")
    return Evaluation.read(run.path / EVALUATION).scores[0].primary.value


if __name__ == "__main__":
    main()
