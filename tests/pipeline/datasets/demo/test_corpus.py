"""The demo corpus: files that are what its lists say, and a folder that is whole or not there."""

import csv
import re
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from pipeline.audio.decode import load_clip_audio
from pipeline.audio.sources import SoundLocator
from pipeline.datasets.demo import audio_files, corpus
from pipeline.datasets.demo.clips import render_clip
from pipeline.datasets.demo.corpus import make_demo_corpus
from pipeline.datasets.demo.synthesis import FORMULA_SOUNDS, SYNTHESIS_RATE_HZ
from pipeline.errors import AudioError, InputError
from pipeline.store.manifest import FAILURE_REASONS

CLIPS = 40

FORMULA = {sound.name: sound for sound in FORMULA_SOUNDS}


@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpus"
    make_demo_corpus(out, clips=CLIPS, progress=False)
    return out


def truth_rows(corpus: Path) -> list[dict[str, str]]:
    with (corpus / "truth.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def good_clips(corpus: Path) -> list[dict[str, str]]:
    return [row for row in truth_rows(corpus) if row["expected"] == "good"]


def decode_file(path: Path) -> tuple[np.ndarray, int]:
    """Wave (sample, channel) and rate: content decides, libsndfile first, FFmpeg where it does not know."""
    try:
        return soundfile.read(path, always_2d=True)
    except soundfile.LibsndfileError:
        with av.open(path) as file:
            resampler = av.AudioResampler(format="fltp")
            frames = [out.to_ndarray() for frame in file.decode(audio=0) for out in resampler.resample(frame)]
            return np.concatenate(frames, axis=1).T, file.streams.audio[0].rate


def read_list(path: Path) -> tuple[list[str], list[list[str]]]:
    """The three comment lines and the rows of a segments list, by the csv module of Python."""
    with path.open(newline="", encoding="utf-8") as file:
        comments = [next(file) for _ in range(3)]
        return comments, list(csv.reader(file, skipinitialspace=True))


@pytest.mark.parametrize("split", ["balanced_train", "eval"])
def test_the_lists_are_in_the_official_format(demo_corpus, split):
    """Three comments, `", "` between the fields, a quoted label list, times with three decimals: as published."""
    lines = (demo_corpus / f"{split}_segments.csv").read_text().splitlines()
    assert [line.startswith("# ") for line in lines[:4]] == [True, True, True, False]
    assert lines[2] == "# YTID, start_seconds, end_seconds, positive_labels"
    row = re.compile(r'[\w-]{11}, \d+\.\d{3}, \d+\.\d{3}, "/m/\w+(,/m/\w+)*"')
    assert all(row.fullmatch(line) for line in lines[3:])


@pytest.mark.parametrize("split", ["balanced_train", "eval"])
def test_the_counts_in_the_head_of_a_list_are_those_of_its_rows(demo_corpus, split):
    """A reader that checks them must not stumble over the broken rows."""
    comments, rows = read_list(demo_corpus / f"{split}_segments.csv")
    labels = [mid for row in rows for mid in row[3].split(",")]
    counts = len({row[0] for row in rows}), len(rows), len(set(labels)), len(labels)
    names = "num_ytids", "num_segs", "num_unique_labels", "num_positive_labels"
    assert comments[1] == "# " + ", ".join(f"{n}={c}" for n, c in zip(names, counts, strict=True)) + "\n"


def test_the_lists_say_what_truth_says(demo_corpus):
    """truth.csv is what other tests rely on: row for row the lists, and the file no list names besides."""
    rows = [
        row
        for split in ("balanced_train", "eval")
        for row in read_list(demo_corpus / f"{split}_segments.csv")[1]
    ]
    listed = [row for row in truth_rows(demo_corpus) if row["expected"] != "unlisted"]
    fields = "clip_id", "start_seconds", "end_seconds", "labels"
    assert [",".join(row) for row in rows] == [
        ",".join(row[field].replace(";", ",") for field in fields) for row in listed
    ]


def test_a_quarter_of_the_good_clips_is_for_evaluation(demo_corpus):
    """Broken and repeated rows come on top: the number asked for is the number of good clips."""
    assert Counter(row["split"] for row in good_clips(demo_corpus)) == {
        "balanced_train": CLIPS * 3 // 4,
        "eval": CLIPS // 4,
    }


def test_ids_look_like_those_of_youtube(demo_corpus):
    """Eleven characters; some begin with a dash or hold an underscore, which trips path and option parsers."""
    ids = [row["clip_id"] for row in truth_rows(demo_corpus)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{11}", clip_id) for clip_id in ids)
    assert any(clip_id.startswith("-") for clip_id in ids)
    assert any("_" in clip_id for clip_id in ids)
    assert len({clip_id.lower() for clip_id in ids}) == len(ids) - 2  # two rows name an id again


def test_segments_do_not_begin_at_zero_and_last_ten_seconds_but_for_a_few(demo_corpus):
    """Starts that are zero hide a decoder that cuts at the wrong place; about 3 % of AudioSet is shorter."""
    rows = good_clips(demo_corpus)
    assert min(float(row["start_seconds"]) for row in rows) > 0
    lengths = [round(float(row["end_seconds"]) - float(row["start_seconds"]), 3) for row in rows]
    assert 1 <= sum(5.0 <= length < 10.0 for length in lengths) <= 3
    assert set(lengths) - {10.0} == {length for length in lengths if 5.0 <= length < 10.0}


def test_every_good_file_decodes_to_what_it_declares(demo_corpus):
    """Rate, channels and length, for every container; AAC may add up to 2048 samples of priming and padding."""
    for row in good_clips(demo_corpus):
        wave_SN, rate_hz = decode_file(demo_corpus / row["file"])
        slack = 2_500 if row["container"] == "m4a" else 1
        assert (rate_hz, wave_SN.shape[1]) == (int(row["rate_hz"]), int(row["channels"])), row
        assert 0 <= len(wave_SN) - int(float(row["seconds"]) * rate_hz) <= slack, row


def test_all_containers_and_many_rates_occur(demo_corpus):
    """A build that survives this corpus has met them all."""
    rows = good_clips(demo_corpus)
    assert {row["container"] for row in rows} == set(audio_files.CONTAINERS_BY_NAME)
    assert len({row["rate_hz"] for row in rows}) >= 5
    assert {row["channels"] for row in rows} == {"1", "2"}


def test_levels_vary_and_nothing_clips(demo_corpus):
    """Loudness must not give the class away, and no sample may touch full scale."""
    peaks = {
        row["clip_id"]: np.abs(decode_file(demo_corpus / row["file"])[0]).max()
        for row in good_clips(demo_corpus)
    }
    sounding = [
        20 * np.log10(peaks[row["clip_id"]]) for row in good_clips(demo_corpus) if row["parts"] != "Silence"
    ]
    assert max(peaks.values()) < 1.0
    assert np.ptp(sounding) > 15


def test_silence_is_faint_but_not_digital(demo_corpus):
    """Under -90 dBFS a clip is refused as silent; the class Silence must pass, through lossy codecs too."""
    rows = [row for row in good_clips(demo_corpus) if row["parts"] == "Silence"]
    peaks_dbfs = [
        20 * np.log10(np.abs(decode_file(demo_corpus / row["file"])[0].mean(axis=1)).max()) for row in rows
    ]
    assert rows
    assert all(-80 < peak < -35 for peak in peaks_dbfs)


def test_every_class_is_in_both_splits(demo_corpus):
    """Classes are dealt from a deck: 15 clips hold all 15."""
    rows = [row for row in good_clips(demo_corpus) if row["split"] == "balanced_train"]
    assert {row["parts"].split(";")[0] for row in rows} == set(FORMULA)


def test_a_file_holds_nothing_above_half_its_rate_folded_back(tmp_path):
    """A 7 kHz tone in an 8 kHz file must be gone, not come back at 1 kHz."""
    wave_SN = np.sin(2 * np.pi * 7_000 * np.arange(SYNTHESIS_RATE_HZ) / SYNTHESIS_RATE_HZ)[:, None].astype(
        np.float32
    )
    audio_files.write_audio_file(
        tmp_path / "x.wav", wave_SN, audio_files.CONTAINERS_BY_NAME["wav-16"], rate_hz=8_000
    )
    assert np.abs(soundfile.read(tmp_path / "x.wav")[0][400:-400]).max() < 1e-3


def test_broken_files_are_broken_as_said(demo_corpus):
    """One of each kind, each with the reason that a build must give."""
    rows = {row["kind"]: row for row in truth_rows(demo_corpus) if row["kind"] != "clip"}
    file = {kind: demo_corpus / row["file"] for kind, row in rows.items()}
    assert {row["expected"] for row in rows.values()} <= {*FAILURE_REASONS, "good", "unlisted"}
    assert file["empty_file"].stat().st_size == 0
    assert file["html_as_m4a"].read_text().startswith("<!DOCTYPE html>")
    assert not file["missing_file"].exists()
    assert not soundfile.read(file["digital_silence"])[0].any()
    assert np.isnan(soundfile.read(file["nan_float"])[0]).any()
    assert file["wrong_extension"].suffix == ".wav"
    assert file["wrong_extension"].read_bytes().startswith(b"fLaC")
    declared = int.from_bytes(file["truncated_wav"].read_bytes()[4:8], "little") + 8
    assert file["truncated_wav"].stat().st_size < 0.5 * declared
    assert file["unlisted_file"].exists()
    assert rows["unknown_label"]["labels"].endswith(";/m/0unknown")
    assert Counter(row["clip_id"] for row in truth_rows(demo_corpus))[rows["duplicate_id"]["clip_id"]] == 2


def test_every_row_decodes_or_fails_as_truth_says(demo_corpus):
    """`expected` is the reason that decoding really gives; the unlisted file itself is good."""
    for row in truth_rows(demo_corpus):
        try:
            load_clip_audio(
                SoundLocator.from_path(demo_corpus / row["file"]), start_seconds=30.0, end_seconds=40.0
            )
            outcome = "good"
        except AudioError as error:
            outcome = error.reason
        assert (
            outcome == (row["expected"] if row["expected"] in FAILURE_REASONS else "good")
            or row["expected"] == "duplicate"
        )


def test_the_readme_names_every_broken_file(demo_corpus):
    """Whoever wonders why a clip failed finds its id there."""
    text = (demo_corpus / "README.txt").read_text()
    assert all(row["clip_id"] in text for row in truth_rows(demo_corpus) if row["kind"] != "clip")


def test_the_same_seed_gives_the_same_bytes(demo_corpus, tmp_path):
    """For every container, dates and serial numbers included, whichever files are written before it or beside it."""
    split_sounds = corpus.formula_split_sounds()
    clips = corpus.plan_demo_corpus(np.random.default_rng([0, 0]), split_sounds, clips=CLIPS)
    one_each = {clip.container: clip for clip in reversed(clips) if clip.expected == "good"}
    corpus.write_segments_lists(
        tmp_path, clips, title=f"source formula, clips {CLIPS}, seed 0, version {corpus.DEMO_VERSION}"
    )
    corpus.write_truth_table(tmp_path, clips)
    corpus.write_clip_files(tmp_path, list(one_each.values()), split_sounds, seed=0, quiet=True)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 + len(audio_files.CONTAINERS_BY_NAME)
    assert [
        path for path in files if (tmp_path / path).read_bytes() != (demo_corpus / path).read_bytes()
    ] == []


def test_another_seed_gives_other_sounds():
    """Otherwise `--seed` would only rename the clips."""
    split_sounds = corpus.formula_split_sounds()
    first = corpus.plan_demo_corpus(np.random.default_rng(0), split_sounds, clips=20)[0]
    sounds = [FORMULA[name] for name in first.parts]
    assert not np.array_equal(render_clip(first, sounds, seed=0), render_clip(first, sounds, seed=1))


def test_ogg_pages_are_sealed_as_libsndfile_seals_them(tmp_path):
    """After the serial number is changed the checksum must be right, or strict readers drop the page."""
    soundfile.write(tmp_path / "x.ogg", np.zeros(4_000), 8_000, format="OGG", subtype="VORBIS")
    first_page = (tmp_path / "x.ogg").read_bytes()[
        : 27 + 1 + 30
    ]  # a Vorbis stream opens with one packet of 30 bytes
    unsealed = first_page[:22] + bytes(4) + first_page[26:]
    assert audio_files.ogg_checksum(unsealed) == int.from_bytes(first_page[22:26], "little")


def test_the_corpus_asked_for_is_left_alone_when_it_is_there(demo_corpus):
    """Running the same command twice costs nothing and changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in demo_corpus.rglob("*")}
    again = make_demo_corpus(demo_corpus, clips=CLIPS, progress=False)
    assert not again.is_new
    assert "left alone" in str(again)
    assert {path: path.stat().st_mtime_ns for path in demo_corpus.rglob("*")} == before


def test_another_corpus_is_not_overwritten(demo_corpus):
    """A corpus is replaced only by removing it."""
    with pytest.raises(InputError, match="holds another demo corpus"):
        make_demo_corpus(demo_corpus, clips=CLIPS, seed=1)


def test_a_changed_corpus_is_not_taken_for_whole(demo_corpus, tmp_path):
    """A file removed by hand must not go unnoticed."""
    out = shutil.copytree(demo_corpus, tmp_path / "corpus")
    next((out / "audio" / "eval").iterdir()).unlink()
    with pytest.raises(InputError, match="changed since"):
        make_demo_corpus(out, clips=CLIPS)


def test_a_folder_of_something_else_is_refused(tmp_path):
    """Nobody's files end up among ours."""
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds no demo corpus"):
        make_demo_corpus(tmp_path)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    """Neither a folder that looks finished nor debris beside it, that of an earlier run killed outright included."""

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "write_truth_table", interrupted)
    monkeypatch.setattr(
        corpus, "write_clip_files", lambda folder, *_args, **_options: (folder / "audio").mkdir()
    )
    (tmp_path / "corpus.partial" / "audio" / "eval").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        make_demo_corpus(tmp_path / "corpus", clips=20, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clips": 5}, "20 clips"), ({"source": "tape"}, "'tape'"), ({"seed": -1}, "seed")],
)
def test_nonsense_is_refused_before_anything_is_made(tmp_path, options, message):
    """One line that names what was expected."""
    with pytest.raises(InputError, match=message):
        make_demo_corpus(tmp_path / "corpus", **options)
    assert list(tmp_path.iterdir()) == []
