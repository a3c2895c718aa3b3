"""The page of a store has the right numbers, needs no other file and escapes every text, for stores of every kind."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
import soundfile

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.folder import folder_corpus
from pipeline.errors import StoreError
from pipeline.report.describe import describe_store
from pipeline.report.durations import SoundDurations, unused_source_seconds
from pipeline.report.html import Markup, html_tag
from pipeline.report.store_page import render_store_page, write_store_page
from pipeline.store.feature_store import FeatureStore
from pipeline.tables import read_table, write_table

NASTY = """<script>alert("x")</script>&'\"><img src=//evil.example/x>$body"""

VOID = {"meta", "input", "br"}


class Elements(HTMLParser):
    """Every element with its attributes and text; tags that do not match are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[dict] = []
        self.all: list[dict] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.all.append({"tag": tag, "text": "", "cells": []} | dict(attrs))
        if tag in ("th", "td"):
            next(e for e in reversed(self.open) if e["tag"] == "tr")["cells"].append(self.all[-1])
        if tag not in VOID:
            self.open.append(self.all[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def rows(self) -> dict[str, list[str]]:
        rows = [[cell["text"] for cell in e["cells"]] for e in self.all if e["tag"] == "tr" and e["cells"]]
        return {first: rest for first, *rest in rows}


@pytest.fixture
def copy(store_path, tmp_path):
    return shutil.copytree(store_path, tmp_path / "copy.zarr")


def change(path, name, **columns):
    frame, metadata = read_table(path / name)
    write_table(path / name, frame.with_columns(**columns), metadata)


def test_the_numbers_are_those_of_the_manifest(store):
    """Coverage, reasons, and every class before and after propagation."""
    elements = Elements(render_store_page(store, clip_count=2))
    text, rows = elements.all[0]["text"], elements.rows()
    rows |= {
        e["cells"][0]["text"]: [c["text"] for c in e["cells"][1:]] for e in elements.all if "data-n" in e
    }
    assert "45 of 48 clips are good: 93.75 %" in text
    assert "34 of 36 good, 94.44 %" in text
    assert rows["missingno file was found for the clip"] == ["1", "0"]
    for name in ("raw", "unambiguous"):
        positives_C = store.labels_BC(store.good_rows(), name).sum(0).astype(int)
        column = 1 if name == "raw" else 2
        assert [int(rows[c][column]) for c in store.classes.names] == positives_C.tolist()
    assert store.store_id in text
    assert store.header.plan_id in text
    assert store.spec_id in text


def test_the_commonest_classes_come_first_and_empty_ones_are_folded(store):
    """Of AudioSet's 527 classes most stores have few, and nobody scrolls past 500 zeros."""
    rows = [
        e for e in Elements(render_store_page(store, clip_count=1)).all if e["tag"] == "tr" and "data-n" in e
    ]
    good = [int(row["cells"][2]["text"].replace(",", "")) for row in rows]
    assert good == sorted(good, reverse=True)
    assert [("hidden" in row) for row in rows] == [not re.search("[1-9]", row["data-n"]) for row in rows]
    assert good[0] > 0


def test_the_page_opens_with_how_much_sound_there_is(store):
    """Seconds of the good clips, by their valid frames; 45 clips of about 10 s."""
    text = render_store_page(store, clip_count=1)
    header = text[text.index("<header>") : text.index("</header>")]
    seconds = store.n_frames_N[store.good_rows()].sum() * 0.01
    assert f"<b>{seconds / 60:.1f} min</b>" in header
    assert "<b>34</b><span>in a_train, " in header
    assert "are longer than their clips" not in header
    assert store.store_id not in header


