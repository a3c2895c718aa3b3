"""The command of ajepa-train that fine-tunes.

The command of ajepa-train that studies label propagation.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ajepa.cli.options import finetuning, models, tasks
from pipeline.cli.options import Cache, CacheGb, completing, rules
from pipeline.files import CACHE_GB


def finetune(
    store: Annotated[str, typer.Option(help="Feature store, NAME.zarr or s3://...", show_default=False)],
    task: Annotated[
        str,
        typer.Option(
            help="audioset, esc50, fsd50k, speech-commands-v1, speech-commands-v2, voxceleb1-sid; own: any labels.",
            show_default=False,
            autocompletion=completing(tasks),
        ),
    ],
    run: Annotated[Path, typer.Option(help="Run folder to make or carry on.", show_default=False)],
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Run whose encoder to start from. [default: random weights]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Kind of classifier. [default: the recipe's]", autocompletion=completing(models)),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Name in recipes. [default: the task's]", autocompletion=completing(finetuning)),
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
    cache: Cache = None,
    cache_gb: CacheGb = CACHE_GB,
) -> None:
    """Fine-tune an encoder, or train a classifier, on a task.

    Held out, to be measured, are the task's own splits: eval, test, or one fold after the other.
    The same command again carries on exactly, and torchrun starts it on several GPUs; see pretrain.

    Example: ajepa-train finetune --store as20k.zarr --task own --from runs/a --run runs/b
    """
    from ajepa.evaluate.result import EVALUATION, Evaluation
    from ajepa.evaluate.task_data import folds_of, refuse_other_classes
    from ajepa.evaluate.tasks import task as named
    from ajepa.finetune.cross_validation import cross_validated
    from ajepa.finetune.finetune import finetune as stage
    from ajepa.recipes.catalogue import overridden, recipe_of
    from ajepa.recipes.finetune import resized
    from ajepa.training.distributed import joined
    from ajepa.training.trained_run import TrainedRun
    from pipeline.store.feature_store import FeatureStore

    with joined() as world:
        chosen, started = named(task), TrainedRun.open(start) if start else None
        made = recipe_of(model, recipe, chosen.recipe)
        made = started.adapt_recipe(made) if started else made
        made = resized(overridden(made, settings or []), epochs=epochs, clips_per_step=batch, seed=seed)
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
        if fold is None and folds_of(chosen, opened):
            folds = cross_validated(opened, chosen, made, run, **how)
            if folds:
                print(f"{run}: done, every fold\n{folds.table()}")
            return
        done = stage(opened, chosen, made, run, fold=fold, **how)
        if world.main:
            print(f"{run}: done, {done.step} steps\n{Evaluation.read(done.path / EVALUATION).table()}")


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
        str, typer.Option(help="Propagated label set of the stores.", autocompletion=completing(rules))
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
    from ajepa.finetune.hlp_study import RESULT, Study
    from ajepa.finetune.hlp_study import hlp_study as stage
    from ajepa.model.classifier import MODELS
    from ajepa.recipes.catalogue import finetune_recipe, recipe_of
    from ajepa.recipes.finetune import resized
    from pipeline.store.feature_store import FeatureStore

    named = {
        name: recipe_of(name, None, "audioset-20k") if name in MODELS else finetune_recipe(name)
        for name in (name.strip() for name in models.split(","))
    }
    study = Study(
        recipes={name: resized(made, steps=steps, clips_per_step=batch) for name, made in named.items()},
        stores=tuple(FeatureStore.open(place) for place in store),
        seeds=seeds,
        rule=rule,
        fsd50k=tuple(FeatureStore.open(place) for place in fsd50k or ()),
    )
    print(stage(study, out, device=device, loader=loader, progress=True).table())
    print(f"{out / RESULT}: every class, every seed")
