"""The command of ajepa-train that fine-tunes.

The command of ajepa-train that studies label propagation.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ajepa.cli.options import classifier_kind_names, finetune_recipe_names, task_names
from pipeline.cli.options import CacheFolder, CacheSizeGb, complete_from, propagation_rule_names
from pipeline.files import DEFAULT_CACHE_GB


def finetune(
    store: Annotated[str, typer.Option(help="Feature store, NAME.zarr or s3://...", show_default=False)],
    task: Annotated[
        str,
        typer.Option(
            help="audioset, esc50, fsd50k, speech-commands-v1, speech-commands-v2, voxceleb1-sid; own: any labels.",
            show_default=False,
            autocompletion=complete_from(task_names),
        ),
    ],
    run: Annotated[Path, typer.Option(help="Run folder to make or carry on.", show_default=False)],
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Run whose encoder to start from. [default: random weights]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Kind of classifier. [default: the recipe's]",
            autocompletion=complete_from(classifier_kind_names),
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name in recipes. [default: the task's]", autocompletion=complete_from(finetune_recipe_names)
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of the recipe; repeats."),
    ] = None,
    labels: Annotated[str, typer.Option(help="Label set to train on, raw or a rule's.")] = "raw",
    fold: Annotated[int | None, typer.Option(min=1, help="Fold to measure. [default: each]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs. [default: the recipe's]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips a step. [default: recipe's]")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Clips at once: less memory, same result. [default: all]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Head, order, changes. [default: 0]")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="auto: bf16 where the hardware has it; fp16: CUDA only."),
    ] = "auto",
    loader: Annotated[Literal["dali", "plain"], typer.Option(help="Same batches; plain: slower.")] = "dali",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory, same results, slower.")
    ] = False,
    on_broken: Annotated[
        Literal["raise", "skip"], typer.Option(help="skip: another clip of the step stands in.")
    ] = "raise",
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Fine-tune an encoder, or train a classifier, on a task.

    Held out, to be measured, are the task's own splits: eval, test, or one fold after the other.
    The same command again carries on exactly, and torchrun starts it on several GPUs; see pretrain.

    Example: ajepa-train finetune --store as20k.zarr --task own --from runs/a --run runs/b
    """
    from ajepa.evaluate.result import EVALUATION_FILE, Evaluation
    from ajepa.evaluate.task_data import refuse_other_classes, task_folds
    from ajepa.evaluate.tasks import find_task as named
    from ajepa.finetune.cross_validation import cross_validate
    from ajepa.finetune.finetune import finetune as stage
    from ajepa.recipes.catalogue import choose_finetune_recipe, override_recipe
    from ajepa.recipes.finetune import finetune_with_counts
    from ajepa.training.distributed import join_ranks
    from ajepa.training.trained_run import TrainedRun
    from pipeline.store.feature_store import FeatureStore

    with join_ranks() as world:
        chosen, started = named(task), TrainedRun.open(start) if start else None
        made = choose_finetune_recipe(model, recipe, chosen.recipe)
        made = started.adapt_recipe(made) if started else made
        made = finetune_with_counts(
            override_recipe(made, settings or []), epochs=epochs, clips_per_step=batch, seed=seed
        )
        opened = FeatureStore.open(store, cache=cache, cache_gb=cache_gb)
        how: dict[str, Any] = {
            "start": started,
            "label_set": labels,
            "micro_batch": micro_batch,
            "device": device,
            "precision": precision,
            "loader": loader,
            "recompute": recompute,
            "on_broken": on_broken,
            "progress": True,
        }
        refuse_other_classes(chosen, opened)
        if fold is None and task_folds(chosen, opened):
            folds = cross_validate(opened, chosen, made, run, **how)
            if folds:
                print(f"{run}: done, every fold\n{folds.format_table()}")
            return
        done = stage(opened, chosen, made, run, fold=fold, **how)
        if world.is_main:
            print(
                f"{run}: done, {done.newest_step} steps\n{Evaluation.read_json(done.path / EVALUATION_FILE).format_table()}"
            )


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
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each. [default: the recipe's]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips per step. [default: the recipe's]")] = None,
    rule: Annotated[
        str,
        typer.Option(
            help="Propagated label set of the stores.", autocompletion=complete_from(propagation_rule_names)
        ),
    ] = "unambiguous",
    fsd50k: Annotated[
        list[str] | None,
        typer.Option(help="Store of FSD50K to measure without training on it; repeats."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")
    ] = "auto",
    loader: Annotated[
        Literal["dali", "plain"], typer.Option(help="The plain one gives the same batches, slower.")
    ] = "dali",
) -> None:
    """Train each model on raw and on propagated labels.

    Both are measured on both. Differences are paired by seed. Runs, scores by class and OUT/hlp-study.json
    are kept; the same command again trains only what is missing.

    Example: ajepa-train hlp-study --store as20k.zarr --models cnn6 --out study
    """
    from ajepa.finetune.hlp_study import HLP_STUDY_FILE, HlpStudy
    from ajepa.finetune.hlp_study import run_hlp_study as stage
    from ajepa.model.classifier import CLASSIFIER_KINDS
    from ajepa.recipes.catalogue import choose_finetune_recipe, finetune_recipe
    from ajepa.recipes.finetune import finetune_with_counts
    from pipeline.store.feature_store import FeatureStore

    named = {
        name: choose_finetune_recipe(name, None, "audioset-20k")
        if name in CLASSIFIER_KINDS
        else finetune_recipe(name)
        for name in (name.strip() for name in models.split(","))
    }
    study = HlpStudy(
        recipes={
            name: finetune_with_counts(made, steps=steps, clips_per_step=batch)
            for name, made in named.items()
        },
        stores=tuple(FeatureStore.open(place) for place in store),
        seeds=seeds,
        rule=rule,
        fsd50k=tuple(FeatureStore.open(place) for place in fsd50k or ()),
    )
    print(stage(study, out, device=device, loader=loader, progress=True).format_table())
    print(f"{out / HLP_STUDY_FILE}: every class, every seed")
