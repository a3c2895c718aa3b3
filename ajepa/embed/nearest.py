"""Nearest sounds: the sounds of a table of embeddings that are most similar to a given one."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ajepa.embed.embedder import Embedder
from ajepa.embed.pretrained import LAST_CHECKPOINT, load_pretrained
from ajepa.embed.table import read_table_plan, table_batches
from ajepa.model.pooling import EncoderLayer, inverse_deviation_D
from pipeline.errors import RunError
from pipeline.messages import print_to_stderr

# The table is read in batches of at most this many rows, so that it may have any length, and of this many numbers (128
# MB as float64), so that vectors may be as wide as all layers side by side.
TABLE_ROWS_PER_READ = 8_192
VALUES_PER_READ = 2**24

# The columns of the table that are shown, and the column that is searched.
SHOWN_COLUMNS = ("path", "clip_id", "seconds", "labels")
VECTOR_COLUMN = "embedding"


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestSound:
    """A sound of the table, and its similarity to the query: the cosine of the standardised embeddings, at most 1."""

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
    """Return the `count` most similar sounds of a table, the nearest first.

    Each dimension of the embeddings is standardised over the table, as in the kNN probe of `evaluate`, so that a large
    offset common to all sounds does not dominate. `at` is the checkpoint of a run, as in `load_pretrained`. RunError if
    the table was made by another model; AudioError if the query cannot be used. The query's own row, if the table has
    it, is among them, and a line says so.
    """
    # Embed the query with the model and the options of the table.
    plan = read_table_plan(index)
    pretrained = load_pretrained(model, at)
    if plan["model_id"] != pretrained.model_id:
        raise RunError(
            f"{index}: was made by model {plan['model_id']} ({plan['recipe']}), but --model is "
            f"{pretrained.model_id} ({pretrained.recipe_name}); give the table's model, or embed again"
        )
    embedder = Embedder(
        pretrained,
        device=device,
        pooling=plan["pooling"],
        layer=EncoderLayer.from_name(plan["layer"]),
        overlap=plan["overlap"],
    )
    query_D = embedder.embed(query)[0].clip_D.double().numpy()

    # First pass over the table: the mean and the deviation of each dimension.
    mean_D, std_D = table_moments(index, len(query_D))
    scale_D = inverse_deviation_D(std_D)
    direction_D = unit_vectors((query_D - mean_D) * scale_D)

    # Second pass: compare each row with the query, and keep the most similar rows so far.
    best: list[NearestSound] = []
    for batch in table_batches(index, (*SHOWN_COLUMNS, VECTOR_COLUMN), rows_per_read(len(query_D))):
        valid_N, vectors_ND = valid_vectors(batch)
        similarity_N = unit_vectors((vectors_ND - mean_D) * scale_D) @ direction_D
        nearest_N = np.argsort(-similarity_N, kind="stable")[:count]
        rows = batch.select(list(SHOWN_COLUMNS)).take(pa.array(valid_N[nearest_N])).to_pylist()
        for row, similarity in zip(rows, similarity_N[nearest_N].tolist(), strict=True):
            row["labels"] = tuple(row["labels"] or ())
            best.append(NearestSound(similarity=similarity, **row))

        # The sort is stable: among equally similar sounds the earlier row comes first.
        best = sorted(best, key=lambda sound: -sound.similarity)[:count]
    own_path = os.path.abspath(query)
    if any(os.path.abspath(sound.path) == own_path for sound in best):
        print_to_stderr(f"{query}: is in the table itself; its own row is among those listed")
    return best


def table_moments(index: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the deviation of each of `width` dimensions; RunError if the table has no embedding."""
    # Sums of the values and of their squares, in float64.
    rows = 0
    sum_D = np.zeros(1)
    square_D = np.zeros(1)
    for batch in table_batches(index, (VECTOR_COLUMN,), rows_per_read(width)):
        _, vectors_ND = valid_vectors(batch)
        rows += len(vectors_ND)
        sum_D = sum_D + vectors_ND.sum(0)
        square_D = square_D + np.square(vectors_ND).sum(0)
    if not rows:
        raise RunError(f"{index}: holds no embedding; every row says why in `reason`")

    # Rounding may make the variance of a constant dimension negative.
    mean_D = sum_D / rows
    variance_D = np.maximum(square_D / rows - mean_D**2, 0)
    return mean_D, np.sqrt(variance_D)


def rows_per_read(width: int) -> int:
    """Return how many rows of vectors of this width are read at a time."""
    return max(1, min(TABLE_ROWS_PER_READ, VALUES_PER_READ // width))


def valid_vectors(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices in the batch of the rows that have an embedding, and these embeddings as float64 `ND`."""
    column = batch.column(VECTOR_COLUMN)
    valid_N = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    values_N = column.drop_null().flatten().to_numpy()
    return valid_N, values_N.reshape(len(valid_N), column.type.list_size).astype(np.float64)


def unit_vectors(x_ND: np.ndarray) -> np.ndarray:
    """Return the vectors scaled to length 1; zero vectors stay 0."""
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)
