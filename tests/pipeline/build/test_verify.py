"""Every fault a disk or a crash can bring is found, and building again mends it."""

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
from pipeline.store.shards import ledger_path, shard_path
from pipeline.tables import read_table


@pytest.fixture
def damaged(store_path, tmp_path):
    return shutil.copytree(store_path, tmp_path / "copy.zarr")


def test_a_whole_store_has_no_faults(store_path):
    """Otherwise nobody would believe the others."""
    assert list(find_faults(store_path)) == []


def flip(store):
    content = bytearray(shard_path(store, 1).read_bytes())
    content[300_000] ^= 1  # inside the second clip of the shard
    shard_path(store, 1).write_bytes(content)


def append(path, content):
    path.write_bytes(path.read_bytes() + content)


def swap(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def alter(path, column, value):
    """The first row of a table, everything else as it was."""
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0] = value
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, pa.array(values, table.schema.field(column).type)), path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, r"shard 1: .* does not match its digest \(rows \[17\] are damaged\)"),
        (lambda s: shard_path(s, 0).unlink(), "shard 0: .*no such file"),
        (
            lambda s: shard_path(s, 2).write_bytes(shard_path(s, 2).read_bytes()[:-100]),
            "shard 2: .* bytes, expected",
        ),
        (lambda s: ledger_path(s, 1).unlink(), "shard 1: not committed"),
        (lambda s: ledger_path(s, 1).write_bytes(b"PAR1"), "000001.parquet: cannot be read"),
        (lambda s: alter(ledger_path(s, 1), "digest", "0" * 32), "000001.parquet: does not match its digest"),
        (lambda s: swap(shard_path(s, 0), shard_path(s, 1)), "shard 0: .* (bytes, expected|its digest)"),
        (lambda s: swap(ledger_path(s, 0), ledger_path(s, 1)), "is the record of shard 1"),
        (lambda s: alter(s / "manifest.parquet", "split", "eval"), "manifest.parquet: ids, splits or times"),
        (lambda s: (s / "manifest.parquet").unlink(), "manifest.parquet: cannot be read .missing."),
        (lambda s: alter(s / "labels.parquet", "raw", [7]), "labels.parquet: raw labels are not those"),
        (
            lambda s: alter(s / "labels.parquet", "unambiguous", [7]),
            "label set unambiguous is not what its rule",
        ),
        (lambda s: append(s / "zarr.json", b" "), "zarr.json: not as written"),
        (lambda s: (s / "mel" / "stray.partial").touch(), "stray.partial: left by a build"),
        (lambda s: (s / "stats.json").write_text("{}"), "stats.json: does not follow"),
        (lambda s: shutil.copy(ledger_path(s, 0), ledger_path(s, 1)), "is the record of shard 0"),
        (lambda s: (s / "labels.parquet").unlink(), "labels.parquet: cannot be read .missing."),
        (lambda s: (s / "mel" / "zarr.json").write_text("{}"), "zarr.json: not as written"),
        (lambda s: shutil.copytree(s / "mel" / "c" / "0", s / "mel" / "c" / "9"), "c/9/0/0: left by"),
    ],
)
def test_damage_is_found_named_and_mended(damaged, store_path, damage, said):
    """One line that says what and where; then a repair makes the store what it was, byte for byte."""
    damage(damaged)
    faults = list(find_faults(damaged))
    assert any(re.search(said, fault.text) for fault in faults), faults
    repair_store(damaged, faults, workers=0)
    assert list(find_faults(damaged)) == []
    assert_same_bytes(store_path, damaged)


def test_a_repair_decodes_nothing_but_the_broken_shards(damaged, monkeypatch):
    """On two million clips one flipped bit must not cost a week."""
    flip(damaged)
    tried = []
    repair_store(
        damaged,
        list(find_faults(damaged)),
        workers=0,
        progress=lambda clips, rows: tried.append(clips) or rows,
    )
    assert tried == [1]


def without_sounds(store):
    """The store, whose build.json now names a folder with one sound of all."""
    told = json.loads((store / "build.json").read_text())
    folder = store.parent / "audio"
    folder.mkdir()
    shutil.copy(Path(told["asked"]["audio"][0]) / f"{clip_id(0)}.wav", folder)
    told["asked"]["audio"] = [str(folder)]
    (store / "build.json").write_text(json.dumps(told))


def flip_index(store):
    content = bytearray(shard_path(store, 1).read_bytes())
    content[-9] ^= 1
    shard_path(store, 1).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (flip, [17]),
        (flip_index, []),
        (lambda s: append(shard_path(s, 1), b"x"), []),
        (lambda s: cut(s), [30, 31]),
    ],
)
def test_a_repair_keeps_what_is_intact_where_the_sounds_are_gone(damaged, damage, lost):
    """A flipped bit in one clip must not cost the others of its shard."""
    damage(damaged)
    without_sounds(damaged)
    before = FeatureStore.open(damaged).good_rows().tolist()
    assert repair_store(damaged, list(find_faults(damaged)), workers=0) == len(lost)
    assert list(find_faults(damaged)) == []
    store = FeatureStore.open(damaged)
    assert sorted(set(before) - set(store.good_rows().tolist())) == lost
    store.read(store.good_rows())


