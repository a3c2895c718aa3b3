"""Watching a run learn: its health, its probes, collapse, and what it costs; nothing of it is changed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ajepa.collapse import ADVICE, PATIENCE, looks_in_a_row, signs
from ajepa.compute import Meter
from ajepa.health import HealthBatch, health, health_rows
from ajepa.jepa import Jepa
from ajepa.probing import BEST, Probe, open_probe
from ajepa.recipes import Pretrain
from ajepa.run import Json, Run
from pipeline.joined import AnyStore
from pipeline.loader import PlainLoader, View
from pipeline.order import Order

OnCollapse = Literal["stop", "warn"]


@dataclass(kw_only=True, slots=True)
class Watch:
    """Looks at a model between steps: what it finds is logged, and is the same on resume, to the bit.

    It draws from no generator of the run. `collapsed` counts the looks in a row that found a collapse.
    """

    run: Run
    model: Jepa
    recipe: Pretrain
    meter: Meter
    fixed: HealthBatch | None
    probe: Probe | None
    on_collapse: OnCollapse
    say: Callable[[str], None]
    collapsed: int = 0

    def after(self, done: int) -> Json:
        """What is seen after `done` steps, every so often and after the last one; else nothing."""
        told: Json = {}
        if self.fixed is not None and self.due(done, self.recipe.health_every):
            told |= health(self.model, self.fixed)
            self.judge(done, told)
        if self.probe is not None and self.due(done, self.recipe.probe_every):
            told |= self.probe.scores(self.model)
        return told

    def due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.recipe.steps

    def judge(self, done: int, line: Json) -> None:
        """Count a look that found a collapse, and warn of the first."""
        found = signs(line)
        self.collapsed = self.collapsed + 1 if found else 0
        if self.collapsed == 1:
            then = (
                "" if self.on_collapse == "warn" else f"; the run stops if {PATIENCE} looks in a row find it"
            )
            self.say(f"{self.run.path}: step {done}: collapsing: {', '.join(found)}{then}")

    def ill(self) -> str | None:
        """Why the run must not go on, if it must not."""
        if self.on_collapse == "warn" or self.collapsed < PATIENCE:
            return None
        looks = [line for line in self.run.metrics() if "health_rank" in line]
        return (
            f"collapsed: {', '.join(signs(looks[-1]))}, {self.collapsed} looks in a row; the checkpoint of step "
            f"{looks[-1]['step']} shows it; {ADVICE}, in another --run; or go on with --on-collapse warn"
        )

    def saving(self, done: int) -> None:
        """Write down what a checkpoint has cost, just before it is written."""
        self.meter.save(self.run.path)


def watch(
    run: Run,
    model: Jepa,
    meter: Meter,
    recipe: Pretrain,
    store: AnyStore,
    view: View,
    *,
    on_broken: Literal["raise", "skip"],
    on_collapse: OnCollapse,
    say: Callable[[str], None],
) -> Watch:
    """Open everything that a run is watched with, where the run stands."""
    fixed = None
    if recipe.health_every:
        rows_N = health_rows(store, recipe.seed)
        order = Order(rows_N=rows_N, clips=len(rows_N), seed=recipe.seed)
        loader = PlainLoader(store, order, view, meter.device, on_broken=on_broken, say=say)
        fixed = HealthBatch.of(loader.batch(0), recipe)
    meter.resume(run.path, run.step)
    return Watch(
        run=run,
        model=model,
        recipe=recipe,
        meter=meter,
        fixed=fixed,
        probe=open_probe(store, recipe, run.identity, on_broken, say),
        on_collapse=on_collapse,
        say=say,
        collapsed=looks_in_a_row(run.metrics()),
    )


def best_of(line: Json) -> float | None:
    """What tells which checkpoint is the best: `probing.BEST`, the more the better; None where it was not probed."""
    return line.get(BEST)
