"""The real recordings of the demo corpus: their table, their splits, how they are fetched. Nothing is downloaded."""

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.datasets.demo import corpus
from pipeline.datasets.demo.corpus import make_demo_corpus
from pipeline.datasets.demo.recordings import (
    MID_OF_CLASS_NAME,
    PACKAGE_LICENCES,
    PackageRecording,
    expand_braces,
    fetch_packages,
    list_recordings,
    load_recorded_sound,
    repeat_with_gaps,
    split_recordings,
)
from pipeline.datasets.demo.synthesis import FORMULA_SOUNDS, SYNTHESIS_RATE_HZ
from pipeline.errors import InputError

CLASS_LIST = Path(__file__).parents[5] / "shared" / "audioset" / "class_labels_indices.csv"


@pytest.mark.skipif(not CLASS_LIST.exists(), reason="no shared/audioset beside the repository")
def test_every_label_is_the_class_of_that_name():
    """An id mistyped would teach the wrong class in silence."""
    with CLASS_LIST.open(newline="", encoding="utf-8") as file:
        names = {row["mid"]: row["display_name"] for row in csv.DictReader(file)}
    assert {sound.name: names[sound.mids[0]] for sound in FORMULA_SOUNDS} == {
        sound.name: sound.name for sound in FORMULA_SOUNDS
    }
    assert {name: names[mid] for name, mid in MID_OF_CLASS_NAME.items()} == {
        name: name for name in MID_OF_CLASS_NAME
    }


def fake_recording(name: str, *classes: str) -> PackageRecording:
    return PackageRecording(package="fake", path=name, classes=classes)


def test_a_recording_is_never_in_both_splits_where_its_class_has_another():
    """Else the evaluation would ask for what was heard in training."""
    table = [fake_recording(f"dog{n}", "Bark", "Dog") for n in range(2)] + [
        fake_recording(f"cat{n}", "Meow") for n in range(9)
    ]
    table += [
        fake_recording("gong", "Gong"),
        fake_recording("tap", "Tap", "Water"),
        fake_recording("stream", "Stream", "Water"),
    ]
    for seed in range(20):
        split = split_recordings(np.random.default_rng(seed), table)
        both = {each.path for each in split["balanced_train"]} & {each.path for each in split["eval"]}
        assert both == {"gong"}
        assert {each.path for each in split["balanced_train"]} | {each.path for each in split["eval"]} == {
            r.path for r in table
        }
        assert Counter(each.classes[0] for each in split["eval"]) == {"Bark": 1, "Meow": 2, "Gong": 1}


def test_the_table_of_recordings_is_whole():
    """Each recording once, each class with its id, enough of both for a demonstration."""
    table = list(list_recordings())
    assert len({(each.package, each.path) for each in table}) == len(table) >= 80
    assert {name for each in table for name in each.classes} == set(MID_OF_CLASS_NAME)
    assert len({each.classes[0] for each in table}) >= 40


def test_braces_are_written_out():
    """The short hand of the table."""
    assert expand_braces("a{1,2}b{,x}") == ["a1b", "a1bx", "a2b", "a2bx"]
    assert expand_braces("a") == ["a"]


def test_a_short_recording_is_repeated_with_gaps():
    """A bark of 0.2 s fills its event, and pauses keep it a bark."""
    wave_S = repeat_with_gaps(
        np.ones(SYNTHESIS_RATE_HZ // 5, dtype=np.float32), np.random.default_rng(0), 10 * SYNTHESIS_RATE_HZ
    )
    assert len(wave_S) == 10 * SYNTHESIS_RATE_HZ
    assert set(np.unique(wave_S)) == {0.0, 1.0}
    assert 5 < np.count_nonzero(np.diff(wave_S) > 0) < 34


def test_a_recording_becomes_a_sound_of_its_classes(tmp_path):
    """Any channels and rate come in, mono at 48 kHz goes on; a file that the package lacks is named."""
    (tmp_path / "fake").mkdir()
    tone_SN = np.repeat(0.5 * np.sin(2 * np.pi * 500 * np.arange(11_025) / 11_025)[:, None], 2, axis=1)
    soundfile.write(tmp_path / "fake" / "bark.wav", tone_SN, 11_025)
    bark = load_recorded_sound(fake_recording("bark.wav", "Bark", "Dog"), tmp_path)
    assert bark.mids == (MID_OF_CLASS_NAME["Bark"], MID_OF_CLASS_NAME["Dog"])
    first_S = bark.make_wave(np.random.default_rng(0), SYNTHESIS_RATE_HZ)
    assert np.abs(np.fft.rfft(first_S)).argmax() == pytest.approx(500, abs=2)  # bins of 1 Hz
    with pytest.raises(InputError, match=r"moo\.wav: not in this release"):
        load_recorded_sound(fake_recording("moo.wav", "Dog"), tmp_path)


def test_without_apt_the_other_source_is_named(tmp_path, monkeypatch):
    """Not every Linux is a Debian."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"apt-get: not on this machine.*--source formula"):
        fetch_packages(tmp_path / "packages", quiet=True)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    """apt's last word, what to try next, and nothing half-made."""
    for command in ("apt-get", "dpkg-deb"):
        (tmp_path / command).write_text(
            "#!/bin/sh\necho 'E: Unable to locate package scratch' >&2\nexit 100\n"
        )
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match=r"Unable to locate package scratch.*apt-get update") as caught:
        make_demo_corpus(tmp_path / "corpus", source="debian", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "corpus").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_the_packages_are_gone_from_a_finished_corpus(tmp_path, monkeypatch):
    """Left there, a build would take every recording for a clip that no list names; the licences stay."""

    def fetch_few(folder: Path, *, quiet: bool | None) -> None:
        for recording in few_recordings:
            path = folder / recording.package / recording.path
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path.with_suffix(".wav"), np.random.default_rng(0).normal(0, 0.1, 9_000), 8_000)
            path.with_suffix(".wav").rename(path)
        for package in PACKAGE_LICENCES:
            (folder / package / "usr/share/doc" / package).mkdir(parents=True)
            (folder / package / "usr/share/doc" / package / "copyright").write_text("by somebody")

    few_recordings = list(list_recordings())[::8]
    monkeypatch.setattr(corpus, "list_recordings", lambda: few_recordings)
    monkeypatch.setattr(corpus, "fetch_packages", fetch_few)
    monkeypatch.setattr(
        corpus, "write_clip_files", lambda folder, *_args, **_options: (folder / "audio").mkdir()
    )
    demo = make_demo_corpus(tmp_path / "corpus", clips=20, source="debian", progress=False)
    assert sorted(path.name for path in demo.path.iterdir() if path.is_dir()) == ["audio", "licences"]
    assert (demo.train_clips, demo.eval_clips) == (15, 5)
    assert "CC BY-SA 3.0" in (demo.path / "README.txt").read_text()