def cut(store):
    """The last one and a half clips of a shard."""
    content = shard_path(store, 1).read_bytes()
    shard_path(store, 1).write_bytes(content[: -3 * store_clip_bytes(store) // 2])


def store_clip_bytes(store):
    return FeatureStore.open(store).header.layout.clip_bytes


def test_a_repair_whose_lists_have_changed_touches_nothing(damaged):
    """What the store was built from must be what it is mended from."""
    flip(damaged)
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    told = json.loads((damaged / "build.json").read_text())
    told["asked"]["segments"].pop()
    (damaged / "build.json").write_text(json.dumps(told))
    with pytest.raises(StoreError, match=r"planned from other clips, .*; put back what .*build.json says"):
        repair_store(damaged, list(find_faults(damaged)), workers=0)
    (damaged / "build.json").unlink()
    assert "build.json: does not say" in "".join(fault.text for fault in find_faults(damaged))
    with pytest.raises(StoreError, match="run its build command again"):
        repair_store(damaged, list(find_faults(damaged)), workers=0)
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "build.json")


def test_a_damaged_header_is_refused_and_written_anew_by_the_build(damaged, corpus, store_path):
    """A changed number in it would give every spectrogram another meaning."""
    header = damaged / "zarr.json"
    header.write_text(header.read_text().replace('"low_hz": 20.0', '"low_hz": 30.0'))
    with pytest.raises(
        StoreError, match=r"zarr.json: does not match its digest; run the build command again"
    ):
        list(find_faults(damaged))
    build(corpus, damaged)
    assert_same_bytes(store_path, damaged)


@pytest.mark.parametrize("name", ["labels.parquet", "manifest.parquet", "ledger/000001.parquet"])
def test_a_flipped_byte_in_a_table_is_found_or_changes_nothing(damaged, name):
    """In any place, also in the footer: never a traceback, never other values unseen."""
    path = damaged / name
    whole = path.read_bytes()
    table, metadata = read_table(path)
    rng = np.random.default_rng(0)
    found = 0
    for place in rng.integers(0, len(whole), 60):
        content = bytearray(whole)
        content[place] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        if list(find_faults(damaged, sample=1)):
            found += 1
        else:
            assert read_table(path)[0].equals(table)
            assert set(read_table(path)[1]) == set(metadata)
    assert found > 20


def test_what_was_built_with_a_loose_policy_is_mended_with_it(tmp_path):
    """Or a repair would drop the clips that only that policy takes."""
    folder, out = write_corpus(tmp_path / "corpus", clips=20), tmp_path / "x.zarr"
    build(folder, out, policy=AudioPolicy(keep_silent=True))
    build(folder, out)
    before = shard_path(out, 0).read_bytes()
    append(shard_path(out, 0), b"x")
    shard_path(out, 0).write_bytes(b"")
    assert repair_store(out, list(find_faults(out)), workers=0) == 0
    assert shard_path(out, 0).read_bytes() == before


def test_a_sample_reads_some_shards_and_checks_the_sizes_of_all(damaged):
    """Terabytes take hours to read; a lost shard is seen at once."""
    for shard in range(3):
        content = bytearray(shard_path(damaged, shard).read_bytes())
        content[300_000] ^= 1
        shard_path(damaged, shard).write_bytes(content)
    assert len(list(find_faults(damaged))) == 3
    assert len(list(find_faults(damaged, sample=1))) == 1
    shard_path(damaged, 0).write_bytes(b"short")
    shard_path(damaged, 1).write_bytes(b"short")
    assert len(list(find_faults(damaged, sample=1))) >= 2


@pytest.fixture
def own_set(damaged, tmp_path):
    """The store with a set made by an ontology of one's own: no instrument is one."""
    nodes = (
        replace(node, child_mids=()) if node.name == "Musical instrument" else node
        for node in load_ontology().nodes
    )
    ontology = Ontology(nodes=tuple(nodes))
    propagate_store_labels(damaged, "all-ancestors", ontology=ontology)
    return damaged / f"ontology-{ontology.digest}.json"


def test_a_set_of_ones_own_ontology_is_checked_and_mended_with_it(damaged, own_set):
    """Made again with AudioSet's it would be another set of the same name."""
    assert list(find_faults(damaged)) == []
    before = (damaged / "labels.parquet").read_bytes()
    alter(damaged / "labels.parquet", "all-ancestors", [7])
    faults = list(find_faults(damaged))
    assert [fault.label_set for fault in faults] == ["all-ancestors"]
    repair_store(damaged, faults, workers=0)
    assert (damaged / "labels.parquet").read_bytes() == before
    (damaged / "labels.parquet").unlink()
    repair_store(damaged, list(find_faults(damaged)), workers=0)
    assert list(find_faults(damaged)) == []
    ours = read_table(damaged / "labels.parquet")[0]["all-ancestors"].to_list()
    propagate_store_labels(damaged, "all-ancestors")
    assert read_table(damaged / "labels.parquet")[0]["all-ancestors"].to_list() != ours


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text("[]"), lambda path: path.write_text("{")]
)
def test_a_set_whose_ontology_is_gone_is_not_made_again_by_another(damaged, own_set, damage):
    """Verify says which command makes it, a repair does all else and then says so too."""
    damage(own_set)
    (fault,) = find_faults(damaged)
    command = f"ajepa-data propagate-labels {damaged} --rule all-ancestors --ontology FILE"
    assert fault.text.endswith(command)
    before = (damaged / "labels.parquet").read_bytes()
    repair_store(damaged, [fault], workers=0)
    assert (damaged / "labels.parquet").read_bytes() == before
    (damaged / "labels.parquet").unlink()
    flip(damaged)
    with pytest.raises(StoreError, match=re.escape(command)):
        repair_store(damaged, list(find_faults(damaged)), workers=0)
    assert list(find_faults(damaged)) == []
    assert FeatureStore.open(damaged).label_sets == ("raw", "unambiguous")
