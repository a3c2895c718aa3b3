"""The commands of ajepa-train that put an encoder to use: embed, nearest, export, push, load."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.command_line import Cache, CacheGb
from pipeline.files import CACHE_GB

app = typer.Typer(rich_markup_mode=None)

Model = Annotated[
    str, typer.Option(help="Run, exported folder or file, or ORG/NAME of the hub.", show_default=False)
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]


@app.command()
def embed(
    sounds: Annotated[
        list[str], typer.Argument(help="Audio files, folders and archives; or one store.", show_default=False)
    ],
    model: Model,
    out: Annotated[Path, typer.Option(help="Parquet table to write or carry on.", show_default=False)],
    frames: Annotated[bool, typer.Option("--frames", help="Also one vector a time column.")] = False,
    pooling: Annotated[
        Literal["mean", "frequency"], typer.Option(help="frequency: band by band, wider.")
    ] = "mean",
    layer: Annotated[str, typer.Option(help="last, mean-K (of the last K blocks) or block-N.")] = "last",
    overlap: Annotated[
        float, typer.Option(min=0, max=0.95, help="Share of a window that the next one repeats.")
    ] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows encoded at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode ahead.")] = 2,
    device: Device = "auto",
    cache: Cache = None,
    cache_gb: CacheGb = CACHE_GB,
) -> None:
    """Embed sounds of any length, rate and container as rows of a Parquet table.

    The same command again carries on. A sound that cannot be used is a row
    without an embedding, with its reason.

    Example: ajepa-train embed sounds/ --model runs/a --out emb.parquet
    """
    from ajepa import embed as stage
    from ajepa.embedding_job import embed_table, job_of
    from ajepa.pooling import Layer

    loaded = stage.load(model, device=device, pooling=pooling, layer=Layer.named(layer), overlap=overlap)
    job = job_of(sounds, loaded, cache=cache, cache_gb=cache_gb)
    counts = embed_table(loaded, job, out, frames=frames, batch=batch, workers=workers, progress=True)
    bad = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "good")
    print(f"{out}: {counts['good']} sounds embedded" + (f", without embedding: {bad}" if bad else ""))


@app.command()
def nearest(
    query: Annotated[Path, typer.Argument(help="Audio file.", show_default=False)],
    index: Annotated[Path, typer.Option(help="Table made by embed.", show_default=False)],
    model: Model,
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many to list.")] = 10,
    device: Device = "auto",
) -> None:
    """List the sounds of a table that are most like one that is given.

    Cosine of embeddings, each value standardised over the table.

    Example: ajepa-train nearest bird.wav --index emb.parquet --model runs/a
    """
    from ajepa.nearest import nearest as search

    for one in search(query, index, model, count=count, device=device):
        labels = f"  ({', '.join(one.labels)})" if one.labels else ""
        print(f"{one.similarity:6.3f}  {one.seconds:8.2f} s  {one.path}{labels}")
