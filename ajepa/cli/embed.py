"""The commands of ajepa-train that put a model to use: embed, predict, nearest, export, push, load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ajepa.cli.options import CheckpointOption, DeviceOption, LayerOption, ModelOption, PoolingOption
from pipeline.cli.options import CacheFolder, CacheSizeGb, check_output_path, check_table_path
from pipeline.files import DEFAULT_CACHE_GB
from pipeline.messages import print_to_stderr

embed_app = typer.Typer(rich_markup_mode=None)


# Names of sounds may begin with a dash: 3 % of the ids of AudioSet do.
DASHES_ALLOWED = {"ignore_unknown_options": True}


def refuse_misspelt_options(sounds: Sequence[str]) -> None:
    """BadParameter for what is neither a file nor an option that exists."""
    for sound in sounds:
        if sound.startswith("--") and not Path(sound).exists():
            raise typer.BadParameter(f"no such option, and no such file: {sound}", param_hint="SOUNDS")


@embed_app.command(context_settings=DASHES_ALLOWED)
def embed(
    sounds: Annotated[
        list[str], typer.Argument(help="Audio files, folders and archives; or one store.", show_default=False)
    ],
    model: ModelOption,
    out: Annotated[
        Path,
        typer.Option(
            help="Table to write or carry on: .parquet, .csv or .jsonl.",
            show_default=False,
            callback=check_table_path,
        ),
    ],
    checkpoint: CheckpointOption = "last",
    frames: Annotated[bool, typer.Option("--frames", help="Also one vector a time column.")] = False,
    pooling: PoolingOption = None,
    layer: LayerOption = None,
    overlap: Annotated[
        float, typer.Option(min=0, max=0.95, help="Share of a window that the next one repeats.")
    ] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows encoded at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode ahead.")] = 2,
    device: DeviceOption = "auto",
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Embed sounds as rows of a table.

    Sounds may have any length, rate and container. The same command again carries on. A sound that cannot be used
    gets a row without an embedding, with the reason; status 1 if no sound can be used.

    Pooling and layer are those that probes found best when the run was trained; the
    table's metadata say which were used, and why.

    Example: ajepa-train embed sounds/ --model runs/a --out emb.parquet
    """
    refuse_misspelt_options(sounds)
    from ajepa.embed import embedder
    from ajepa.embed.embedding_job import make_embedding_job
    from ajepa.embed.table import (
        convert_embedding_table,
        parquet_table_path,
        summarise_table,
        write_embedding_table,
    )

    loaded_embedder = embedder.load(
        model,
        at=checkpoint,
        device=device,
        pooling=pooling,
        layer=layer,
        overlap=overlap,
    )
    if not loaded_embedder.features.is_fallback:
        print_to_stderr(f"{model}: vectors are {loaded_embedder.features.description}")
    job = make_embedding_job(sounds, loaded_embedder, cache=cache, cache_gb=cache_gb)
    table = parquet_table_path(out, frames=frames)
    counts = write_embedding_table(
        loaded_embedder, job, table, frames=frames, batch=batch, workers=workers, progress=True
    )
    print(summarise_table(table, counts))
    if table != out:
        convert_embedding_table(table, out)
        print(f"{out}: the same table; `nearest` reads {table}")


