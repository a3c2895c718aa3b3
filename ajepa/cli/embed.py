"""The commands of ajepa-train that put an encoder to use: embed, nearest, export, push, load."""

from pathlib import Path
from typing import Annotated

import typer

from ajepa.cli.options import CheckpointOption, DeviceOption, LayerOption, ModelOption, PoolingOption
from pipeline.cli.options import CacheFolder, CacheSizeGb, check_output_path
from pipeline.files import DEFAULT_CACHE_GB

embed_app = typer.Typer(rich_markup_mode=None)


# Names of sounds may begin with a dash: 3 % of the ids of AudioSet do.
@embed_app.command(context_settings={"ignore_unknown_options": True})
def embed(
    sounds: Annotated[
        list[str], typer.Argument(help="Audio files, folders and archives; or one store.", show_default=False)
    ],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Parquet table to write or carry on.", show_default=False)],
    checkpoint: CheckpointOption = "last",
    frames: Annotated[bool, typer.Option("--frames", help="Also one vector a time column.")] = False,
    pooling: PoolingOption = "mean",
    layer: LayerOption = "last",
    overlap: Annotated[
        float, typer.Option(min=0, max=0.95, help="Share of a window that the next one repeats.")
    ] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows encoded at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode ahead.")] = 2,
    device: DeviceOption = "auto",
    cache: CacheFolder = None,
    cache_gb: CacheSizeGb = DEFAULT_CACHE_GB,
) -> None:
    """Embed sounds as rows of a Parquet table.

    Sounds may have any length, rate and container. The same command again carries on. A sound that cannot be used
    gets a row without an embedding, with the reason; status 1 if no sound can be used.

    Example: ajepa-train embed sounds/ --model runs/a --out emb.parquet
    """
    # What is neither a file nor an option that exists is a misspelt option.
    for sound in sounds:
        if sound.startswith("--") and not Path(sound).exists():
            raise typer.BadParameter(f"no such option, and no such file: {sound}", param_hint="SOUNDS")

    from ajepa.embed import embedder
    from ajepa.embed.table import make_embedding_job, summarise_table, write_embedding_table

    loaded_embedder = embedder.load(
        model,
        at=checkpoint,
        device=device,
        pooling=pooling,
        layer=layer,
        overlap=overlap,
    )
    job = make_embedding_job(sounds, loaded_embedder, cache=cache, cache_gb=cache_gb)
    counts = write_embedding_table(
        loaded_embedder, job, out, frames=frames, batch=batch, workers=workers, progress=True
    )
    print(summarise_table(out, counts))


@embed_app.command()
def nearest(
    query: Annotated[Path, typer.Argument(help="Audio file.", show_default=False)],
    index: Annotated[Path, typer.Option(help="Table made by embed.", show_default=False)],
    model: ModelOption,
    checkpoint: CheckpointOption = "last",
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many to list.")] = 10,
    device: DeviceOption = "auto",
) -> None:
    """List the sounds of a table that are most similar to one.

    Similarity is the cosine of embeddings, each value standardised over the table.

    Example: ajepa-train nearest bird.wav --index emb.parquet --model runs/a
    """
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
    pooling: PoolingOption = "mean",
    layer: LayerOption = "last",
    audio_hz: Annotated[int, typer.Option(min=1, help="Samples a second of the audio.")] = 32_000,
) -> None:
    """Write an encoder as safetensors, configuration and model card.

    ONNX and torch.export files take windows of audio, any batch, at --audio-hz.
    They resample to the rate of the mel spec and compute the log-mel themselves;
    --pooling and --layer are theirs alone.

    Example: ajepa-train export runs/a --out a-jepa-as20k --licence cc-by-4.0
    """
    from ajepa.embed import embedder, export_graph
    from ajepa.embed.export import export_encoder

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
    from ajepa.embed.export import encoder_facts
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
    for name, value in facts.items():
        print(f"{name:9} {value}")
    if out is not None:
        print(f"{copy_from_hub(model, out)}: kept")
