"""Hugging Face datasets in: Parquet of the hub, and what `save_to_disk` writes, with its splits and class labels."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from local_hub import local_hub
from sounds import babble

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.build.planned_corpus import corpus_of_request
from pipeline.datasets.catalogue import recreate_corpus
from pipeline.datasets.corpus import CorpusRequest
from pipeline.datasets.hub import hub_corpus, hub_settings
from pipeline.datasets.hub_files import split_of_file
from pipeline.errors import InputError
from pipeline.store.feature_store import FeatureStore

RATE_HZ = 16_000
CLASS_NAMES = ["dog", "rain", "siren"]
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASS_LABEL = {"names": CLASS_NAMES, "_type": "ClassLabel"}


def sound_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, babble(0.5, RATE_HZ, seed=seed), RATE_HZ, format="FLAC")
    return file.getvalue()


def table_of(
    count: int, first: int = 0, *, label: dict | None = CLASS_LABEL, cells: list | None = None
) -> pa.Table:
    """Rows as `datasets` writes them: sounds as bytes and path, numbers for class labels, features in the metadata."""
    audio = [
        {"bytes": sound_bytes(number), "path": f"{number}.flac"} for number in range(first, first + count)
    ]
    cells = [number % 3 for number in range(first, first + count)] if cells is None else cells
    features: dict = {"audio": {"sampling_rate": RATE_HZ, "_type": "Audio"}}
    if label is not None:
        features["label"] = label
    table = pa.table({"audio": pa.array(audio, AUDIO), "label": pa.array(cells)})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata)


def write_arrow(path: Path, table: pa.Table) -> None:
    """A file as `save_to_disk` writes it: Arrow's stream format, some rows a batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_saved_dataset(folder: Path) -> None:
    """What `DatasetDict.save_to_disk` leaves: five rows to train on in two files, two to test on."""
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    write_arrow(folder / "train" / "data-00000-of-00002.arrow", table_of(3))
    write_arrow(folder / "train" / "data-00001-of-00002.arrow", table_of(2, first=3))
    write_arrow(folder / "test" / "data-00000-of-00001.arrow", table_of(2, first=5))
    for split in ("train", "test"):
        (folder / split / "state.json").write_text(json.dumps({"_split": split}))
        (folder / split / "dataset_info.json").write_text("{}")
        write_arrow(folder / split / "cache-1234.arrow", table_of(1))