@embed_app.command(context_settings=DASHES_ALLOWED)
def predict(
    sounds: Annotated[
        list[str], typer.Argument(help="Audio files, folders and archives; or one store.", show_default=False)
    ],
    model: ModelOption,
    out: Annotated[
        Path,
        typer.Option(
            help="Table to write or carry on: .csv, .parquet or .jsonl.",
            show_default=False,
            callback=check_table_path,
        ),
    ],
    top: Annotated[
        int, typer.Option(min=0, help="How many best classes; 0: a column of scores for each class.")
    ] = 5,
    hop_seconds: Annotated[
        float | None,
        typer.Option(help="Also scores over time, every so many seconds.", show_default=False),
    ] = None,
    checkpoint: CheckpointOption = "last",
    batch: Annotated[int, typer.Option(min=1, help="Windows scored at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode ahead.")] = 2,
    device: DeviceOption = "auto",
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Predict the classes of sounds with a fine-tuned model.

    Sounds may have any length, rate and container. The same command again carries
    on. A sound that cannot be used gets a row with the reason; status 1 if no
    sound can be used. Scores are those of softmax where every clip of the run has
    one class, else of sigmoid.

    Example: ajepa-train predict sounds/ --model runs/b --out classes.csv
    """
    refuse_misspelt_options(sounds)
    from ajepa.embed.embedding_job import make_embedding_job
    from ajepa.embed.prediction_table import write_prediction_table
    from ajepa.embed.predictor import load_predictor

    predictor = load_predictor(model, at=checkpoint, device=device)
    job = make_embedding_job(sounds, predictor, cache=cache, cache_gb=cache_gb)
    print(
        write_prediction_table(
            predictor,
            job,
            out,
            top=top,
            hop_seconds=hop_seconds,
            batch=batch,
            workers=workers,
            progress=True,
        )
    )


@embed_app.command(context_settings=DASHES_ALLOWED)
def nearest(
    query: Annotated[Path, typer.Argument(help="Audio file.", show_default=False)],
    index: Annotated[Path, typer.Option(help="Table made by embed.", show_default=False)],
    model: ModelOption,
    checkpoint: CheckpointOption = "last",
    count: Annotated[int, typer.Option("-k", "--count", "--top", min=1, help="How many to list.")] = 10,
    device: DeviceOption = "auto",
) -> None:
    """List the sounds of a table that are most similar to one.

    Similarity is the cosine of embeddings, each value standardised over the table.

    Example: ajepa-train nearest bird.wav --index emb.parquet --model runs/a
    """
    refuse_misspelt_options([str(query)])
    from ajepa.embed.nearest import nearest_sounds

    for sound in nearest_sounds(query, index, model, count=count, device=device, at=checkpoint):
        labels = f"  ({', '.join(sound.labels)})" if sound.labels else ""
        print(f"{sound.similarity:6.3f}  {sound.seconds:8.2f} s  {sound.path}{labels}")


@embed_app.command()
def export(
    model: Annotated[str, typer.Argument(help="Run, or exported folder or file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    checkpoint: CheckpointOption = "last",
    licence: Annotated[
        str | None, typer.Option(help="Of the weights, such as cc-by-4.0: yours to state.")
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Also an ONNX file, audio to embeddings.", callback=check_output_path)
    ] = None,
    torch_export: Annotated[
        Path | None, typer.Option(help="Also a torch.export file, NAME.pt2.", callback=check_output_path)
    ] = None,
    pooling: PoolingOption = None,
    layer: LayerOption = None,
    audio_hz: Annotated[int, typer.Option(min=1, help="Samples a second of the audio.")] = 32_000,
) -> None:
    """Write a model as safetensors, configuration and model card.

    A fine-tuned run keeps its classes. ONNX and torch.export files take windows of
    audio, any batch, at --audio-hz, and give embeddings and scores; they resample
    and compute the log-mel themselves; --pooling and --layer are theirs alone.

    Example: ajepa-train export runs/a --out a-jepa-as20k --licence cc-by-4.0
    """
    from ajepa.embed import embedder, export_graph
    from ajepa.embed.export import add_graph_to_card, export_encoder

    # Weights, configuration and card
    exported = export_encoder(model, out, licence=licence, at=checkpoint)
    print(f"{out}: model {exported.model_id}. Next: ajepa-train push {out} ORG/NAME")

    # One network from audio to embeddings, in the formats that were asked for
    if onnx or torch_export:
        exported_embedder = embedder.load(out, device="cpu", pooling=pooling, layer=layer)
        graph = export_graph.AudioGraph(exported_embedder, audio_hz)
        inputs = f"windows of {graph.samples} samples at {audio_hz} Hz, any batch"
        if onnx:
            export_graph.write_onnx(graph, onnx)
            print(f"{onnx}: ONNX, opset {export_graph.ONNX_OPSET}, {inputs}")
        if torch_export:
            export_graph.write_program(graph, torch_export)
            print(f"{torch_export}: torch.export, {inputs}")
        files = [file for file in (onnx, torch_export) if file]
        add_graph_to_card(out, files, graph.describe_interface(), audio_hz, has_scores=graph.head is not None)


@embed_app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder made by export.", show_default=False)],
    place: Annotated[str, typer.Argument(help="ORG/NAME on the Hugging Face hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Put an exported model on the Hugging Face hub.

    Example: ajepa-train push a-jepa-as20k me/a-jepa-as20k
    """
    from ajepa.embed.hub import push_to_hub

    url = push_to_hub(folder, place, private=private)
    print(f"{url}: load it with ajepa.load('{place}')")


@embed_app.command()
def load(
    model: Annotated[
        str, typer.Argument(help="ORG/NAME[@REVISION] of the hub, run or export.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to keep it in.", show_default=False)] = None,
) -> None:
    """Fetch a model and describe it.

    It reads safetensors only and runs no code of the model's.

    Example: ajepa-train load me/a-jepa-as20k --out a-jepa-as20k
    """
    from ajepa.embed.export import SHOWN_CLASSES, encoder_facts
    from ajepa.embed.hub import copy_from_hub
    from ajepa.embed.pretrained import load_pretrained

    pretrained = load_pretrained(model)
    facts = {
        "model id": pretrained.model_id,
        "recipe": pretrained.recipe_name,
        "mel spec": pretrained.mel.name,
        **encoder_facts(pretrained),
        "licence": pretrained.licence or "not stated",
    }
    if pretrained.head is not None:
        names = pretrained.head.class_names
        facts["classes"] = (
            f"{len(names)}: {', '.join(names[:SHOWN_CLASSES])}{' ...' * (len(names) > SHOWN_CLASSES)}"
        )
    for name, value in facts.items():
        print(f"{name:9} {value}")
    if out is not None:
        print(f"{copy_from_hub(model, out)}: kept")
