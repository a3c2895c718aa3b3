"""ajepa-train: a feature store in, a pre-trained and measured encoder out."""

from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from pipeline.cli import run_app

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A feature store in, a pre-trained and measured audio encoder out.",
)

StorePath = Annotated[Path, typer.Option(help="Feature store, NAME.zarr.", show_default=False)]
RunPath = Annotated[Path, typer.Option(help="Run folder made by pretrain.", show_default=False)]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]


@app.command()
def pretrain(
    store: Annotated[list[Path], typer.Option(help="Feature store, NAME.zarr; repeats.", show_default=False)],
    run: Annotated[Path, typer.Option(help="Run folder to make or carry on.", show_default=False)],
    recipe: Annotated[str, typer.Option(help="Name in `ajepa-train recipes`.")] = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps. [default: the recipe's]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips per step. [default: the recipe's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Weights, order, crops, masks. [default: 0]")] = None,
    device: Device = "auto",
    loader: Annotated[
        Literal["dali", "plain"], typer.Option(help="The plain one gives the same batches, slower.")
    ] = "dali",
    store_weight: Annotated[
        list[float] | None,
        typer.Option(help="One for each --store: its share of the clips. [default: its clips' share]"),
    ] = None,
    shuffle: Annotated[
        Literal["full", "block"], typer.Option(help="block: for stores much larger than memory.")
    ] = "full",
    window: Annotated[int | None, typer.Option(min=1, help="Shards mixed at a time. [default: 64]")] = None,
) -> None:
    """Pre-train an encoder on every split of its stores but eval.

    The same command again carries on from the last checkpoint, exactly. Ctrl-C
    or SIGTERM write one and end with status 75.

    Example: ajepa-train pretrain --store as20k.zarr --recipe small --run runs/a
    """
    from ajepa import pretrain as stage
    from ajepa import recipes
    from ajepa.training_set import TrainingSet

    chosen = recipes.recipe(recipe).resized(steps=steps, clips_per_step=batch, seed=seed)
    trained_on = TrainingSet(
        paths=tuple(store), weights=tuple(store_weight or ()), shuffle=shuffle, window_blocks=window
    )
    done = stage.pretrain(trained_on, chosen, run, device=device, loader=loader, progress=True)
    print(f"{run}: done, {done.step} steps. Next: ajepa-train evaluate --store {store[0]} --run {run}")


@app.command()
def evaluate(
    store: StorePath,
    run: RunPath,
    train_clips: Annotated[int, typer.Option(min=1, help="Most clips to train probes on.")] = 20_000,
    device: Device = "auto",
) -> None:
    """Probe a run's frozen encoder: mAP on the eval split, raw and propagated.

    Linear probe and kNN, beside a random encoder and log-mel statistics; kept
    as RUN/evaluation.json.

    Example: ajepa-train evaluate --store as20k.zarr --run runs/a
    """
    from ajepa import evaluate as stage

    print(stage.evaluate(store, run, device=device, train_clips=train_clips, progress=True).table())


@app.command()
def recipes() -> None:
    """List the recipes: what each is, costs and should reach.

    Example: ajepa-train recipes
    """
    from ajepa.recipes import listing

    print(listing())


@app.command()
def report(
    store: StorePath,
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.", show_default=False)],
) -> None:
    """Draw a run: its curves, its masks over a clip, its probes.

    Example: ajepa-train report --store as20k.zarr --run runs/a --out report
    """
    from ajepa import report as seen

    for picture in seen.report(store, run, out):
        print(picture)


def main() -> NoReturn:
    """Run ajepa-train."""
    run_app(app)
