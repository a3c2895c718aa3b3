"""The commands of ajepa-train that train classifiers: finetune, hlp-study."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ajepa.cli.options import (
    CLASSIFIER_KIND_NAMES,
    FINETUNE_RECIPE_NAMES,
    TASK_NAMES,
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
    RecomputeOption,
    SettingsOption,
    StartCheckpointOption,
    StepsOption,
    StoreOption,
)
from pipeline.cli.options import PROPAGATION_RULE_NAMES, CacheFolder, CacheSizeGb, complete_from
from pipeline.files import DEFAULT_CACHE_GB


def finetune(
    store: StoreOption,
    task: Annotated[
        str,
        typer.Option(
            help="audioset, esc50, fsd50k, speech-commands-v1, speech-commands-v2, voxceleb1-sid; own: any labels.",
            show_default=False,
            autocompletion=complete_from(TASK_NAMES),
        ),
    ],
    run: NewRunOption,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Run whose encoder to start from. [default: random weights]"),
    ] = None,
    start_checkpoint: StartCheckpointOption = "last",
    model: Annotated[
        str | None,
        typer.Option(
            help="Kind of classifier. [default: the recipe's]",
            autocompletion=complete_from(CLASSIFIER_KIND_NAMES),
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name in recipes. [default: fits task and encoder]",
            autocompletion=complete_from(FINETUNE_RECIPE_NAMES),
        ),
    ] = None,
    settings: SettingsOption = None,
    labels: Annotated[str, typer.Option(help="Label set to train on, raw or a rule's.")] = "raw",
    fold: Annotated[int | None, typer.Option(min=1, help="Fold to measure. [default: each]")] = None,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    micro_batch: MicroBatchOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Head, order, changes. [default: 0]")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    loader: LoaderOption = "dali",
    recompute: RecomputeOption = False,
    on_broken: OnBrokenOption = "raise",
    on_bad_step: OnBadStepOption = "stop",
    logger: LoggerOption = None,
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Fine-tune an encoder, or train a classifier, on a task.

    The task's own splits are held out and measured: eval, test, or one fold after the other.
    The same command again carries on exactly. torchrun starts it on several GPUs, as pretrain.

    Example: ajepa-train finetune --store as20k.zarr --task own --from runs/a --run runs/b
    """
    from ajepa.evaluate.result import EVALUATION_FILE, Evaluation
    from ajepa.evaluate.task_data import refuse_other_classes, task_folds
    from ajepa.evaluate.tasks import find_task
    from ajepa.finetune import finetune as finetune_stage
    from ajepa.finetune.cross_validation import cross_validate
    from ajepa.finetune.setup import choose_recipe_for_start
    from ajepa.recipes.catalogue import choose_finetune_recipe, override_recipe
    from ajepa.recipes.finetune import finetune_with_counts
    from ajepa.training.distributed import join_ranks
    from ajepa.training.trained_run import TrainedRun
    from pipeline.messages import print_to_stderr
    from pipeline.store.feature_store import FeatureStore

    with join_ranks() as world:
        # What is learnt, from which weights, by which recipe
        chosen_task = find_task(task)
        trained_start = TrainedRun.open(start, start_checkpoint) if start else None
        chosen_recipe = choose_finetune_recipe(model, recipe, chosen_task.recipe)
        if trained_start is not None:
            if recipe is None and model in (None, "vit"):
                chosen_recipe, note = choose_recipe_for_start(chosen_recipe, trained_start)
                world.main_rank_only(print_to_stderr)(note)
            chosen_recipe = trained_start.adapt_recipe(chosen_recipe)
        chosen_recipe = override_recipe(chosen_recipe, settings or [])
        chosen_recipe = finetune_with_counts(
            chosen_recipe, steps=steps, epochs=epochs, clips_per_step=batch, seed=seed
        )

        # On which clips
        feature_store = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
        refuse_other_classes(chosen_task, feature_store)
        options: dict[str, Any] = {
            "start": trained_start,
            "label_set": labels,
            "micro_batch": micro_batch,
            "device": device,
            "precision": precision,
            "loader": loader,
            "recompute": recompute,
            "on_broken": on_broken,
            "on_bad_step": on_bad_step,
            "loggers": tuple(logger or ()),
            "progress": True,
        }

        # A store in folds: one run for each fold, and their mean
        if fold is None and task_folds(chosen_task, feature_store):
            evaluation = cross_validate(feature_store, chosen_task, chosen_recipe, run, **options)
            if evaluation:
                print(f"{run}: done, every fold\n{evaluation.format_table()}")
                print(next_command(run / "fold1"))
            return

        # Otherwise one run
        finished_run = finetune_stage.finetune(
            feature_store, chosen_task, chosen_recipe, run, fold=fold, **options
        )
        if world.is_main:
            evaluation = Evaluation.read_json(finished_run.path / EVALUATION_FILE)
            print(f"{run}: done, {finished_run.newest_step} steps\n{evaluation.format_table()}")
            print(next_command(run))


def next_command(run: Path) -> str:
    """Return the line that says what a classifier is for."""
    return f"Next: ajepa-train predict SOUNDS --model {run} --out classes.csv"


def hlp_study(
    store: Annotated[
        list[str],
        typer.Option(
            help="Feature store with propagated labels; repeats, one a mel spec.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for runs and result.", show_default=False)],
    models: Annotated[
        str, typer.Option(help="Recipes of classifiers, comma-separated; vit: audioset-20k.")
    ] = "cnn6,convnext,passt,vit",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each, with seeds from 0.")] = 3,
    steps: StepsOption = None,
    batch: BatchOption = None,
    rule: Annotated[
        str,
        typer.Option(
            help="Propagated label set of the stores.", autocompletion=complete_from(PROPAGATION_RULE_NAMES)
        ),
    ] = "unambiguous",
    fsd50k: Annotated[
        list[str] | None,
        typer.Option(help="Store of FSD50K to measure without training on it; repeats."),
    ] = None,
    device: DeviceOption = "auto",
    loader: LoaderOption = "dali",
) -> None:
    """Train each model on raw and on propagated labels.

    Every model is measured on both label sets; differences are paired by seed. OUT keeps the runs, the scores
    by class and hlp-study.json; the same command again trains only the runs that are missing.

    Example: ajepa-train hlp-study --store as20k.zarr --models cnn6 --out study
    """
    from ajepa.finetune.hlp_study import HLP_STUDY_FILE, HlpStudy, run_hlp_study
    from ajepa.model.classifier import CLASSIFIER_KINDS
    from ajepa.recipes.catalogue import choose_finetune_recipe, finetune_recipe
    from ajepa.recipes.finetune import finetune_with_counts
    from pipeline.store.feature_store import FeatureStore

    # One recipe for each model; a kind of classifier stands for its recipe for AudioSet
    recipes = {}
    for name in (part.strip() for part in models.split(",")):
        if name in CLASSIFIER_KINDS:
            recipe = choose_finetune_recipe(name, None, "audioset-20k")
        else:
            recipe = finetune_recipe(name)
        recipes[name] = finetune_with_counts(recipe, steps=steps, clips_per_step=batch)

    study = HlpStudy(
        recipes=recipes,
        stores=tuple(FeatureStore.open(location) for location in store),
        seeds=seeds,
        rule=rule,
        fsd50k=tuple(FeatureStore.open(location) for location in fsd50k or ()),
    )
    result = run_hlp_study(study, out, device=device, loader=loader, progress=True)
    print(result.format_table())
    print(f"{out / HLP_STUDY_FILE}: every class, every seed")
