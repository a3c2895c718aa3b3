"""ajepa-train: a feature store in, a pre-trained and measured encoder out."""

from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from ajepa.cli import embed, evaluate
from ajepa.cli.finetune import finetune, hlp_study
from ajepa.cli.options import pretrain_recipe_names
from pipeline.cli.options import CacheFolder, CacheSizeGb, check_output_path, complete_from, run_command_line
from pipeline.errors import InputError
from pipeline.files import DEFAULT_CACHE_GB

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A feature store in, a pre-trained and measured audio encoder out.",
)

app.add_typer(evaluate.evaluate_app)

app.add_typer(embed.embed_app)

StoreOption = Annotated[str, typer.Option(help="Feature store, NAME.zarr or s3://...", show_default=False)]

StoresOption = Annotated[list[str], typer.Option(help="NAME.zarr or s3://...; repeats.", show_default=False)]

RunOption = Annotated[Path, typer.Option(help="Run folder of pretrain or finetune.", show_default=False)]

RecipeOption = Annotated[
    str,
    typer.Option(help="Name in `ajepa-train recipes`.", autocompletion=complete_from(pretrain_recipe_names)),
]

SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Recipe field, schedule.peak_lr=1e-4; repeats."),
]

DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]


@app.command()
def pretrain(
    store: StoresOption,
    run: Annotated[Path, typer.Option(help="Run folder to make or carry on.", show_default=False)],
    recipe: RecipeOption = "small",
    settings: SettingsOption = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps. [default: the recipe's]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips per step. [default: the recipe's]")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Clips at once: less memory, same result. [default: all]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order, masks. [default: 0]")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(
            metavar="TYPE", help="fp32, bf16, fp16 (CUDA only), or auto: bf16 where the hardware has it."
        ),
    ] = "auto",
    loader: Annotated[
        Literal["dali", "plain"], typer.Option(help="plain: the same batches, slower.")
    ] = "dali",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory, up to a third slower, same results.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile: 2 min to start, last bits differ."),
    ] = False,
    on_broken: Annotated[
        Literal["raise", "skip"], typer.Option(help="skip: another clip stands in.")
    ] = "raise",
    on_collapse: Annotated[
        Literal["stop", "warn"], typer.Option(help="When features become all alike.")
    ] = "stop",
    store_weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE", help="One for each --store: its share of the clips. [default: its clips' share]"
        ),
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

    The same command again carries on from the last checkpoint, exactly. Ctrl-C,
    SIGTERM or SIGUSR1 write one and end with status 75. On several GPUs:
    `torchrun --standalone --no-python --nproc-per-node 8 -- ajepa-train ...`.

    Example: ajepa-train pretrain --store as20k.zarr --recipe small --run runs/a
    """
    from ajepa.pretrain import pretrain as stage
    from ajepa.pretrain.training_set import TrainingSet
    from ajepa.recipes.catalogue import override_recipe
    from ajepa.recipes.catalogue import pretrain_recipe as named
    from ajepa.training.distributed import join_ranks
    from pipeline.store.feature_store import FeatureStore

    with join_ranks() as world:
        chosen = override_recipe(named(recipe), settings or [])
        stores = (FeatureStore.open(s, io=io, check=check, cache=cache, cache_gb=cache_gb) for s in store)
        trained_on = TrainingSet(
            stores=tuple(stores),
            weights=tuple(store_weight or ()),
            shuffle=shuffle,
            window_blocks=window,
        )
        done = stage.pretrain(
            trained_on,
            chosen.with_counts(steps=steps, clips_per_step=batch, seed=seed),
            run,
            micro_batch=micro_batch,
            device=device,
            precision=precision,
            loader=loader,
            recompute=recompute,
            compiled=compiled,
            on_broken=on_broken,
            on_collapse=on_collapse,
            progress=True,
        )
        if world.is_main:
            there = f"{store[0]} --cache {cache}" if cache else store[0]
            print(
                f"{run}: done, {done.newest_step} steps. Next: ajepa-train evaluate --store {there} --run {run}"
            )


app.command()(finetune)

app.command("hlp-study")(hlp_study)


@app.command()
def recipes() -> None:
    """List the recipes: what each is, needs, costs and should reach.

    Example: ajepa-train recipes
    """
    from ajepa.report.recipe_list import list_recipes

    print(list_recipes())


@app.command()
def masks(
    png: Annotated[Path, typer.Option(help="Picture to write.", show_default=False)],
    recipe: RecipeOption = "small",
    settings: SettingsOption = None,
    store: Annotated[
        str | None, typer.Option(help="Take a clip of this store. [default: a formula's sound]")
    ] = None,
) -> None:
    """Draw what a recipe hides over a clip, first step to last.

    `--set masks=NAME` takes another plan: curriculum, inverse, blocks,
    time-frequency, patches or spans.

    Example: ajepa-train masks --recipe a-jepa --png masks.png
    """
    from ajepa.recipes.catalogue import override_recipe
    from ajepa.recipes.catalogue import pretrain_recipe as named
    from ajepa.report.masks import draw_recipe_masks

    print(draw_recipe_masks(override_recipe(named(recipe), settings or []), png, store))


@app.command()
def report(
    store: StoreOption,
    run: RunOption,
    html: Annotated[
        Path | None, typer.Option(help="One page with everything on it.", callback=check_output_path)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for PNG files.")] = None,
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Show a run: curves, masks, probes.

    The page also has what its encoder makes of clips; a fine-tuned run has only
    the page, with what its classifier was found to know.

    Example: ajepa-train report --store as20k.zarr --run runs/a --html run.html
    """
    from ajepa.report import pictures as seen
    from pipeline.store.feature_store import FeatureStore

    if html is None and out is None:
        raise InputError("report: give --html FILE, --out FOLDER, or both")
    opened = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
    for picture in seen.draw_run_report(opened, run, out, html=html):
        print(picture)


@app.command()
def doctor() -> None:
    """Look at what training needs here.

    Device, DALI, a few steps on a small store; takes about 15 s. Status 1 where
    something is broken, with what mends it.

    Example: ajepa-train doctor
    """
    from tempfile import TemporaryDirectory

    from ajepa.cli.doctor import training_findings
    from pipeline.cli.doctor import told

    with TemporaryDirectory() as trial:
        for line in told(training_findings(Path(trial))):
            print(line, flush=True)


def main() -> NoReturn:
    """Run ajepa-train."""
    run_command_line(app)
