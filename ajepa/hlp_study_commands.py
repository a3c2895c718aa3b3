"""The command of ajepa-train that studies label propagation."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.names import completing, rules


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
    from ajepa.finetune_recipes import finetune_recipe, recipe_of, resized
    from ajepa.hlp_study import RESULT, Study
    from ajepa.hlp_study import hlp_study as stage
    from ajepa.models import MODELS
    from pipeline.store import FeatureStore

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
