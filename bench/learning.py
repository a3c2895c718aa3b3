"""Does a recipe learn? Its frozen encoder against one with random weights and log-mel statistics, over seeds.

    just bench learning --store STORE [--task STORE ...] [--recipe small] [--seeds 3] [--steps N] [--out DIR]

Pre-trains on STORE once for each seed, then puts a linear probe and nearest neighbours on the clips of its eval split,
for each of its label sets, and on each task: any store of the same mel spec, with labels and a split named eval (or
folds) of other sources, such as `ajepa-data build-folder --table` makes. The seed draws initial weights, batches, masks
and the clips that a probe's penalty is chosen on. Each cell is the mean over the seeds and their standard deviation:
mAP, or accuracy where every clip has one label. With `--out` runs and evaluations are kept, and carried on from.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.result import METRIC_TITLES, PRIMARY_METRIC, Evaluation
from ajepa.model.pooling import EncoderLayer, PoolingName
from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.catalogue import override_recipe, pretrain_recipe
from ajepa.recipes.pretrain import Pretrain
from bench.machine import machine

PROBES = ("linear", "knn")


def pretrain_and_evaluate(
    recipe: Pretrain, store: Path, tasks: Sequence[Path], run: Path, pooling: PoolingName, layer: EncoderLayer
) -> dict[str, Evaluation]:
    """Pre-train a run; its evaluations on its own store and on each task, by the store's name."""
    began = time.process_time()
    pretrain(store, recipe, run, progress=True)
    minutes = (time.process_time() - began) / 60
    print(f"{run.name}: {minutes:.1f} CPU minutes of pre-training", flush=True)

    # An evaluation that is there is not made again.
    evaluations = {}
    for path in (store, *tasks):
        file = run / f"learning-{path.stem}.json"
        if not file.exists():
            evaluate_run(path, run, pooling=pooling, layer=layer, probes=PROBES, out=file, progress=True)
        evaluations[path.stem] = Evaluation.read_json(file)
    return evaluations


def format_table(seeds: Sequence[dict[str, Evaluation]]) -> str:
    """A block for each store and label set: mean and deviation over the seeds, by features and probe."""
    lines = []
    for name, first in seeds[0].items():
        protocol = first.protocol
        lines.append(f"\n{name}: {protocol.eval_clips} clips of {', '.join(protocol.eval_splits)}")
        for label_set in first.label_sets:
            scores = [score for score in first.scores if score.label_set == label_set]
            metric = METRIC_TITLES[PRIMARY_METRIC[scores[0].kind]]
            lines.append(
                f"  {label_set} labels, {scores[0].classes} classes; {metric}, chance {scores[0].chance:.3f}"
            )
            lines.append(f"    {'':22}{'linear':>16}{'kNN':>16}")
            for features in dict.fromkeys(score.features for score in scores):
                cells = [format_spread(seeds, name, features, probe, label_set) for probe in PROBES]
                lines.append(f"    {features:22}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def format_summary(seeds: Sequence[dict[str, Evaluation]]) -> str:
    """A Markdown table: a row for each kind of features, a column for each store, linear / kNN of its first labels."""
    first_seed = seeds[0]
    features = dict.fromkeys(
        score.features for evaluation in first_seed.values() for score in evaluation.scores
    )
    lines = ["| features | " + " | ".join(first_seed) + " |", "| --- " * (1 + len(first_seed)) + "|"]
    for name in features:
        cells = []
        for store, evaluation in first_seed.items():
            label_set = evaluation.label_sets[0]
            cells.append(" / ".join(format_spread(seeds, store, name, probe, label_set) for probe in PROBES))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_spread(
    seeds: Sequence[dict[str, Evaluation]], name: str, features: str, probe: str, label_set: str
) -> str:
    """Mean and standard deviation over the seeds."""
    values = [seed[name].find_score(features, probe, label_set).primary_estimate.value for seed in seeds]
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--task", type=Path, action="append", default=[])
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in ajepa-train")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pooling", choices=get_args(PoolingName), default="moments")
    parser.add_argument("--layer", default="last", help="last, mean-K, concat-K, concat-all or block-N")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    recipe = override_recipe(pretrain_recipe(options.recipe), options.set)

    # A run for each seed, in a folder that stays if one is named.
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        seeds = [
            pretrain_and_evaluate(
                recipe.with_counts(steps=options.steps, seed=seed),
                options.store,
                options.task,
                folder / f"seed{seed}",
                options.pooling,
                EncoderLayer.from_name(options.layer),
            )
            for seed in range(options.seeds)
        ]

    # What was measured, and how.
    print(machine("torch"))
    length = f"{options.steps or recipe.steps} steps of {recipe.clips_per_step}"
    print(f"recipe {recipe.name}, {length}; pooling {options.pooling}, layer {options.layer}")
    print(format_table(seeds))
    print(f"\n{format_summary(seeds)}")


if __name__ == "__main__":
    main()
