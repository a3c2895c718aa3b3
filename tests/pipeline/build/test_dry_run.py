"""A dry run tells what would be built, and builds nothing."""

import pytest
from corpus import write_corpus
from stores import corpus_in

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.dry_run import describe_dry_run
from pipeline.build.plan import BuildOptions, StoreOutput


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("dry") / "corpus", clips=20)
    (folder / "audio" / "holiday.wav").write_bytes(b"")
    out = folder.parent / "x.zarr"
    text = describe_dry_run(
        corpus_in(folder), [StoreOutput(path=out, spec=preset_mel_spec("a-jepa"))], BuildOptions()
    )
    assert not out.exists()
    return [line.split() for line in text.splitlines()], text


def test_it_counts_what_is_listed_and_what_is_there(said):
    """One of fifteen training clips has no file."""
    lines, text = said
    assert ["a_train", "15", "14", "0"] in lines
    assert ["eval", "5", "5", "0"] in lines
    assert "1 of 20 sounds match no row, such as holiday.wav" in text


def test_it_tells_the_size_and_the_reasons_of_a_sample(said):
    """19 clips of 998 x 128 float16 values; a silent one among those tried."""
    _, text = said
    assert f"up to {19 * 998 * 128 * 2 / 2**20:,.1f} MiB" in text
    assert "19 clips tried" in text
    assert "1 silent" in text
    assert "on 2 workers: about" in text