def write_parquet_dataset(folder: Path) -> None:
    """The same rows as `push_to_hub` lays them out."""
    (folder / "data").mkdir(parents=True)
    pq.write_table(table_of(5), folder / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(table_of(2, first=5), folder / "data" / "test-00000-of-00001-0123abcdef.parquet")


WRITERS = {"arrow": write_saved_dataset, "parquet": write_parquet_dataset}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_local_dataset_becomes_a_store(tmp_path, kind):
    """Splits, class names in their order, labels and sounds are those of the dataset; its settings make it again."""
    WRITERS[kind](tmp_path / "hf")
    corpus = hub_corpus(str(tmp_path / "hf"), clip_seconds=0.5)
    assert corpus.classes.names == tuple(CLASS_NAMES)
    build_store(
        corpus, StoreOutput(path=tmp_path / "s.zarr", spec=preset_mel_spec("a-jepa")), BuildOptions(workers=0)
    )
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert store.manifest["status"].to_list() == ["good"] * 7

    # Row for row: its split, its label, its sound.
    by_id = {row["clip_id"]: number for number, row in enumerate(store.manifest.iter_rows(named=True))}
    for number in range(7):
        row = by_id[f"{number}.flac"]
        assert store.manifest["split"][row] == ("train" if number < 5 else "test")
        assert store.labels_BC(np.array([row]))[0].tolist() == np.eye(3)[number % 3].tolist()
    assert len(store.good_rows("test")) == 2
    loudest = [store.to_log_mel(store.read(np.array([row])))[0].mean() for row in range(7)]
    assert len(set(loudest)) == 7

    again = recreate_corpus(corpus.dataset_settings)
    assert again.plan.equals(corpus.plan)
    assert hub_settings(os.path.relpath(tmp_path / "hf"))["source"] == str(
        Path(os.path.relpath(tmp_path / "hf")).absolute()
    )
    assert again.sources.frame.equals(corpus.sources.frame)
    assert "7 rows in" in corpus.notes[0]
    assert "labels are those of column 'label', which 7 of 7 rows have" in corpus.notes[1]


def test_both_forms_of_a_dataset_give_the_same_corpus(tmp_path):
    """Only the places of the sounds differ."""
    plans = []
    for kind, write in WRITERS.items():
        write(tmp_path / kind)
        plans.append(hub_corpus(str(tmp_path / kind)).plan.sort("clip_id"))
    assert plans[0].equals(plans[1])


@pytest.mark.parametrize(
    ("label", "cells", "mids"),
    [
        (CLASS_LABEL, [2, -1, None], [["siren"], [], []]),
        ({"feature": CLASS_LABEL, "_type": "Sequence"}, [[0, 2], [], None], [["dog", "siren"], [], []]),
        ({"feature": CLASS_LABEL, "_type": "List"}, [[0, 0], [1], []], [["dog"], ["rain"], []]),
        ([CLASS_LABEL], [[1], [], [0]], [["rain"], [], ["dog"]]),
        ({"dtype": "string", "_type": "Value"}, ["a", "", None], [["a"], [], []]),
        (None, [7, 8, 9], [["7"], ["8"], ["9"]]),
    ],
)
def test_labels_of_every_kind_are_read(tmp_path, label, cells, mids):
    """A number of a class, -1 for a secret one, lists of them in each spelling of `datasets`, texts, plain numbers."""
    (tmp_path / "hf").mkdir()
    pq.write_table(table_of(3, label=label, cells=cells), tmp_path / "hf" / "train.parquet")
    assert hub_corpus(str(tmp_path / "hf")).plan["mids"].to_list() == mids


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("data/validation-00000-of-00003.parquet", "validation"),
        ("data/train.clean.100-00000-of-00001.parquet", "train.clean.100"),
        ("default/test/0000.parquet", "test"),
        ("en/dev/part-1.parquet", "validation"),
        ("my_test.parquet", "test"),
        ("contest.parquet", "train"),
        ("a.parquet", "train"),
    ],
)
def test_a_file_tells_its_split(tmp_path, name, split):
    """The names of `push_to_hub`, of the hub's own copies, and of people."""
    assert split_of_file(tmp_path, name) == split


def test_a_sound_that_only_a_path_names_is_read_from_there(tmp_path):
    """A dataset of local files that was saved without its sounds; a row without any is missing, not lost."""
    path = tmp_path / "a.wav"
    soundfile.write(path, babble(0.5, RATE_HZ), RATE_HZ)
    audio = [{"bytes": None, "path": str(path)}, {"bytes": None, "path": "gone.wav"}, None]
    table = pa.table({"audio": pa.array(audio, AUDIO), "id": ["a", "b", "c"]})
    write_arrow(tmp_path / "hf" / "data-00000-of-00001.arrow", table)
    (tmp_path / "hf" / "state.json").write_text(json.dumps({"_split": "dev"}))
    corpus = hub_corpus(str(tmp_path / "hf"))
    assert corpus.sources.frame["kind"].to_list() == ["file", None, None]
    assert corpus.plan["split"].unique().to_list() == ["dev"]
    assert corpus.plan["clip_id"].to_list() == [str(path), "gone.wav", "c"]
    assert "no column of labels" in corpus.notes[1]


def test_names_that_repeat_are_replaced_by_split_and_row(tmp_path):
    """Two splits may hold files of the same names."""
    (tmp_path / "hf").mkdir()
    for split in ("train", "test"):
        pq.write_table(table_of(2), tmp_path / "hf" / f"{split}.parquet")
    ids = hub_corpus(str(tmp_path / "hf")).plan["clip_id"].to_list()
    assert ids == ["test-0000000", "test-0000001", "train-0000000", "train-0000001"]


