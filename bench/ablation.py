"""The masks of A-JEPA's ablation, each over seeds: what the frozen encoder is worth after the same number of steps.

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
from bench.learning import PROBES, measured, spread
from bench.machine import machine

PLANS = ("curriculum", "inverse", "blocks", "time-frequency", "small")

STEPS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("demo/demo.zarr"))
    parser.add_argument("--plan", choices=PLANS, action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    print(machine("torch"))
    print(
        f"{told.store}: {told.steps} steps of {small_recipe().clips_per_step} clips, {told.seeds} seeds, raw labels, mAP"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = told.out or Path(scratch)
        for plan in told.plan or PLANS:
            made = small_recipe() if plan == "small" else override_recipe(small_recipe(), [f"masks={plan}"])
            seeds = [
                measured(
                    made.with_counts(steps=told.steps, seed=seed),
                    told.store,
                    [],
                    folder / f"{plan}-seed{seed}",
                    "moments",
                    LAST_LAYER,
                )
                for seed in range(told.seeds)
            ]
            names = ["encoder"] if plan != PLANS[0] else ["encoder", "random init", "log-mel statistics"]
            for name in names:
                cells = [spread(seeds, told.store.stem, name, probe, "raw") for probe in PROBES]
                print(
                    f"  {plan if name == 'encoder' else name:22}" + "".join(f"{c:>16}" for c in cells),
                    flush=True,
                )


if __name__ == "__main__":
    main()
