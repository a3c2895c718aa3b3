"""EmbeddingJob: which sounds to embed, in a fixed order; all of them -> a table, however often it is interrupted."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ajepa.embed import WINDOWS, Embedder
from ajepa.embedding_table import FORMAT, EmbeddingTable, Row, failures
from ajepa.run import Json
from ajepa.sound import Sound, ahead
from pipeline.errors import InputError, RunError
from pipeline.files import locked_file
from pipeline.layouts import ARCHIVES, extension, find
from pipeline.locators import MEMBER, SOURCES_SCHEMA, Locator
from pipeline.remote import is_remote
from pipeline.store import FeatureStore
from pipeline.terminal import to_stderr

PART_CLIPS, PART_FRAMES = (
    512,
    1_000_000,
)  # rows that are written together: so many sounds, or three hours of them
FAILURES_TOLD = 3
STORE_MARK = "zarr.json"  # what a folder that is a store holds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EmbeddingJob:
    """Rows in their order, how to open each, and what identifies them all."""

    rows: Sequence[Row]
    opening: Callable[[int], Callable[[], Sound]]
    source: Json

    @classmethod
    def of_store(cls, store: FeatureStore, model: Embedder) -> "EmbeddingJob":
        """Every good clip of a store; RunError: there is none, or its features are not the model's."""
        store.refuse_other_front_end(model.mel, "the model needs")
        rows_N = store.good_rows()
        if not len(rows_N):
            raise RunError(f"{store.place}: has no good clip to embed; ajepa-data report tells why")
        some = store.manifest[rows_N]
        indices_N, offsets_N = store.flat_labels()
        labels = [
            tuple(store.classes.names[i] for i in indices_N[offsets_N[row] : offsets_N[row + 1]])
            for row in rows_N.tolist()
        ]
        identity = {"store_id": store.store_id, "rows": len(rows_N)}
        if store.excluded.digest is not None:
            identity["excluded"] = store.excluded.digest
        told = zip(some["clip_id"], some["source"], labels, strict=True)
        return cls(
            rows=[Row(clip_id=clip_id, path=source, labels=names) for clip_id, source, names in told],
            opening=lambda number: model.row_opening(store, int(rows_N[number])),
            source=identity,
        )

    @classmethod
    def of_places(cls, places: Sequence[str], model: Embedder) -> "EmbeddingJob":
        """Files as they are given, every sound of folders and archives; InputError: nothing there, nothing in it."""
        locators = [locator for place in places for locator in located(place)]
        paths = [path_of(locator) for locator in locators]
        return cls(
            rows=[Row(clip_id=path, path=path) for path in paths],
            opening=lambda number: model.opening(locators[number]),
            source={"sounds": hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16], "rows": len(paths)},
        )


def located(place: str) -> Iterator[Locator]:
    """The sounds at one place; raises InputError."""
    path = Path(place)
    if not is_remote(place):
        if not path.exists():
            raise InputError(f"{place}: no such file or folder; expected sounds, or a store")
        if path.is_file() and extension(place) not in ARCHIVES:
            yield Locator.of(path.absolute())
            return
    found = find([place if is_remote(place) else path.absolute()])
    for note in found.notes:
        to_stderr(note)
    if found.sounds.is_empty():
        raise InputError(f"{place}: holds no sound; expected audio files, or archives of them")
    for row in found.sounds.select(*SOURCES_SCHEMA).iter_rows(named=True):
        yield Locator(**row)


def path_of(locator: Locator) -> str:
    """A sound's path, and its member's name where it lies in an archive."""
    if locator.kind == "file":
        return locator.path
    return locator.path + MEMBER + locator.source.rpartition(MEMBER)[2]


def job_of(places: Sequence[str], model: Embedder, **how: object) -> EmbeddingJob:
    """Of a store (one, alone; `how` is `FeatureStore.open`'s), or of files, folders and archives."""
    stores = [place for place in places if place.rstrip("/").endswith(".zarr") or is_store(Path(place))]
    if stores and len(places) > 1:
        raise InputError(f"{stores[0]}: is a store, and goes alone; embed the rest by itself")
    if stores:
        return EmbeddingJob.of_store(FeatureStore.open(stores[0], **how), model)  # type: ignore[arg-type]
    return EmbeddingJob.of_places(places, model)


def is_store(path: Path) -> bool:
    return (path / STORE_MARK).is_file()


def embed_table(
    model: Embedder,
    job: EmbeddingJob,
    out: Path,
    *,
    frames: bool = False,
    batch: int = WINDOWS,
    workers: int = 2,
    progress: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> Counter[str]:
    """Write the table of embeddings `out`, or carry on with it; how many rows are `good`, and of each reason.

    A run that is killed and started again gives the same rows, and the same bytes on the same machine: windows of
    sounds that are written together are encoded together, wherever the run began. Sounds that cannot be used are
    rows without an embedding, with their reason. RunError where `out` holds other embeddings, StoreError where
    another process is writing it.
    """
    table = EmbeddingTable(path=out, plan=plan(model, job, frames, batch), width=model.width, frames=frames)
    told = {"unit": "sound", "disable": not progress, "dynamic_ncols": True, "mininterval": 0.5}
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(out):
        first, total = table.start(), len(job.rows)
        if out.exists():
            say(f"{out}: already whole, {total} rows")
            return table.counts()
        if first:
            say(f"{out}: carrying on after {first} of {total} rows")
        openings = ahead((job.opening(number) for number in range(first, total)), workers)
        with tqdm(total=total, initial=first, **told) as bar:
            while first < total:
                done = []
                for one in model.each_sound(limited(openings), frames=frames, batch=batch):
                    done.append(one)
                    bar.update()
                table.write(first, job.rows[first : first + len(done)], done)
                first += len(done)
        table.finish()
        return table.counts()


def outcome(out: Path, counts: Counter[str], say: Callable[[str], None] = to_stderr) -> str:
    """What became of a table's sounds, in one line; `say` is told of the first that have no embedding.

    RunError where none has one.
    """
    bad, total = failures(out, FAILURES_TOLD), counts.total()
    if not counts["good"]:
        told = f"none of {total} sounds could be embedded, the first is {bad[0]}"
        raise RunError(f"{out}: {told}; the table has every reason, delete it to try again")
    for line in bad:
        say(f"without embedding: {line}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "good")
    return f"{out}: {counts['good']} of {total} sounds embedded" + (f"; without: {reasons}" if bad else "")


def plan(model: Embedder, job: EmbeddingJob, frames: bool, batch: int) -> Json:
    """What decides every value of a table."""
    return {
        "format": FORMAT,
        "model_id": model.model.model_id,
        "recipe": model.model.recipe_name,
        "pooling": model.pooling,
        "layer": str(model.layer),
        "overlap": model.overlap,
        "batch": batch,
        "frames": frames,
        **job.source,
    }


def limited(openings: Iterable[Callable[[], Sound]]) -> Iterator[Callable[[], Sound]]:
    """The next few sounds: as many as are written together."""
    seen_frames = 0

    def counted(opening: Callable[[], Sound]) -> Sound:
        sound = opening()
        sound.mels = passing(sound.mels)
        return sound

    def passing(mels: Iterable[Tensor]) -> Iterator[Tensor]:
        nonlocal seen_frames
        for mel_TF in mels:
            seen_frames += len(mel_TF)
            yield mel_TF

    for number, opening in enumerate(openings, start=1):
        yield lambda opening=opening: counted(opening)  # type: ignore[misc]
        if number == PART_CLIPS or seen_frames >= PART_FRAMES:
            return
