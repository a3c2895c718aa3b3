"""ajepa-train: a feature store in, a pre-trained and measured encoder out."""

from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from ajepa.cli.embed import embed_app
from ajepa.cli.evaluate import evaluate_app
from ajepa.cli.finetune import finetune, hlp_study
from ajepa.cli.options import (
    BatchOption,
    DeviceOption,
    EpochsOption,
    LoaderOption,
    LoggerOption,
    MicroBatchOption,
    NewRunOption,
    OnBadStepOption,
    OnBrokenOption,
    PrecisionOption,
    PretrainRecipeOption,
    RecomputeOption,
    RunOption,
    SettingsOption,
    StartCheckpointOption,
    StepsOption,
    StoreOption,
)
from pipeline.cli.options import (
    CacheFolder,
    CacheSizeGb,
    add_version_option,
    check_output_path,
    run_command_line,
)
from pipeline.errors import InputError
from pipeline.files import DEFAULT_CACHE_GB

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A feature store in, a pre-trained and measured audio encoder out.",
)
add_version_option(app)
app.add_typer(evaluate_app)
app.add_typer(embed_app)


@app.command()
def pretrain(
    store: Annotated[list[str], typer.Option(help="NAME.zarr or s3://...; repeats.", show_default=False)],
    run: NewRunOption,
    recipe: PretrainRecipeOption = "small",
    start: Annotated[
        str | None,
        typer.Option("--from", help="Run, export, or ORG/NAME to begin with. [default: random weights]"),
    ] = None,
    start_checkpoint: StartCheckpointOption = "last",
    settings: SettingsOption = None,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    micro_batch: MicroBatchOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order, masks. [default: 0]")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    loader: LoaderOption = "dali",
    logger: LoggerOption = None,
    recompute: RecomputeOption = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile: 2 min to start, last bits differ."),
    ] = False,
    on_broken: OnBrokenOption = "raise",
    on_bad_step: OnBadStepOption = "stop",
    on_collapse: Annotated[
        Literal["auto", "stop", "warn"],
        typer.Option(metavar="WHEN", help="stop, warn; auto: by the width."),
    ] = "auto",
    store_weight: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Share of each --store. [default: that of its clips]"),
    ] = None,
    shuffle: Annotated[Literal["full", "block"], typer.Option(help="block: stores beyond memory.")] = "full",
    window: Annotated[int | None, typer.Option(min=1, help="Shards mixed at a time. [default: 64]")] = None,
    io: Annotated[
        Literal["pread", "mmap", "direct"],
        typer.Option(help="How shards are read; direct: past the page cache."),
    ] = "pread",
    check: Annotated[
        Literal["first-epoch", "always", "never"],
        typer.Option(metavar="WHEN", help="first-epoch: checksums compared when first read; always; never."),
    ] = "first-epoch",
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Pre-train an encoder; splits named eval or test are held out.

    The same command again carries on from the last checkpoint, exactly; after a bad
    step, also with another rate, gradient norm or precision. Ctrl-C, SIGTERM or
    SIGUSR1 write a checkpoint and end with status 75. On several GPUs:
    `torchrun --standalone --no-python --nproc-per-node 8 -- ajepa-train ...`.

    Example: ajepa-train pretrain --store as20k.zarr --recipe small --run runs/a
    """
    from ajepa.pretrain import pretrain as pretrain_stage
    from ajepa.pretrain.training_set import TrainingSet
    from ajepa.recipes import catalogue
    from ajepa.training.distributed import join_ranks
    from pipeline.messages import print_to_stderr
    from pipeline.store.feature_store import FeatureStore

    with join_ranks() as world:
        # What is trained, and on which stores
        tell = world.main_rank_only(print_to_stderr)
        chosen_recipe = pretrain_stage.recipe_as_begun(run, catalogue.pretrain_recipe(recipe), tell)
        chosen_recipe = catalogue.override_recipe(chosen_recipe, settings or [])
        chosen_recipe = chosen_recipe.with_counts(seed=seed)
        training_set = TrainingSet(
            stores=tuple(
                FeatureStore.open(location, io=io, check=check, cache=cache, cache_gb=cache_gb)
                for location in store
            ),
            weights=tuple(store_weight or ()),
            shuffle=shuffle,
            window_blocks=window,
        )

        # The run, from its newest checkpoint to its last step
        finished_run = pretrain_stage.pretrain(
            training_set,
            chosen_recipe,
            run,
            steps=steps,
            epochs=epochs,
            batch=batch,
            start=start,
            start_checkpoint=start_checkpoint,
            micro_batch=micro_batch,
            device=device,
            precision=precision,
            loader=loader,
            recompute=recompute,
            compiled=compiled,
            on_broken=on_broken,
            on_bad_step=on_bad_step,
            on_collapse=on_collapse,
            loggers=tuple(logger or ()),
            progress=True,
        )

        # Of several ranks one prints
        if world.is_main:
            store_options = f"{store[0]} --cache {cache}" if cache else store[0]
            next_command = f"ajepa-train evaluate --store {store_options} --run {run}"
            print(f"{run}: done, {finished_run.newest_step} steps. Next: {next_command}")


app.command()(finetune)
app.command("hlp-study")(hlp_study)


@app.command()
def recipes() -> None:
    """List the recipes: description, memory, cost and expected scores.

    Example: ajepa-train recipes
    """
    from ajepa.report.recipe_list import list_recipes

    print(list_recipes())


@app.command()
def masks(
    png: Annotated[Path, typer.Option(help="Picture to write.", show_default=False)],
    recipe: PretrainRecipeOption = "small",
    settings: SettingsOption = None,
    store: Annotated[
        str | None, typer.Option(help="Take a clip of this store. [default: a synthetic sound]")
    ] = None,
) -> None:
    """Draw the masks of a recipe over a clip, first step to last.

    `--set masks=NAME` takes another plan: curriculum, inverse, blocks,
    time-frequency, patches or spans.

    Example: ajepa-train masks --recipe a-jepa --png masks.png
    """
    from ajepa.recipes import catalogue
    from ajepa.report.masks import draw_recipe_masks

    chosen_recipe = catalogue.override_recipe(catalogue.pretrain_recipe(recipe), settings or [])
    print(draw_recipe_masks(chosen_recipe, png, store))


@app.command()
def report(
    store: StoreOption,
    run: RunOption,
    html: Annotated[
        Path | None, typer.Option(help="One page with everything on it.", callback=check_output_path)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for PNG files.")] = None,
    sounds: Annotated[
        bool, typer.Option("--sounds", help="The page plays neighbours, if their files are there.")
    ] = False,
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Show a run: scores beside baselines, masks, curves.

    The page also shows prediction errors, a map of clips and nearest neighbours. A
    fine-tuned run has only the page, with the confusions of its classifier.

    Example: ajepa-train report --store as20k.zarr --run runs/a --html run.html
    """
    from ajepa.report import pictures
    from pipeline.store.feature_store import FeatureStore

    if html is None and out is None:
        raise InputError("report: give --html FILE, --out FOLDER, or both")
    feature_store = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
    for picture in pictures.draw_run_report(feature_store, run, out, html=html, with_sounds=sounds):
        print(picture)


@app.command()
def doctor() -> None:
    """Check what training needs on this machine.

    Device, DALI, a few steps on a small store; takes about 15 s. Status 1 where
    something is broken; the line says how to mend it.

    Example: ajepa-train doctor
    """
    from tempfile import TemporaryDirectory

    from ajepa.cli.doctor import training_findings
    from pipeline.cli.doctor import report_checks

    with TemporaryDirectory() as trial:
        for line in report_checks(training_findings(Path(trial))):
            print(line, flush=True)


def main() -> NoReturn:
    """Run ajepa-train."""
    run_command_line(app)
