"""Eighty real clips in eight containers and one of each of 33 bad or odd inputs, where a copy of them is at hand."""

from pathlib import Path

import polars as pl
import pytest

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import StoreOutput
from pipeline.build.verify import find_faults
from pipeline.datasets.audioset import audioset_corpus
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.store.feature_store import FeatureStore
from pipeline.tables import read_table

CORPUS = Path(__file__).parents[4] / "shared" / "corpus"

LINK = CORPUS / "audio" / "balanced_train" / "6JjzNyxwZg9.wav"

pytestmark = pytest.mark.skipif(
    not CORPUS.exists(), reason="the corpus of real clips is not beside the project"
)

REASON_OF = {
    "zero_bytes": "unreadable",
    "text_as_wav": "unreadable",
    "html_as_m4a": "unreadable",
    "header_only_wav": "unreadable",
    "m4a_without_moov": "unreadable",
    "missing": "missing",
    "dangling_link": "missing" if LINK.is_symlink() else "unreadable",  # some copies turn links into text
    "directory": "missing",
    "truncated_wav": "truncated",
    "truncated_flac": "truncated",
    "truncated_mp3": "truncated",
    "silent": "silent",
    "ten_samples": "too_short",
    "nan_float": "non_finite",
    "inf_float": "non_finite",
}

FLAG_OF = {
    "short_2s": "shorter",
    "long_30s": "longer",
    "stereo": "mixed_down",
    "six_channels": "mixed_down",
    "over_range_float": "beyond_full_scale",
    "flac_named_wav": "wrong_extension",
    "mp3_named_wav": "wrong_extension",
}


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> FeatureStore:
    out = tmp_path_factory.mktemp("real") / "real.zarr"
    segments = [CORPUS / "balanced_train_segments.csv", CORPUS / "eval_segments.csv"]
    build_store(
        audioset_corpus([CORPUS / "audio"], segments), StoreOutput(path=out, spec=preset_mel_spec("a-jepa"))
    )
    return FeatureStore.open(out)


@pytest.fixture(scope="module")
def joined_manifest(real) -> pl.DataFrame:
    """The manifest beside the truth about every line; both are in the order of the lists."""
    truth = pl.read_csv(CORPUS / "truth.csv", schema_overrides={"positive": pl.String})
    truth = truth.filter(pl.col("kind") != "unlisted_file").select(
        "ytid", "kind", "positive", truth_split="split"
    )
    both = truth.with_columns(n=pl.int_range(pl.len()).over("ytid", "truth_split"))
    rows = real.manifest.with_row_index("row").with_columns(n=pl.int_range(pl.len()).over("clip_id", "split"))
    joined = rows.join(
        both, left_on=["clip_id", "split", "n"], right_on=["ytid", "truth_split", "n"], how="full"
    )
    assert joined.height == rows.height == truth.height
    return joined


def test_every_good_clip_is_in_and_every_bad_one_says_why(joined_manifest):
    """The right reason for each, and nothing else lost."""
    expected = pl.col("kind").replace_strict(REASON_OF, default=None, return_dtype=pl.String)
    is_second_row = (pl.col("kind") == "duplicate_id") & (pl.col("n") == 1)
    is_in_other_list = (pl.col("kind") == "in_both_csvs") & (pl.col("split") != "eval")
    expected = pl.when(is_second_row | is_in_other_list).then(pl.lit("duplicate")).otherwise(expected)
    wrong = (
        joined_manifest.filter(expected.is_null() != (pl.col("status") == "good"))
        .select("kind", "reason", "detail")
        .rows()
    )
    assert wrong == []
    assert (
        joined_manifest.filter(expected != pl.col("reason")).select("kind", "reason", "detail").rows() == []
    )


def test_odd_but_usable_clips_are_used_and_flagged(joined_manifest):
    """Users must be able to leave such clips out, or to look at them."""
    for kind, flag in FLAG_OF.items():
        assert flag in joined_manifest.filter(pl.col("kind") == kind)["flags"][0], kind


def test_a_short_clip_says_how_much_of_it_is_sound(joined_manifest):
    """Two seconds are 198 frames; the rest is padding and must not train anybody."""
    assert joined_manifest.filter(pl.col("kind") == "short_2s")["n_frames"].to_list() == [198]
    full = joined_manifest.filter(pl.col("kind").is_in(["stereo", "long_30s", "rate_8k", "rate_96k"]))
    assert full["n_frames"].to_list() == [998] * 4


def test_labels_outside_the_list_are_kept_aside(real, joined_manifest):
    """An unknown id costs neither the clip nor its other labels; no labels at all are fine for pre-training."""
    labels = read_table(real.path / "labels.parquet")[0]
    unknown, empty = (
        joined_manifest.filter(pl.col("kind") == kind)["row"][0] for kind in ("unknown_label", "empty_labels")
    )
    assert labels["outside"][unknown].to_list() == ["/m/0nosuch"]
    assert len(labels["raw"][unknown]) == 2
    assert labels["raw"][empty].to_list() == []


def test_the_store_is_whole_and_takes_propagated_labels(real):
    """The real path to its end."""
    propagate_store_labels(real.path)
    assert list(find_faults(real.path)) == []
    assert FeatureStore.open(real.path).label_sets == ("raw", "unambiguous")
