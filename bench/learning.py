"""Does a recipe learn? Its frozen encoder beside the same at random init and log-mel statistics, over seeds.

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


def measured(
    made: Pretrain, store: Path, tasks: Sequence[Path], run: Path, pooling: PoolingName, layer: EncoderLayer
) -> dict[str, Evaluation]:
    """A run of this recipe, and what was found of it on its own store and on each task."""
    began = time.process_time()
    pretrain(store, made, run, progress=True)
    minutes = (time.process_time() - began) / 60
    print(f"{run.name}: {minutes:.1f} CPU minutes of pre-training", flush=True)
    found = {}
    for each in (store, *tasks):
        kept = run / f"learning-{each.stem}.json"
        if not kept.exists():
            evaluate_run(each, run, pooling=pooling, layer=layer, probes=PROBES, out=kept, progress=True)
        found[each.stem] = Evaluation.read_json(kept)
    return found


def table(seeds: Sequence[dict[str, Evaluation]]) -> str:
    """A block for each store and label set: mean and deviation over the seeds, by features and probe."""
    lines = []
    for name, first in seeds[0].items():
        told = first.protocol
        lines.append(f"\n{name}: {told['eval_clips']} clips of {', '.join(told['eval_splits'])}")
        for label_set in first.label_sets:
            rows = [score for score in first.scores if score.label_set == label_set]
            title = METRIC_TITLES[PRIMARY_METRIC[rows[0].kind]]
            lines.append(
                f"  {label_set} labels, {rows[0].classes} classes; {title}, chance {rows[0].chance:.3f}"
            )
            lines.append(f"    {'':22}{'linear':>16}{'kNN':>16}")
            for features in dict.fromkeys(score.features for score in rows):
                cells = [spread(seeds, name, features, probe, label_set) for probe in PROBES]
                lines.append(f"    {features:22}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def spread(
    seeds: Sequence[dict[str, Evaluation]], name: str, features: str, probe: str, label_set: str
) -> str:
    values = [seed[name].find_score(features, probe, label_set).primary_estimate.value for seed in seeds]
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--task", type=Path, action="append", default=[])
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in ajepa-train")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pooling", choices=get_args(PoolingName), default="moments")
    parser.add_argument("--layer", default="last", help="last, mean-K or block-N")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    made = override_recipe(pretrain_recipe(told.recipe), told.set)
    with tempfile.TemporaryDirectory() as scratch:
        folder = told.out or Path(scratch)
        seeds = [
            measured(
                made.with_counts(steps=told.steps, seed=seed),
                told.store,
                told.task,
                folder / f"seed{seed}",
                told.pooling,
                EncoderLayer.from_name(told.layer),
            )
            for seed in range(told.seeds)
        ]
    print(machine("torch"))
    length = f"{told.steps or made.steps} steps of {made.clips_per_step}"
    print(f"recipe {made.name}, {length}; pooling {told.pooling}, layer {told.layer}")
    print(table(seeds))


if __name__ == "__main__":
    main()
