"""A dry run describes the build and builds nothing."""

import numpy as np
import polars as pl
import pytest
from corpus import write_corpus
from sounds import babble, write
from stores import corpus_in

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.dry_run import TIMED_CLIPS, describe_dry_run, draw_timed_rows
from pipeline.build.plan import BuildOptions, StoreOutput, note_rows_beyond_clips
from pipeline.datasets.folder import folder_corpus


@pytest.fixture(scope="module")
def dry_run_text(tmp_path_factory) -> str:
    folder = write_corpus(tmp_path_factory.mktemp("dry") / "corpus", clips=20)
    (folder / "audio" / "holiday.wav").write_bytes(b"")
    out = folder.parent / "x.zarr"
    text = describe_dry_run(
        corpus_in(folder), [StoreOutput(path=out, spec=preset_mel_spec("a-jepa"))], BuildOptions()
    )
    assert not out.exists()
    return text


def test_it_counts_the_clips_listed_and_those_with_a_sound(dry_run_text):
    """One of fifteen training clips has no file."""
    lines = [line.split() for line in dry_run_text.splitlines()]
    assert ["a_train", "15", "14", "0"] in lines
    assert ["eval", "5", "5", "0"] in lines
    assert "1 of 20 sounds match no row, such as holiday.wav" in dry_run_text


def test_it_gives_the_size_of_the_store_and_the_failures_of_a_sample(dry_run_text):
    """19 clips of 998 x 128 float16 values; one of the clips tried is silent."""
    assert f"up to {19 * 998 * 128 * 2 / 2**20:,.1f} MiB" in dry_run_text
    assert "19 clips tried" in dry_run_text
    assert "1 silent" in dry_run_text
    assert "on 2 workers: about" in dry_run_text


def test_rows_that_ask_for_more_than_a_clip_holds_are_told(tmp_path):
    """The rest of such a row is not stored, which nobody would notice."""
    (tmp_path / "sounds").mkdir()
    write(tmp_path / "sounds" / "a.wav", babble(30, 8_000), 8_000)
    (tmp_path / "t.csv").write_text("path,start,end\na.wav,0,25\na.wav,5,15\n")
    corpus = folder_corpus(tmp_path / "sounds", tmp_path / "t.csv")
    output = StoreOutput(path=tmp_path / "x.zarr", spec=preset_mel_spec("a-jepa"))
    (note,) = note_rows_beyond_clips(corpus, [output])
    assert "1 of 2 rows ask for more than the 10 s of a clip, such as 'a.wav' for 25 s" in note
    assert note in describe_dry_run(corpus, [output], BuildOptions())


def test_rows_of_a_parquet_file_are_timed_in_a_run():
    """A build reads each row group once; rows here and there would read it anew each time, up to 256 MB a clip."""
    rows = 10_000
    sources = pl.DataFrame(
        {
            "kind": ["parquet", "file"] * (rows // 2),
            "path": ["x.parquet", "y.wav"] * (rows // 2),
            "group": [0, None] * (rows // 2),
            "row": np.random.default_rng(0).permutation(rows).tolist(),
        }
    )
    drawn_N = draw_timed_rows(sources, np.arange(rows), seed=0)
    assert len(drawn_N) == len(set(drawn_N.tolist())) == TIMED_CLIPS
    is_parquet_N = drawn_N % 2 == 0
    assert 10 < is_parquet_N.sum() < 38
    in_file = sources["row"].gather(drawn_N[is_parquet_N])
    all_in_file = sources.filter(pl.col("kind") == "parquet")["row"].sort()
    places_N = all_in_file.search_sorted(in_file).to_numpy()
    assert (np.diff(places_N) == 1).all()
