"""Repair: make what is broken in a store again, from what its build.json says it was built from."""

import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl

from pipeline.audio.decode import AudioPolicy
from pipeline.build.build import build_stores
from pipeline.build.plan import BuildOptions, RowProgress, StoreOutput
from pipeline.build.prepare import read_build_record
from pipeline.build.recompute import corpus_as_built
from pipeline.build.shard_builder import write_shard
from pipeline.build.verify import StoreFault
from pipeline.datasets.corpus import Corpus
from pipeline.errors import StoreError
from pipeline.files import lock_store
from pipeline.labels.label_sets import MissingOntologyError, label_set_ontology, propagate_store_labels
from pipeline.store.feature_store import FeatureStore
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import MANIFEST_SCHEMA, RESULT_SCHEMA, failure_result
from pipeline.store.shards import CRC_BYTES, ledger_path, read_commit, shard_path
from pipeline.tables import read_table


def repair_store(
    store: Path, faults: Sequence[StoreFault], *, workers: int = 2, progress: RowProgress | None = None
) -> int:
    """Mend what `faults_of` found. Of a broken shard the clips that match their own checksum are kept and the others
    decoded again; the rest follows from plan and ledger, propagated labels from their rule. Returns how many clips
    are lost: damaged in the store, and their sounds gone or no longer good.

    Raises StoreError, with nothing changed, where build.json is gone, or its lists are no longer those of the store;
    with all else mended, where a label set's own ontology is gone.
    """
    header, told = StoreHeader.read(store), read_build_record(store)
    corpus = corpus_as_built(store, header)
    output = StoreOutput(path=store, spec=header.spec, dtype=header.layout.dtype)
    shards = sorted({fault.shard for fault in faults if fault.shard is not None})
    policies: dict[AudioPolicy, list[int]] = {AudioPolicy(**told["policy"]): []}
    was_good = [row for shard in shards for row in _recorded_good_rows(store, header, shard)]
    with lock_store(store):
        for shard in shards:
            policy = _rewrite_intact_rows(store, header, corpus, shard)
            policies.setdefault(policy or AudioPolicy(**told["policy"]), []).append(shard)
    for policy, some in policies.items():
        build_stores(
            corpus,
            [output],
            BuildOptions(policy=policy, workers=workers),
            progress=progress,
            only_shards=some,
            write_record=False,
        )
    opened = FeatureStore.open(store)
    _restore_label_sets(store, set(opened.label_sets) - {fault.label_set for fault in faults})
    return sum(opened.manifest["status"][row] != "good" for row in was_good)


def _restore_label_sets(store: Path, intact_sets: Set[str]) -> None:
    """Make the label sets anew that the store had and that are not sound, each with its own ontology."""
    gone = []
    for path in sorted(store.glob("propagation-*.json")):
        rule = path.stem.removeprefix("propagation-")
        by = json.loads(path.read_text())["provenance"]
        if rule in intact_sets:
            continue
        try:
            ontology = label_set_ontology(store, rule, by["ontology"])
        except MissingOntologyError as error:
            gone.append(error)
        else:
            propagate_store_labels(store, rule, by["splits"], ontology=ontology)
    if gone:
        raise gone[0]


def _rewrite_intact_rows(store: Path, header: StoreHeader, corpus: Corpus, shard: int) -> AudioPolicy | None:
    """Put a broken shard in place anew with the clips that are intact, the others failed; the policy it was built with.

    Where neither the ledger nor the manifest tells of its clips there is nothing to keep: its record goes.
    """
    told = _recorded_results(store, header, shard)
    if told is None:
        for path in (ledger_path(store, shard), shard_path(store, shard)):
            path.unlink(missing_ok=True)
        return None
    results, policy = told
    good = []
    for number, mel_TF in enumerate(_intact_spectrograms(store, header, shard, results)):
        if mel_TF is not None:
            good.append((header.layout.rows_of_shard(shard)[number], mel_TF))
        elif results[number]["status"] == "good":
            results[number] = failure_result(
                "missing", "its spectrogram was damaged in the store, its sound is gone"
            )
    splits = {row: corpus.plan["split"][row] for row, _ in good}
    write_shard(store, header, shard, results, good, splits, policy)
    return AudioPolicy(**policy)


def _recorded_good_rows(store: Path, header: StoreHeader, shard: int) -> list[int]:
    told = _recorded_results(store, header, shard)
    rows = header.layout.rows_of_shard(shard)
    return (
        []
        if told is None
        else [r for r, result in zip(rows, told[0], strict=True) if result["status"] == "good"]
    )


def _recorded_results(
    store: Path, header: StoreHeader, shard: int
) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """The results of a shard's rows and the policy they were built with, by the ledger, else by the manifest."""
    rows = header.layout.rows_of_shard(shard)
    try:
        record = read_commit(store, shard)
        if record and len(record[1]) == len(rows) and record[0].plan_id == header.plan_id:
            return record[1].to_dicts(), record[0].policy
    except StoreError:
        pass  # damaged: the manifest may tell
    try:
        manifest, metadata = read_table(store / "manifest.parquet")
    except StoreError:
        return None
    if manifest.schema != pl.Schema(MANIFEST_SCHEMA) or "store_id" not in metadata:
        return None
    return manifest[rows.start : rows.stop].select(*RESULT_SCHEMA).to_dicts(), read_build_record(store)[
        "policy"
    ]


def _intact_spectrograms(
    store: Path, header: StoreHeader, shard: int, results: Sequence[dict[str, Any]]
) -> Iterator[np.ndarray | None]:
    """The spectrograms of a shard's rows that match the checksum that was recorded for them, others None.

    Where they lie follows from which rows are good, so that a damaged index loses none.
    """
    layout, path = header.layout, shard_path(store, shard)
    content, offset = path.read_bytes() if path.is_file() else b"", 0
    for result in results:
        chunk = content[offset : offset + layout.clip_bytes]
        if result["status"] != "good":
            yield None
            continue
        offset += layout.clip_bytes + CRC_BYTES
        whole = len(chunk) == layout.clip_bytes and google_crc32c.value(chunk) == result["crc32c"]
        yield np.frombuffer(bytearray(chunk), layout.dtype).reshape(layout.frames, -1) if whole else None
