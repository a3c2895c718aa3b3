"""Every fault that a disk or a crash can cause is found, and a repair mends it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import clip_id, write_corpus
from stores import assert_same_bytes, build

from pipeline.audio.decode import AudioPolicy
from pipeline.build.repair import repair_store
from pipeline.build.verify import find_faults
from pipeline.errors import StoreError
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.labels.ontology import Ontology, load_ontology
from pipeline.store.feature_store import FeatureStore
from pipeline.store.header import StoreHeader
from pipeline.store.shards import ledger_path, read_commit, read_commits, shard_path
from pipeline.tables import read_table


@pytest.fixture
def copied_store(store_path, tmp_path):
    return shutil.copytree(store_path, tmp_path / "copy.zarr")


def test_a_whole_store_has_no_faults(store_path):
    """Otherwise nobody would believe the others."""
    assert list(find_faults(store_path)) == []


def flip(store):
    """Flip one bit of a spectrogram."""
    content = bytearray(shard_path(store, 1).read_bytes())
    content[300_000] ^= 1  # inside the second clip of the shard
    shard_path(store, 1).write_bytes(content)


def append(path, content):
    path.write_bytes(path.read_bytes() + content)


def swap(first, second):
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def alter(path, column, value):
    """Change one column of the first row of a table."""
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0] = value
    index = table.schema.get_field_index(column)
    pq.write_table(table.set_column(index, column, pa.array(values, table.schema.field(column).type)), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"shard 1: .* does not match its digest \(rows \[17\] are damaged\)"),
        (lambda store: shard_path(store, 0).unlink(), "shard 0: .*no such file"),
        (
            lambda store: shard_path(store, 2).write_bytes(shard_path(store, 2).read_bytes()[:-100]),
            "shard 2: .* bytes, expected",
        ),
        (lambda store: ledger_path(store, 1).unlink(), "shard 1: not committed"),
        (lambda store: ledger_path(store, 1).write_bytes(b"PAR1"), "000001.parquet: cannot be read"),
        (
            lambda store: alter(ledger_path(store, 1), "digest", "0" * 32),
            "000001.parquet: does not match its digest",
        ),
        (
            lambda store: swap(shard_path(store, 0), shard_path(store, 1)),
            "shard 0: .* (bytes, expected|its digest)",
        ),
        (lambda store: swap(ledger_path(store, 0), ledger_path(store, 1)), "is the record of shard 1"),
        (
            lambda store: alter(store / "manifest.parquet", "split", "eval"),
            "manifest.parquet: ids, splits or times",
        ),
        (lambda store: (store / "manifest.parquet").unlink(), "manifest.parquet: cannot be read .missing."),
        (
            lambda store: alter(store / "labels.parquet", "raw", [7]),
            "labels.parquet: raw labels are not those",
        ),
        (
            lambda store: alter(store / "labels.parquet", "unambiguous", [7]),
            "label set unambiguous is not what its rule",
        ),
        (lambda store: append(store / "zarr.json", b" "), "zarr.json: not as written"),
        (lambda store: (store / "mel" / "stray.partial").touch(), "stray.partial: left by a build"),
        (lambda store: (store / "stats.json").write_text("{}"), "stats.json: does not follow"),
        (lambda store: shutil.copy(ledger_path(store, 0), ledger_path(store, 1)), "is the record of shard 0"),
        (lambda store: (store / "labels.parquet").unlink(), "labels.parquet: cannot be read .missing."),
        (lambda store: (store / "mel" / "zarr.json").write_text("{}"), "zarr.json: not as written"),
        (
            lambda store: shutil.copytree(store / "mel" / "c" / "0", store / "mel" / "c" / "9"),
            "c/9/0/0: left by",
        ),
    ],
)
def test_damage_is_found_named_and_repaired(copied_store, store_path, damage, message):
    """One line names the fault and its place; then a repair restores the store, byte for byte."""
    damage(copied_store)
    faults = list(find_faults(copied_store))
    assert any(re.search(message, fault.text) for fault in faults), faults
    repair_store(copied_store, faults, workers=0)
    assert list(find_faults(copied_store)) == []
    assert_same_bytes(store_path, copied_store)


def test_a_repair_decodes_nothing_but_the_broken_shards(copied_store, monkeypatch):
    """On two million clips one flipped bit must not cost a week."""
    flip(copied_store)
    row_counts = []
    repair_store(
        copied_store,
        list(find_faults(copied_store)),
        workers=0,
        progress=lambda count, rows: row_counts.append(count) or rows,
    )
    assert row_counts == [1]


def take_sounds_away(store):
    """Make build.json name a folder that holds only one of the sounds."""
    record = json.loads((store / "build.json").read_text())
    folder = store.parent / "audio"
    folder.mkdir()
    shutil.copy(Path(record["asked"]["audio"][0]) / f"{clip_id(0)}.wav", folder)
    record["asked"]["audio"] = [str(folder)]
    (store / "build.json").write_text(json.dumps(record))


def flip_index(store):
    """Flip one bit of a shard's index."""
    content = bytearray(shard_path(store, 1).read_bytes())
    content[-9] ^= 1
    shard_path(store, 1).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (flip, [17]),
        (flip_index, []),
        (lambda store: append(shard_path(store, 1), b"x"), []),
        (lambda store: cut(store), [30, 31]),
    ],
)
def test_a_repair_keeps_intact_clips_whose_sounds_are_gone(copied_store, damage, lost):
    """A flipped bit in one clip must not cost the others of its shard."""
    damage(copied_store)
    take_sounds_away(copied_store)
    before = FeatureStore.open(copied_store).good_rows().tolist()
    assert repair_store(copied_store, list(find_faults(copied_store)), workers=0) == len(lost)
    assert list(find_faults(copied_store)) == []
    store = FeatureStore.open(copied_store)
    assert sorted(set(before) - set(store.good_rows().tolist())) == lost
    store.read(store.good_rows())


