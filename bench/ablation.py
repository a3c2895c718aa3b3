"""The masks of A-JEPA's ablation, over seeds: scores of the frozen encoder after the same number of steps.

    just bench ablation [--store demo/demo.zarr] [--plan curriculum --plan blocks ...] [--seeds 3] [--steps 300]

The default store is what `just demo` leaves: sounds that are formulas. All runs are the recipe `small` but for its
masks: `curriculum` (random blocks that give way to time-frequency aware masks, arXiv 2311.15830), `inverse` (the two
exchanged), `blocks` and `time-frequency` (each of the two throughout) and `small`, the recipe's own single patches.
Measured as `just bench learning` does. With `--out` runs and evaluations are kept, and carried on from.
"""

import argparse
import tempfile
from pathlib import Path

from ajepa.model.pooling import LAST_LAYER
from ajepa.recipes.catalogue import override_recipe
from ajepa.recipes.pretrain import small_recipe
from bench.learning import PROBES, format_spread, pretrain_and_evaluate
from bench.machine import machine

PLANS = ("curriculum", "inverse", "blocks", "time-frequency", "small")

STEPS = 300


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("demo/demo.zarr"))
    parser.add_argument("--plan", choices=PLANS, action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    print(machine("torch"))
    length = f"{options.steps} steps of {small_recipe().clips_per_step} clips"
    print(f"{options.store}: {length}, {options.seeds} seeds, raw labels, mAP")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        for plan in options.plan or PLANS:
            # A run of the plan for each seed.
            recipe = small_recipe()
            if plan != "small":
                recipe = override_recipe(recipe, [f"masks={plan}"])
            seeds = [
                pretrain_and_evaluate(
                    recipe.with_counts(steps=options.steps, seed=seed),
                    options.store,
                    [],
                    folder / f"{plan}-seed{seed}",
                    "moments",
                    LAST_LAYER,
                )
                for seed in range(options.seeds)
            ]

            # Its encoder, and once what every encoder is compared with.
            names = ["encoder"] if plan != PLANS[0] else ["encoder", "random init", "log-mel statistics"]
            for name in names:
                spreads = [format_spread(seeds, options.store.stem, name, probe, "raw") for probe in PROBES]
                cells = "".join(f"{spread:>16}" for spread in spreads)
                print(f"  {plan if name == 'encoder' else name:22}{cells}", flush=True)


if __name__ == "__main__":
    main()
