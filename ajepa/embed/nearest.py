"""Nearest: which sounds of a table of embeddings are most like one that is given."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ajepa.embed.embedder import Embedder
from ajepa.embed.pretrained import LAST_CHECKPOINT, load_pretrained
from ajepa.embed.table import read_table_plan, table_batches
from ajepa.model.pooling import EncoderLayer, inverse_deviation_D
from pipeline.errors import RunError

TABLE_ROWS_PER_READ = 8_192  # of the table at a time

SHOWN_COLUMNS, VECTOR_COLUMN = ("path", "clip_id", "seconds", "labels"), "embedding"


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestSound:
    """One sound of the table: cosine with the one asked for, once the table's mean and deviation are taken out."""

    similarity: float
    path: str
    clip_id: str
    seconds: float
    labels: tuple[str, ...]


def nearest_sounds(
    query: Path,
    index: Path,
    model: Path | str,
    *,
    count: int = 10,
    device: str = "auto",
    at: str | int = LAST_CHECKPOINT,
) -> list[NearestSound]:
    """The most similar sounds of a table, the nearest first; read in pieces, so that it may be of any length.

    Each value is standardised over the table, as in `evaluate`'s kNN: what all sounds share tells none apart.
    `at` as in `trained`. RunError where the table was made by another model; AudioError where the query cannot be used.
    """
    plan, loaded = read_table_plan(index), load_pretrained(model, at)
    if plan["model_id"] != loaded.model_id:
        told = f"was made by model {plan['model_id']} ({plan['recipe']}), --model is {loaded.model_id}"
        raise RunError(f"{index}: {told} ({loaded.recipe_name}); give its own, or embed again")
    embedder = Embedder(
        loaded,
        device=device,
        pooling=plan["pooling"],
        layer=EncoderLayer.from_name(plan["layer"]),
        overlap=plan["overlap"],
    )
    query_D = embedder.embed(query)[0].clip_D.double().numpy()
    mean_D, std_D = table_moments(index)
    scale_D = inverse_deviation_D(std_D)
    asked_D = unit_vectors((query_D - mean_D) * scale_D)
    best: list[NearestSound] = []
    for batch in table_batches(index, (*SHOWN_COLUMNS, VECTOR_COLUMN), TABLE_ROWS_PER_READ):
        there_N, vectors_ND = valid_vectors(batch)
        similarity_N = unit_vectors((vectors_ND - mean_D) * scale_D) @ asked_D
        nearest_N = np.argsort(-similarity_N, kind="stable")[:count]
        rows = batch.select(list(SHOWN_COLUMNS)).take(pa.array(there_N[nearest_N])).to_pylist()
        found = [
            NearestSound(**row | {"similarity": float(similarity), "labels": tuple(row["labels"] or ())})
            for row, similarity in zip(rows, similarity_N[nearest_N], strict=True)
        ]
        best = sorted([*best, *found], key=lambda one: -one.similarity)[:count]
    return best


def table_moments(index: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each value over the table; RunError where it has no embedding."""
    rows, sum_D, square_D = 0, np.zeros(1), np.zeros(1)
    for batch in table_batches(index, (VECTOR_COLUMN,), TABLE_ROWS_PER_READ):
        _, vectors_ND = valid_vectors(batch)
        rows += len(vectors_ND)
        sum_D, square_D = sum_D + vectors_ND.sum(0), square_D + np.square(vectors_ND).sum(0)
    if not rows:
        raise RunError(f"{index}: holds no embedding; every row says why in `reason`")
    mean_D = sum_D / rows
    return mean_D, np.sqrt(np.maximum(square_D / rows - mean_D**2, 0))


def valid_vectors(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have an embedding, and these as float64 `ND`."""
    column = batch.column(VECTOR_COLUMN)
    there_N = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    flat_N = column.drop_null().flatten().to_numpy()
    return there_N, flat_N.reshape(len(there_N), column.type.list_size).astype(np.float64)


def unit_vectors(x_ND: np.ndarray) -> np.ndarray:
    """Of length 1; what has no length stays 0."""
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)
