"""Clips cut out of longer sounds hold their own seconds, and end with the sound."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tones import SPEC, band_of, built, halves, write_seconds

from pipeline.datasets.corpus import CutSettings
from pipeline.datasets.folder import folder_corpus
from pipeline.errors import InputError, ManifestError


def write_table(clips: Path, text: str) -> Path:
    path = clips.parent / "table.csv"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("length_seconds", "clip", "hop", "spans"),
    [
        (3.0, 10, 10, [(0, 3)]),
        (10.0, 10, 10, [(0, 10)]),
        (10.3, 10, 10, [(0, 10)]),
        (14.9, 10, 10, [(0, 10)]),
        (15.0, 10, 10, [(0, 10), (10, 15)]),
        (10.3, 10, 5, [(0, 10), (5, 10.3)]),
        (10.0004, 10, 5, [(0, 10)]),
        (20.0, 10, 5, [(0, 10), (5, 15), (10, 20)]),
        (12.0, 2, 5, [(0, 2), (5, 7), (10, 12)]),
        (11.0, 2, 5, [(0, 2), (5, 7), (10, 11)]),
        (10.5, 2, 5, [(0, 2), (5, 7)]),
        (8.0, 2, 5, [(0, 2), (5, 7)]),
    ],
)
def test_pieces_end_with_the_sound(length_seconds, clip, hop, spans):
    """No second is cut twice beyond the overlap asked for, and no scrap becomes a clip."""
    assert list(CutSettings(clip_seconds=clip, hop_seconds=hop).piece_spans(0.0, length_seconds)) == spans


@pytest.mark.parametrize(
    ("length_seconds", "clip", "spans"),
    [
        (14.9, 10, [(0, 10), (10, 14.9)]),
        (10.5, 10, [(0, 10), (10, 10.5)]),
        (10.4, 10, [(0, 10)]),
        (3.15, 1, [(0, 1), (1, 2), (2, 3), (3, 3.15)]),
        (0.2, 10, [(0, 0.2)]),
    ],
)
def test_a_tail_is_kept_on_request(length_seconds, clip, spans):
    """From half a second on, or a tenth of short clips."""
    cut_settings = CutSettings(clip_seconds=clip, hop_seconds=clip, keep_tail=True)
    assert list(cut_settings.piece_spans(0.0, length_seconds)) == spans


def test_tails_that_are_left_out_are_told(tmp_path):
    """With the option that keeps them, and without a word on what nobody would miss."""
    for name, seconds in {"a.wav": 14.9, "b.wav": 13, "c.wav": 10.3, "d.wav": 8}.items():
        write_seconds(tmp_path / name, seconds)
    corpus = folder_corpus(tmp_path, clip_seconds=10, hop_seconds=10)
    (note,) = [note for note in corpus.notes if "half a clip" in note]
    assert note == "2 sounds end with less than half a clip: 7.9 s are left out; --keep-tail keeps them"
    assert "keep_tail" not in corpus.dataset_settings

    kept = folder_corpus(tmp_path, clip_seconds=10, hop_seconds=10, keep_tail=True)
    assert not [note for note in kept.notes if "half a clip" in note]
    assert kept.plan.height == corpus.plan.height + 2
    assert kept.dataset_settings["keep_tail"] is True
    with pytest.raises(InputError, match="only sounds that are cut have a tail"):
        folder_corpus(tmp_path, keep_tail=True)


def test_between_the_pieces_of_a_long_hop_nothing_is_missed(tmp_path):
    """Who hops further than a clip leaves the rest out by request."""
    write_seconds(tmp_path / "a.wav", 14.5)
    notes = folder_corpus(tmp_path, clip_seconds=5, hop_seconds=10).notes
    assert not [note for note in notes if "half a clip" in note]


def test_every_piece_holds_its_own_seconds(tmp_path):
    """A file in which second k is tone k: the spectrogram of a piece must hold the tones of its seconds."""
    for name, seconds in {
        "a.wav": 12,
        "b.mp3": 12,
        "c.m4a": 17,
        "d.flac": 5.2,
        "e.opus": 3,
        "f.wav": 7.4,
    }.items():
        write_seconds(tmp_path / "clips" / name, seconds)
    (tmp_path / "clips" / "g.wav").write_text("no sound")
    store, tones_by_clip = built(
        folder_corpus(tmp_path / "clips", clip_seconds=5, hop_seconds=3), tmp_path / "x.zarr"
    )
    expected = {}
    for name, last in {"a.wav": 9, "b.mp3": 9, "c.m4a": 12, "d.flac": 3, "e.opus": 0, "f.wav": 3}.items():
        expected |= {f"{name}@{start * 1000}": start for start in range(0, last + 1, 3)}
    expected.pop("d.flac@3000")  # 2.2 of 5 s: under half a clip
    assert set(tones_by_clip) == set(expected)
    for clip_id, tones_heard in tones_by_clip.items():
        start = expected[clip_id]
        assert tones_heard == halves(*range(start, start + 5))[: len(tones_heard)], clip_id
    lengths = {clip_id: len(tones_heard) / 2 for clip_id, tones_heard in tones_by_clip.items()}
    assert lengths["a.wav@6000"] == lengths["d.flac@0"] == 5
    assert (lengths["a.wav@9000"], lengths["e.opus@0"], lengths["f.wav@3000"]) == (3, 3, 4.5)
    failed = store.manifest.filter(pl.col("status") == "failed")
    assert failed.select("clip_id", "reason").rows() == [("g.wav@0", "unreadable")]


def test_the_seconds_of_a_table_are_those_of_the_file(tmp_path):
    """Also where they reach past its end, or are nearly the whole file, which may pass for the clip itself."""
    write_seconds(tmp_path / "clips" / "a.wav", 12)
    write_seconds(tmp_path / "clips" / "b.wav", 5)
    text = (
        "path,start,end,label\na.wav,7,9,x\na.wav,10,15,x\na.wav,20,25,x\nb.wav,0,9,x\nb.wav,0.2,5,x\n"
        "b.wav,3,,x\nnone.wav,3,5,x\n"
    )
    corpus = folder_corpus(tmp_path / "clips", write_table(tmp_path / "clips", text))
    store, tones_by_clip = built(corpus, tmp_path / "x.zarr")
    assert tones_by_clip.pop("b.wav@200") == halves(0, 1, 2, 3, 4)
    row = store.manifest["clip_id"].to_list().index("b.wav@200")
    loudest_T = store.read(np.array([row]))[0].argmax(axis=1)
    assert (loudest_T == band_of(0, SPEC)).sum() == pytest.approx(80, abs=3)  # 0.8 s of tone 0 are left
    assert tones_by_clip == {
        "a.wav@7000": halves(7, 8),
        "a.wav@10000": halves(10, 11),
        "b.wav": halves(0, 1, 2, 3, 4),
        "b.wav@3000": halves(3, 4),
    }
    failed = store.manifest.filter(pl.col("status") == "failed")
    assert failed.select("clip_id", "reason").rows() == [
        ("a.wav@20000", "too_short"),
        ("none.wav@3000", "missing"),
    ]
    notes = " ".join(corpus.notes)
    assert "1 of 7 files are not there, such as line 8: 'none.wav'" in notes
    assert "starts at 20 s of a sound of 12.00 s" in failed["detail"][0]


def test_stretches_of_a_table_are_cut_too(tmp_path):
    """Pieces stay inside the seconds that the table names; an id of one's own gets the piece's start."""
    write_seconds(tmp_path / "clips" / "a.wav", 20)
    path = write_table(tmp_path / "clips", "path,start,end,id\na.wav,2,13,mine\na.wav,16,,\n")
    corpus = folder_corpus(tmp_path / "clips", path, clip_seconds=5, hop_seconds=5)
    assert corpus.plan.select("clip_id", "start_seconds", "end_seconds").rows() == [
        ("mine@2000", 2, 7),
        ("mine@7000", 7, 12),
        ("a.wav@16000", 16, 20),
    ]
    path = write_table(tmp_path / "clips", "path,start,end\na.wav,2,13\na.wav,7,12\n")
    with pytest.raises(ManifestError, match="2 clips share their id with another, such as 'a"):
        folder_corpus(tmp_path / "clips", path, clip_seconds=5, hop_seconds=5)


def test_the_stream_of_opened_files_can_be_watched(tmp_path):
    """Opening a hundred thousand files takes minutes, in which something should move."""
    for name in ("a.wav", "b.wav"):
        write_seconds(tmp_path / name, 1)
    lengths = []

    def progress(number, stream):
        for item in stream:
            lengths.append((number, item))
            yield item

    folder_corpus(tmp_path, clip_seconds=1, hop_seconds=1, progress=progress)
    assert lengths == [(2, 1.0), (2, 1.0)]
