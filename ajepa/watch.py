"""Watching a run learn: its health, its probes, collapse, and what it costs; nothing of it is changed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ajepa.collapse import ADVICE, PATIENCE, in_a_row, signs
from ajepa.compute import Meter, step_cost
from ajepa.health import HealthBatch, health, health_rows
from ajepa.probing import Probe, open_probe
from ajepa.run import Json, Run
from ajepa.trainer import Trainer
from pipeline.errors import RunError
from pipeline.joined import AnyStore
from pipeline.loader import PlainLoader, View
from pipeline.order import Order

OnCollapse = Literal["stop", "warn"]


@dataclass(kw_only=True, slots=True)
class Watch:
    """What `loop.train` is watched by: the same is told on resume, to the bit, and no generator is drawn from."""

    run: Run
    trainer: Trainer
    meter: Meter
    fixed: HealthBatch | None
    probe: Probe | None
    on_collapse: OnCollapse
    say: Callable[[str], None]
    looks: list[Json]  # the last PATIENCE at the model's health

    def after(self, done: int) -> Json:
        """What is seen after `done` steps, every so often and after the last one; else nothing."""
        recipe, model = self.trainer.recipe, self.trainer.model
        self.meter.step(step_cost(recipe, self.trainer.shape, recompute=model.encoder.recompute))
        told: Json = {}
        if self.fixed is not None and self.due(done, recipe.health_every):
            told |= health(model, self.fixed)
            self.judge({"step": done, **told})
        if self.probe is not None and self.due(done, recipe.probe_every):
            told |= self.probe.scores(model)
        return told

    def due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.trainer.recipe.steps

    def judge(self, look: Json) -> None:
        """Remember a look at the model's health, and warn if it is the first to find a collapse."""
        self.looks = [*self.looks, look][-PATIENCE:]
        if in_a_row(self.looks) == 1:
            then = (
                f"; the run stops if {PATIENCE} looks in a row find it" if self.on_collapse == "stop" else ""
            )
            self.say(f"{self.run.path}: step {look['step']}: collapsing: {', '.join(signs(look))}{then}")

    def saving(self) -> None:
        """Write down what the run has cost up to the checkpoint that is about to be written."""
        self.meter.save(self.run.path)

    def ill(self) -> str | None:
        """That the run has collapsed, what was seen, and what to try."""
        if self.on_collapse == "warn" or in_a_row(self.looks) < PATIENCE:
            return None
        look = self.looks[-1]
        return (
            f"collapsed: {', '.join(signs(look))}, at {PATIENCE} looks in a row; seen in the checkpoint of step "
            f"{look['step']}; {ADVICE}, in another --run, or go on with --on-collapse warn"
        )


def open_watch(
    run: Run,
    trainer: Trainer,
    store: AnyStore,
    view: View,
    *,
    on_broken: Literal["raise", "skip"],
    on_collapse: OnCollapse,
    say: Callable[[str], None],
) -> Watch:
    """Everything that a run is watched with, from its newest checkpoint on; RunError where that has collapsed."""
    if on_collapse not in ("stop", "warn"):
        raise RunError(f"on_collapse must be stop or warn, got {on_collapse!r}")
    recipe, fixed = trainer.recipe, None
    if recipe.health_every:
        rows_N = health_rows(store, recipe.seed)
        order = Order(rows_N=rows_N, clips=len(rows_N), seed=recipe.seed)
        loader = PlainLoader(store, order, view, trainer.device, on_broken=on_broken, say=say)
        fixed = HealthBatch.of(loader.batch(0), recipe)
    meter = Meter(trainer.device, ranks=trainer.world.size)
    meter.resume(run.path, run.step)
    made = Watch(
        run=run,
        trainer=trainer,
        meter=meter,
        fixed=fixed,
        probe=open_probe(store, recipe, run.identity, on_broken, say),
        on_collapse=on_collapse,
        say=say,
        looks=[line for line in run.metrics() if "health_spread" in line][-PATIENCE:],
    )
    if why := made.ill():
        raise RunError(f"{run.path}: {why}")
    return made