def test_a_dataset_comes_from_the_hub(tmp_path, monkeypatch):
    """Fetched once into the hub's cache, at a commit that the store's settings keep."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    write_parquet_dataset(tmp_path / "hf")
    with local_hub() as server:
        for path in (tmp_path / "hf" / "data").iterdir():
            server.files[path.name] = path.read_bytes()
        fetch = hub.snapshot_download
        revisions = []

        def fetch_here(*names, revision, **options):
            revisions.append(revision)
            cache = str(tmp_path / "cache")
            return fetch(*names, revision=revision, **options, endpoint=server.address, cache_dir=cache)

        monkeypatch.setattr(hub, "snapshot_download", fetch_here)
        corpus = hub_corpus("org/tiny")
        check_later_builds_ask_no_hub(tmp_path, revisions)
    assert corpus.plan.height == 7
    assert corpus.dataset_settings["source"] == "org/tiny"
    assert corpus.dataset_settings["revision"] == "0" * 40
    assert sorted(corpus.plan["split"].unique()) == ["test", "train"]


def check_later_builds_ask_no_hub(tmp_path: Path, revisions: list[str | None]) -> None:
    """The store has the plan and the commit; only where the cache of the hub was emptied, that commit is fetched."""
    out = tmp_path / "s.zarr"
    request = CorpusRequest(settings=hub_settings("org/tiny"), make=lambda: hub_corpus("org/tiny"))
    first = corpus_of_request(request, [out])
    build_store(first, StoreOutput(path=out, spec=preset_mel_spec("a-jepa")), BuildOptions(workers=0))
    revisions.clear()
    later = CorpusRequest(settings=hub_settings("org/tiny"), make=pytest.fail)
    again = corpus_of_request(later, [out])
    assert not revisions
    assert again.plan.equals(first.plan.drop("mids"))
    assert again.dataset_settings == first.dataset_settings
    assert again.requested_settings == request.settings

    # Other options are another request.
    other = CorpusRequest(settings=hub_settings("org/tiny", label_column="label"), make=lambda: first)
    assert corpus_of_request(other, [out]) is not again
    assert corpus_of_request(other, [out]).stored_plan is None

    shutil.rmtree(tmp_path / "cache")
    found = corpus_of_request(later, [out])
    assert revisions == ["0" * 40]
    assert all(Path(path).exists() for path in found.sources.frame["path"])


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (shutil.rmtree, {}, "hf: no such folder"),
        (
            lambda folder: (folder / "data").rename(folder.parent / "away"),
            {},
            "holds no Parquet .* build-folder",
        ),
        (None, {"label_column": "lable"}, "no column 'lable'; did you mean 'label'"),
        (None, {"config": "en"}, "no configuration 'en'"),
        (lambda folder: write_configs(folder), {}, "holds 2 configurations; add --config, one of: de, en"),
        (
            lambda folder: write_two_labels(folder),
            {},
            "2 columns of class labels; add --label-column, one of: a, b",
        ),
        (lambda folder: write_text(folder), {}, "test.parquet: cannot be read"),
        (lambda folder: write_cells(folder, [5]), {}, r"0.flac: class 5, expected 0 to 2"),
    ],
)
def test_what_is_no_dataset_is_refused_in_one_line(tmp_path, prepare, options, message):
    """Each with what to do next."""
    folder = tmp_path / "hf"
    write_parquet_dataset(folder)
    if prepare is not None:
        prepare(folder)
    with pytest.raises(InputError, match=message):
        hub_corpus(str(folder), **options)


def write_configs(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    for name in ("de", "en"):
        (folder / name).mkdir()
        pq.write_table(table_of(1), folder / name / "train.parquet")


def write_two_labels(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    table = pa.table({"audio": table_of(1)["audio"], "a": [0], "b": [0]})
    metadata = {"huggingface": json.dumps({"info": {"features": {"a": CLASS_LABEL, "b": CLASS_LABEL}}})}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "train.parquet")


def write_text(folder: Path) -> None:
    (folder / "data" / "a_test.parquet").write_text("no table")


def write_cells(folder: Path, cells: list) -> None:
    shutil.rmtree(folder / "data")
    pq.write_table(table_of(1, cells=cells), folder / "train.parquet")
