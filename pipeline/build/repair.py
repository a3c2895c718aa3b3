"""Repair a store: build its damaged parts again from the corpus that its build.json describes."""

import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl

from pipeline.audio.decode import AudioPolicy
from pipeline.build.build import run_build
from pipeline.build.plan import BuildOptions, RowProgress, StoreOutput
from pipeline.build.planned_corpus import corpus_as_built
from pipeline.build.prepare import read_build_record
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
    """Repair the faults that `find_faults` has found; returns the number of lost clips.

    Clips of a damaged shard that match their own checksum are kept; its other clips are decoded again. Propagated
    labels are computed again by their rule, and all other files from the plan and the ledger. A clip is lost if it is
    damaged in the store and its sound is gone or no longer good.

    Raises StoreError before anything is changed if build.json is gone or its lists no longer give the plan of the
    store. Raises StoreError after everything else is repaired if the ontology of a label set is gone.
    """
    header = StoreHeader.read(store)
    build_policy = AudioPolicy(**read_build_record(store)["policy"])
    corpus = corpus_as_built(store, header)
    shards = sorted({fault.shard for fault in faults if fault.shard is not None})
    good_before = [row for shard in shards for row in _recorded_good_rows(store, header, shard)]

    # Keep the intact rows of damaged shards; each shard is built again with its original policy.
    shards_by_policy: dict[AudioPolicy, list[int]] = {build_policy: []}
    with lock_store(store):
        for shard in shards:
            shard_policy = _rewrite_intact_rows(store, header, corpus, shard)
            shards_by_policy.setdefault(shard_policy or build_policy, []).append(shard)

    # Decode the other rows. A build also restores the tables, so one is run even if no shard is damaged.
    output = StoreOutput(path=store, spec=header.spec, dtype=header.layout.dtype)
    for policy, policy_shards in shards_by_policy.items():
        run_build(
            corpus,
            [output],
            BuildOptions(policy=policy, workers=workers),
            progress=progress,
            only_shards=policy_shards,
            write_record=False,
        )

    # Propagate the damaged label sets again, then count.
    opened = FeatureStore.open(store)
    _restore_label_sets(store, set(opened.label_sets) - {fault.label_set for fault in faults})
    return int((opened.manifest_columns("status")["status"][good_before] != "good").sum())


def _restore_label_sets(store: Path, intact_sets: Set[str]) -> None:
    """Propagate each damaged or missing label set of the store again, with the ontology from which it was made.

    Raises MissingOntologyError for the first set whose ontology is gone, after all other sets are restored.
    """
    errors = []
    for path in sorted(store.glob("propagation-*.json")):
        rule = path.stem.removeprefix("propagation-")
        provenance = json.loads(path.read_text())["provenance"]
        if rule in intact_sets:
            continue
        try:
            ontology = label_set_ontology(store, rule, provenance["ontology"])
        except MissingOntologyError as error:
            errors.append(error)
        else:
            propagate_store_labels(store, rule, provenance["splits"], ontology=ontology)
    if errors:
        raise errors[0]


def _rewrite_intact_rows(store: Path, header: StoreHeader, corpus: Corpus, shard: int) -> AudioPolicy | None:
    """Write a damaged shard again with its intact clips, and mark the others as failed; returns its original policy.

    If neither the ledger nor the manifest has the results of its clips, nothing can be kept: deletes the shard and its
    record, and returns None.
    """
    # Without the results of its clips, the shard cannot be read.
    recorded = _recorded_results(store, header, shard)
    if recorded is None:
        ledger_path(store, shard).unlink(missing_ok=True)
        shard_path(store, shard).unlink(missing_ok=True)
        return None

    # Mark damaged clips as failed, so that the next build tries them again.
    results, policy = recorded
    rows = header.layout.rows_of_shard(shard)
    intact_rows = []
    for index, mel_TF in enumerate(_intact_spectrograms(store, header, shard, results)):
        if mel_TF is not None:
            intact_rows.append((rows[index], mel_TF))
        elif results[index]["status"] == "good":
            results[index] = failure_result(
                "missing", "its spectrogram was damaged in the store, its sound is gone"
            )
    splits = {row: corpus.plan["split"][row] for row, _ in intact_rows}
    write_shard(store, header, shard, results, intact_rows, splits, policy)
    return AudioPolicy(**policy)


def _recorded_good_rows(store: Path, header: StoreHeader, shard: int) -> list[int]:
    """Return the rows of a shard that are good according to the ledger or the manifest."""
    recorded = _recorded_results(store, header, shard)
    if recorded is None:
        return []
    rows = header.layout.rows_of_shard(shard)
    return [row for row, result in zip(rows, recorded[0], strict=True) if result["status"] == "good"]


def _recorded_results(
    store: Path, header: StoreHeader, shard: int
) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """Return the results of a shard's rows and their build policy, from the ledger or else the manifest, else None."""
    # The shard's record in the ledger, if it belongs to this store.
    rows = header.layout.rows_of_shard(shard)
    try:
        record = read_commit(store, shard)
        if record and len(record[1]) == len(rows) and record[0].plan_id == header.plan_id:
            return record[1].to_dicts(), record[0].policy
    except StoreError:
        pass  # the record is damaged; the manifest may have the same results

    # The manifest of a finished store.
    try:
        manifest, metadata = read_table(store / "manifest.parquet")
    except StoreError:
        return None
    if manifest.schema != pl.Schema(MANIFEST_SCHEMA) or "store_id" not in metadata:
        return None
    results = manifest[rows.start : rows.stop].select(*RESULT_SCHEMA).to_dicts()
    return results, read_build_record(store)["policy"]


def _intact_spectrograms(
    store: Path, header: StoreHeader, shard: int, results: Sequence[dict[str, Any]]
) -> Iterator[np.ndarray | None]:
    """Yield, for each row of a shard, the spectrogram if it matches its recorded checksum, else None."""
    layout = header.layout
    path = shard_path(store, shard)
    shard_bytes = b""
    if path.is_file():
        shard_bytes = path.read_bytes()

    # The good rows are stored one after the other, so the shard's index, which may be damaged, is not needed.
    offset = 0
    for result in results:
        if result["status"] != "good":
            yield None
            continue
        chunk = shard_bytes[offset : offset + layout.clip_bytes]
        offset += layout.clip_bytes + CRC_BYTES
        if len(chunk) == layout.clip_bytes and google_crc32c.value(chunk) == result["crc32c"]:
            yield np.frombuffer(bytearray(chunk), layout.dtype).reshape(layout.frames, -1)
        else:
            yield None
