"""Repair: make the broken shards of a store again, from what its build.json says it was built from."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline.audio import AudioPolicy
from pipeline.build import Build, Output, Progress, build_stores
from pipeline.corpus import Corpus
from pipeline.datasets.catalogue import corpus_of
from pipeline.errors import StoreError
from pipeline.files import locked
from pipeline.ledger import ledger_path, read_commit
from pipeline.shards import shard_path
from pipeline.store import Header
from pipeline.verify import Fault


def repair(
    store: Path, faults: Sequence[Fault], *, workers: int = 2, progress: Progress | None = None
) -> None:
    """Mend what `faults_of` found: broken shards are decoded again, the rest follows from plan and ledger.

    Raises StoreError, with nothing changed, where build.json or the sounds are not there any more.
    """
    header, told = Header.read(store), _told(store)
    corpus = corpus_of(told["asked"])
    shards = {fault.shard for fault in faults if fault.shard is not None}
    _refuse_loss(store, header, corpus, shards)
    with locked(store):
        for shard in shards:
            for path in (ledger_path(store, shard), shard_path(store, shard)):
                path.unlink(missing_ok=True)
    output = Output(path=store, spec=header.spec, dtype=header.layout.dtype)
    build = Build(policy=AudioPolicy(**told["policy"]), workers=workers)
    build_stores(corpus, [output], build, progress=progress, shards=shards)


def _told(store: Path) -> dict[str, Any]:
    try:
        told = json.loads((store / "build.json").read_text())
        return {"asked": told["asked"], "policy": told["policy"]}
    except (OSError, ValueError, KeyError):
        raise StoreError(
            f"{store}/build.json: does not say what the store was built from; run its build command again"
        ) from None


def _refuse_loss(store: Path, header: Header, corpus: Corpus, shards: Collection[int]) -> None:
    """Refuse to throw away a shard of which a clip could not be decoded again: what is intact in it would go too."""
    for shard in sorted(shards):
        try:
            record = read_commit(store, shard)
        except StoreError:
            continue
        if record is None:
            continue
        rows = header.layout.rows(shard)
        there_N = corpus.sources.frame["kind"][rows.start : rows.stop].is_not_null()
        lost = int(((record[1]["status"] == "good") & ~there_N).sum())
        if lost:
            raise StoreError(
                f"{store}: {lost} good clips of shard {shard} have no sound any more; bring it back, "
                f"or delete {ledger_path(store, shard)} and build again without them"
            )
