"""The page of a store has the right numbers, needs no other file and escapes every text, for stores of every kind."""

import re
import shutil
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

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
        e for e in Elements(render_store_page(store, clip_count=1)).all if e["tag"] == "tr" and "data-n" in e
    )
    every, train, evaluation = (list(map(int, part.split(","))) for part in speech["data-n"].split(";"))
    assert np.add(train, evaluation).tolist() == every == [int(c["text"]) for c in speech["cells"][1:]]
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