def cut(store):
    """Cut the last one and a half clips off a shard."""
    content = shard_path(store, 1).read_bytes()
    clip_bytes = FeatureStore.open(store).header.layout.clip_bytes
    shard_path(store, 1).write_bytes(content[: -3 * clip_bytes // 2])


def test_a_repair_whose_lists_have_changed_changes_nothing(copied_store):
    """A store is only repaired from the corpus that it was built from."""
    flip(copied_store)
    before = {path: path.read_bytes() for path in copied_store.rglob("*") if path.is_file()}
    record = json.loads((copied_store / "build.json").read_text())
    record["asked"]["segments"].pop()
    (copied_store / "build.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match=r"planned from other clips, .*; put back what .*build.json says"):
        repair_store(copied_store, list(find_faults(copied_store)), workers=0)
    (copied_store / "build.json").unlink()
    assert "build.json: does not say" in "".join(fault.text for fault in find_faults(copied_store))
    with pytest.raises(StoreError, match="run its build command again"):
        repair_store(copied_store, list(find_faults(copied_store)), workers=0)
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "build.json")


def test_a_damaged_header_is_refused_and_written_anew_by_the_build(copied_store, corpus, store_path):
    """A changed number in it would give every spectrogram another meaning."""
    header = copied_store / "zarr.json"
    header.write_text(header.read_text().replace('"low_hz": 20.0', '"low_hz": 30.0'))
    with pytest.raises(
        StoreError, match=r"zarr.json: does not match its digest; run the build command again"
    ):
        list(find_faults(copied_store))
    build(corpus, copied_store)
    assert_same_bytes(store_path, copied_store)


@pytest.mark.parametrize("name", ["labels.parquet", "manifest.parquet", "ledger/000001.parquet"])
def test_a_flipped_byte_in_a_table_is_found_or_changes_nothing(copied_store, name):
    """In any place, also in the footer: never a traceback, never other values unseen."""
    path = copied_store / name
    original = path.read_bytes()
    table, metadata = read_table(path)
    rng = np.random.default_rng(0)
    flips_found = 0
    for offset in rng.integers(0, len(original), 60):
        content = bytearray(original)
        content[offset] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        if list(find_faults(copied_store, sample=1)):
            flips_found += 1
        else:
            assert read_table(path)[0].equals(table)
            assert set(read_table(path)[1]) == set(metadata)
    assert flips_found > 20


def test_a_shard_built_with_a_loose_policy_is_repaired_with_it(tmp_path):
    """Otherwise a repair would drop the clips that only that policy accepts."""
    folder = write_corpus(tmp_path / "corpus", clips=20)
    out = tmp_path / "x.zarr"
    build(folder, out, policy=AudioPolicy(keep_silent=True))
    build(folder, out)
    before = shard_path(out, 0).read_bytes()
    append(shard_path(out, 0), b"x")
    shard_path(out, 0).write_bytes(b"")
    assert repair_store(out, list(find_faults(out)), workers=0) == 0
    assert shard_path(out, 0).read_bytes() == before


def test_a_sample_reads_some_shards_and_checks_the_sizes_of_all(copied_store):
    """Terabytes take hours to read; a lost shard is seen at once."""
    for shard in range(3):
        content = bytearray(shard_path(copied_store, shard).read_bytes())
        content[300_000] ^= 1
        shard_path(copied_store, shard).write_bytes(content)
    assert len(list(find_faults(copied_store))) == 3
    assert len(list(find_faults(copied_store, sample=1))) == 1
    shard_path(copied_store, 0).write_bytes(b"short")
    shard_path(copied_store, 1).write_bytes(b"short")
    assert len(list(find_faults(copied_store, sample=1))) >= 2


@pytest.fixture
def own_ontology(copied_store, tmp_path):
    """A label set of the store made by the user's own ontology, in which no instrument is one; the ontology's file."""
    nodes = (
        replace(node, child_mids=()) if node.name == "Musical instrument" else node
        for node in load_ontology().nodes
    )
    ontology = Ontology(nodes=tuple(nodes))
    propagate_store_labels(copied_store, "all-ancestors", ontology=ontology)
    return copied_store / f"ontology-{ontology.digest}.json"


def test_a_label_set_of_ones_own_ontology_is_checked_and_repaired_with_it(copied_store, own_ontology):
    """Made again with AudioSet's it would be another set of the same name."""
    assert list(find_faults(copied_store)) == []
    before = (copied_store / "labels.parquet").read_bytes()
    alter(copied_store / "labels.parquet", "all-ancestors", [7])
    faults = list(find_faults(copied_store))
    assert [fault.label_set for fault in faults] == ["all-ancestors"]
    repair_store(copied_store, faults, workers=0)
    assert (copied_store / "labels.parquet").read_bytes() == before
    (copied_store / "labels.parquet").unlink()
    repair_store(copied_store, list(find_faults(copied_store)), workers=0)
    assert list(find_faults(copied_store)) == []
    by_own_ontology = read_table(copied_store / "labels.parquet")[0]["all-ancestors"].to_list()
    propagate_store_labels(copied_store, "all-ancestors")
    assert read_table(copied_store / "labels.parquet")[0]["all-ancestors"].to_list() != by_own_ontology


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text("[]"), lambda path: path.write_text("{")]
)
def test_a_label_set_whose_ontology_is_gone_is_not_made_again_by_another(copied_store, own_ontology, damage):
    """Verify names the command that makes it; a repair mends all else, then names it too."""
    damage(own_ontology)
    (fault,) = find_faults(copied_store)
    command = f"ajepa-data propagate-labels {copied_store} --rule all-ancestors --ontology FILE"
    assert fault.text.endswith(command)
    before = (copied_store / "labels.parquet").read_bytes()
    repair_store(copied_store, [fault], workers=0)
    assert (copied_store / "labels.parquet").read_bytes() == before
    (copied_store / "labels.parquet").unlink()
    flip(copied_store)
    with pytest.raises(StoreError, match=re.escape(command)):
        repair_store(copied_store, list(find_faults(copied_store)), workers=0)
    assert list(find_faults(copied_store)) == []
    assert FeatureStore.open(copied_store).label_sets == ("raw", "unambiguous")


