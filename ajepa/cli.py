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
RecipeName = Annotated[str, typer.Option(help="Name in `ajepa-train recipes`.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A field of the recipe, schedule.peak_lr=1e-4; repeats."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]


@app.command()
def pretrain(
    store: StorePath,
    run: Annotated[Path, typer.Option(help="Run folder to make or carry on.", show_default=False)],
    recipe: RecipeName = "small",
    settings: Settings = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps. [default: the recipe's]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips per step. [default: the recipe's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Weights, order, crops, masks. [default: 0]")] = None,
    device: Device = "auto",
    loader: Annotated[
        Literal["dali", "plain"], typer.Option(help="The plain one gives the same batches, slower.")
    ] = "dali",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory, up to a third slower, same results.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile: a minute or two to start; last bits differ."),
    ] = False,
) -> None:
    """Pre-train an encoder on every split of a store but eval.

    The same command again carries on from the last checkpoint, exactly. Ctrl-C
    or SIGTERM write one and end with status 75.

    Example: ajepa-train pretrain --store as20k.zarr --recipe small --run runs/a
    """
    from ajepa import pretrain as stage
    from ajepa.overrides import overridden
    from ajepa.recipes import recipe as named

    chosen = overridden(named(recipe), settings or []).resized(steps=steps, clips_per_step=batch, seed=seed)
    done = stage.pretrain(
        store,
        chosen,
        run,
        device=device,
        loader=loader,
        recompute=recompute,
        compiled=compiled,
        progress=True,
    )
    print(f"{run}: done, {done.step} steps. Next: ajepa-train evaluate --store {store} --run {run}")


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
def masks(
    png: Annotated[Path, typer.Option(help="Picture to write.", show_default=False)],
    recipe: RecipeName = "small",
    settings: Settings = None,
    store: Annotated[
        Path | None, typer.Option(help="Take a clip of this store. [default: a formula's sound]")
    ] = None,
) -> None:
    """Draw what a recipe hides: masks over a clip, from its first step to its last.

    `--set masks=NAME` takes another plan: curriculum, inverse, blocks,
    time-frequency, patches or spans.

    Example: ajepa-train masks --recipe a-jepa --png masks.png
    """
    from ajepa.mask_picture import draw_masks
    from ajepa.overrides import overridden
    from ajepa.recipes import recipe as named

    print(draw_masks(overridden(named(recipe), settings or []), png, store))


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