@pytest.fixture(scope="module")
def long_store(tmp_path_factory) -> FeatureStore:
    """Two sounds of 25 s and one of 8 s, of each the first 10 s at most."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "sounds").mkdir()
    for name, seconds in (("a", 25), ("b", 25), ("c", 8)):
        noise_S = 0.1 * np.random.default_rng(seconds).standard_normal(seconds * 8_000)
        soundfile.write(folder / "sounds" / f"{name}.wav", noise_S, 8_000)
    output = StoreOutput(path=folder / "long.zarr", spec=preset_mel_spec("a-jepa"), dtype="float16")
    build_store(folder_corpus(folder / "sounds"), output, BuildOptions(workers=0))
    return FeatureStore.open(folder / "long.zarr")


def test_sound_that_is_in_no_clip_is_told(long_store):
    """Two times 15 s are lost: whoever built without --hop-seconds learns it from the page."""
    durations = SoundDurations.of_store(long_store)
    assert durations.longer_sources == 2
    assert durations.unused_seconds == pytest.approx(30, abs=0.5)
    text = render_store_page(long_store, clip_count=1)
    assert "2 sounds are longer than their clips: 30 s of them is in no clip." in text


def test_a_store_without_labels_has_no_class(long_store):
    """The one class that every store needs is no class of the user."""
    assert "<b>no</b><span>labels</span>" in render_store_page(long_store, clip_count=1)
    assert re.search(r"^classes +none$", describe_store(long_store), re.MULTILINE)


def test_pieces_that_failed_and_overlaps_are_no_unused_sound(tmp_path):
    """Of 14.9 s 4.9 s are left out; of a recording that is cut short nothing; half of each clip is in two."""
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for name, seconds in (("tail", 14.9), ("cut", 34.0)):
        noise_S = 0.1 * np.random.default_rng(1).standard_normal(round(seconds * 8_000))
        soundfile.write(sounds / f"{name}.wav", noise_S, 8_000)
    (sounds / "cut.wav").write_bytes((sounds / "cut.wav").read_bytes()[: 44 + 13 * 16_000])
    for hop_seconds, unused in ((10, [4.9]), (5, [])):
        output = StoreOutput(
            path=tmp_path / f"{hop_seconds}.zarr", spec=preset_mel_spec("a-jepa"), dtype="float16"
        )
        corpus = folder_corpus(sounds, clip_seconds=10, hop_seconds=hop_seconds)
        build_store(corpus, output, BuildOptions(workers=0))
        assert unused_source_seconds(FeatureStore.open(output.path)).to_list() == pytest.approx(unused)


def test_the_page_plays_the_clips_if_it_is_asked_to(long_store):
    """The sound of the row, and not of another one: 5 s of MP3 at an equal level."""
    text = render_store_page(long_store, clip_count=3, with_sounds=True)
    players = [e for e in Elements(text).all if e["tag"] == "audio"]
    assert len(players) == 3
    sound = base64.b64decode(players[0]["src"].removeprefix("data:audio/mpeg;base64,"))
    wave_S, rate_hz = soundfile.read(io.BytesIO(sound))
    assert rate_hz == 16_000
    assert len(wave_S) / rate_hz == pytest.approx(5, abs=0.2)
    assert 0.5 < np.abs(wave_S).max() < 0.9


def test_sounds_that_are_gone_are_an_error_only_if_they_were_asked_for(long_store, tmp_path):
    """The page itself needs no sound."""
    moved = shutil.copytree(long_store.path, tmp_path / "moved.zarr")
    record = json.loads((moved / "build.json").read_text())
    (moved / "build.json").write_text(json.dumps({key: record[key] for key in record if key != "asked"}))
    store = FeatureStore.open(moved)
    assert "</html>" in render_store_page(store)
    with pytest.raises(StoreError, match="does not say where its sounds lie; leave out --sounds"):
        render_store_page(store, with_sounds=True)


def test_classes_without_a_positive_are_named(store):
    """Their average precision is undefined, and a mean over classes leaves them out."""
    names = [
        e["text"] for e in Elements(render_store_page(store, clip_count=1)).all if e.get("class") == "names"
    ]
    empty_C = store.labels_BC(store.good_rows(["a_train"])).sum(0) == 0
    assert f"{empty_C.sum()} of 527 classes have no positive clip" in render_store_page(store, clip_count=1)
    assert all(store.classes.names[index] in names[0] for index in np.flatnonzero(empty_C))


def test_a_rows_hidden_counts_are_those_of_its_splits(store):
    """The script shows these when a split is chosen."""
    speech = next(
        e
        for e in Elements(render_store_page(store, clip_count=1)).all
        if "data-n" in e and e["cells"][0]["text"] == "Speech"
    )
    every, train, evaluation = (list(map(int, part.split(","))) for part in speech["data-n"].split(";"))
    assert np.add(train, evaluation).tolist() == every == [int(c["text"]) for c in speech["cells"][1:-1]]
    assert evaluation[1] == store.labels_BC(store.good_rows(["eval"]))[:, 0].sum()


def test_the_page_needs_nothing_beside_itself(store):
    """Pages are mailed, archived and opened without a network."""
    text = render_store_page(store, clip_count=3)
    elements = Elements(text).all
    sources = [e[key] for e in elements for key in ("src", "href", "action", "poster") if e.get(key)]
    assert len([s for s in sources if s.startswith("data:image/png;base64,")]) == 3 + 1
    assert {s.split(",")[0] for s in sources if not s.startswith("#")} == {"data:image/png;base64"}
    assert not {"link", "iframe", "object", "base"} & {e["tag"] for e in elements}
    assert not re.search(r"@import|url\(|https?://", text)


def test_the_same_store_gives_the_same_bytes(store, tmp_path):
    """A page can be compared with an earlier page of the store."""
    write_store_page(store, tmp_path / "new" / "a.html")
    write_store_page(FeatureStore.open(store.path), tmp_path / "b.html")
    assert (tmp_path / "new" / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "b.html").stat().st_size < 2_000_000


def test_text_from_files_is_escaped(copy):
    """Ids, paths and labels are text that users typed."""
    before = [e["tag"] for e in Elements(render_store_page(FeatureStore.open(copy))).all]
    nasty = {name: NASTY + pl.col(name) for name in ("clip_id", "detail", "codec", "source", "split")}
    change(copy, "manifest.parquet", **nasty)
    outside = pl.lit([NASTY], dtype=pl.List(pl.String))
    change(copy, "labels.parquet", outside=outside)
    (copy / "build.json").write_text('{"asked": {"<b>": ["<i>"]}, "versions": {"<u>": "<s>"}}')
    elements = Elements(text := render_store_page(FeatureStore.open(copy))).all
    assert [e["tag"] for e in elements].count("script") == before.count("script") == 1
    assert not {"b>", "i>", "u>", "img", "s"} & {e["tag"] for e in elements}
    assert NASTY in elements[0]["text"]
    assert "<script>alert" not in text


def test_a_store_without_labels_says_so(copy):
    """Such a store serves pre-training."""
    nothing = pl.lit([], dtype=pl.List(pl.UInt16))
    change(copy, "labels.parquet", raw=nothing, unambiguous=nothing)
    assert "No clip has a label" in render_store_page(FeatureStore.open(copy))


def test_a_split_without_a_good_clip_says_so(copy):
    """A row of zeros could be taken for a fault of the page."""
    bad = pl.col("split") == "eval"
    change(
        copy,
        "manifest.parquet",
        status=pl.when(bad).then(pl.lit("failed")).otherwise("status"),
        reason=pl.when(bad).then(pl.lit("missing")).otherwise("reason"),
    )
    text = render_store_page(FeatureStore.open(copy))
    assert "no good clip among 12" in text
    assert "eval</b>: no good clip, so no class has a positive" in text


def test_a_store_without_a_good_clip_has_a_page(copy):
    """The reasons of failure matter most then."""
    change(copy, "manifest.parquet", status=pl.lit("failed"), reason=pl.lit("unreadable"))
    (copy / "stats.json").write_text('{"all": {"frames": 0}}')
    (copy / "build.json").unlink()
    text = render_store_page(FeatureStore.open(copy))
    assert text.count("No clip is good") == 3
    assert "the first 5 of 48" in text
    assert "no build.json" in text


def test_uint8_stores_have_pages(uint8_store_path):
    """This store has no propagated label set, either."""
    text = render_store_page(FeatureStore.open(uint8_store_path), clip_count=2)
    assert "stored as uint8 with an error of 0.0" in text
    assert "good, unambiguous" not in text


def test_text_is_escaped_once_and_markup_never_again():
    """`&amp;amp;` is the sign of a page that escapes twice."""
    assert html_tag("p", "a & b", html_tag("b", "<"), 1234) == "<p>a &amp; b<b>&lt;</b>1,234</p>"
    assert html_tag("a", "x", href='"&', class_=None) == '<a href="&quot;&amp;">x</a>'
    assert isinstance(html_tag("br"), Markup)