@pytest.mark.parametrize(
    "damage",
    [
        lambda store, shards: ledger_path(store, 1).unlink(),
        lambda store, shards: append(ledger_path(store, shards - 1), b"more"),
        lambda store, shards: shutil.copy(ledger_path(store, 0), ledger_path(store, 1)),
        lambda store, shards: alter(ledger_path(store, 1), "peak_dbfs", 0.0),
        lambda store, shards: pq.write_table(
            pq.read_table(ledger_path(store, 0)).drop_columns("codec"), ledger_path(store, 0)
        ),
    ],
)
def test_records_read_together_are_those_read_alone(copied_store, monkeypatch, damage):
    """A missing, damaged, foreign or changed record, or one with other columns, gives the same commits and messages."""
    shards = StoreHeader.read(copied_store).layout.shard_count
    damage(copied_store, shards)

    def read_alone(shard):
        try:
            return read_commit(copied_store, shard)
        except StoreError as error:
            return error

    expected = [read_alone(shard) for shard in range(shards)]
    assert sum(not isinstance(record, tuple) for record in expected) == 1
    for rows in (1, 20, 10_000):
        monkeypatch.setattr("pipeline.store.shards.ROWS_OF_RECORDS", rows)
        actual = dict(read_commits(copied_store, range(shards)))
        assert list(actual) == list(range(shards))
        for record, alone in zip(actual.values(), expected, strict=True):
            if isinstance(alone, tuple):
                assert record[0] == alone[0]
                assert record[1].equals(alone[1])
            else:
                assert str(record) == str(alone)
