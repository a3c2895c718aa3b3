"""The commands that measure: evaluate, compare."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ajepa.cli.options import (
    CheckpointOption,
    DeviceOption,
    LayerOption,
    PoolingOption,
    RunOption,
    StoreOption,
)
from pipeline.cli.options import CacheFolder, CacheSizeGb, check_output_path, check_table_path
from pipeline.files import DEFAULT_CACHE_GB

evaluate_app = typer.Typer()


@evaluate_app.command()
def evaluate(
    store: StoreOption,
    run: RunOption,
    checkpoint: CheckpointOption = "last",
    probe: Annotated[
        list[str] | None,
        typer.Option(help="linear, knn, attentive; repeats. [default: all; fine-tuned: none]"),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Label sets, with commas. [default: all]", show_default=False)
    ] = "",
    kind: Annotated[Literal["auto", "single", "multi"], typer.Option(help="Labels a clip.")] = "auto",
    pooling: PoolingOption = None,
    layer: LayerOption = None,
    train_clips: Annotated[int, typer.Option(min=1, help="Most clips to train probes on.")] = 20_000,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file, replaced if there. [default: in the run]", callback=check_output_path),
    ] = None,
    per_class: Annotated[
        Path | None,
        typer.Option(help="CSV file with a row for each class.", callback=check_output_path),
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(metavar="TYPE", help="Of the network; auto: as it was trained. The rest is fp32."),
    ] = "auto",
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Measure a run on held-out clips of its store, or of another.

    A pre-trained run: probes on its frozen encoder, on a random one and on log-mel
    statistics. A fine-tuned run: its classifier, on the classes that store and run
    share; with --probe its frozen encoder. The clips are those of eval, or of the
    splits held out, or of all folds.

    The result is RUN/evaluation.json (-STORE for another store, -probes for probes
    of a fine-tuned run). One measured in another way is not replaced: give --out.

    Example: ajepa-train evaluate --store as20k.zarr --run runs/a
    """
    from ajepa.evaluate.evaluate import evaluate_run
    from ajepa.model.pooling import EncoderLayer
    from pipeline.store.feature_store import FeatureStore

    evaluation = evaluate_run(
        FeatureStore.open(store, cache=cache, cache_gb=cache_gb),
        run,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        train_clips=train_clips,
        pooling=pooling,
        layer=None if layer is None else EncoderLayer.from_name(layer),
        probes=tuple(probe) if probe else None,
        label_sets=[name.strip() for name in labels.split(",") if name.strip()],
        kind=kind,
        out=out,
        progress=True,
    )
    if per_class is not None:
        evaluation.write_class_table(per_class)
    print(evaluation.format_table())


@evaluate_app.command()
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(help="Runs, or JSON files of evaluate or finetune.", show_default=False, exists=True),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Also a table: .csv, .parquet or .jsonl.", callback=check_table_path),
    ] = None,
) -> None:
    """Print results side by side, and beside published ones.

    Results of the same clips by the same probe share a table, the best first, with
    the random encoder and log-mel statistics. Intervals are of each number alone.
    A published result is comparable if clips, classes, labels, training clips and
    protocol agree; the sources are in manifests/published_results.csv.

    Example: ajepa-train compare runs/a runs/finetuned
    """
    from ajepa.evaluate.compare import compare_results, comparison_table
    from pipeline.table_files import write_table_file

    print(compare_results(results))
    if out is not None:
        write_table_file(out, comparison_table(results))
