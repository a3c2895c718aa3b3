"""The commands that measure: evaluate, compare."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.command_line import Cache, CacheGb, to_write
from pipeline.files import CACHE_GB

app = typer.Typer()


@app.command()
def evaluate(
    store: Annotated[str, typer.Option(help="Feature store, NAME.zarr or s3://...", show_default=False)],
    run: Annotated[Path, typer.Option(help="Run folder made by pretrain.", show_default=False)],
    checkpoint: Annotated[str, typer.Option(help="last, best (by probe), or a step that is kept.")] = "last",
    probe: Annotated[
        list[str] | None, typer.Option(help="linear, knn or attentive; repeats. [default: all]")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Label sets, with commas. [default: all]", show_default=False)
    ] = "",
    kind: Annotated[
        Literal["auto", "single", "multi"], typer.Option(help="Labels a clip; auto: as they are.")
    ] = "auto",
    pooling: Annotated[
        Literal["mean", "frequency", "moments"] | None,
        typer.Option(help="frequency: by row of patches; moments: std over time too. [default: mean]"),
    ] = None,
    layer: Annotated[str, typer.Option(help="last, mean-K (last K blocks) or block-N.")] = "last",
    train_clips: Annotated[int, typer.Option(min=1, help="Most clips to train probes on.")] = 20_000,
    out: Annotated[
        Path | None, typer.Option(help="JSON file. [default: in the run]", callback=to_write)
    ] = None,
    per_class: Annotated[
        Path | None,
        typer.Option(help="CSV file for the average precision of every class.", callback=to_write),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")
    ] = "auto",
    cache: Cache = None,
    cache_gb: CacheGb = CACHE_GB,
) -> None:
    """Probe a run's frozen encoder, on its own store or another's.

    Measured on eval, or else on what is held out, or over fold1, fold2 ... in
    turns; settings are chosen on val, or else on a fifth of the train clips.
    Beside a random encoder and log-mel statistics; kept as RUN/evaluation.json,
    of another store as RUN/evaluation-STORE.json.

    Example: ajepa-train evaluate --store as20k.zarr --run runs/a
    """
    from ajepa import evaluate as stage
    from ajepa.evaluation import PROBES
    from ajepa.pooling import POOLING, Layer
    from pipeline.store import FeatureStore

    found = stage.evaluate(
        FeatureStore.open(store, cache=cache, cache_gb=cache_gb),
        run,
        checkpoint=checkpoint,
        device=device,
        train_clips=train_clips,
        pooling=pooling or POOLING,
        layer=Layer.named(layer),
        probes=tuple(probe or PROBES),
        labels=[name.strip() for name in labels.split(",") if name.strip()],
        kind=kind,
        out=out,
        progress=True,
    )
    if per_class is not None:
        found.write_classes(per_class)
    print(found.table())


@app.command()
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(help="Runs, or JSON files of evaluate or finetune.", show_default=False, exists=True),
    ],
) -> None:
    """Print results beside the published ones, and how they compare.

    Clips, classes, labels, training clips and protocol decide; sources:
    manifests/published_results.csv.

    Example: ajepa-train compare runs/a runs/finetuned
    """
    from ajepa.compare import compare as compared

    print(compared(results))
