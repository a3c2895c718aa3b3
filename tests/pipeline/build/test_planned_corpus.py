"""The plan of a store is made once; later runs, parts and checks use it, whatever became of the folders."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
from stores import assert_same_bytes, files_of

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_stores
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.build.plan_files import read_sources_record
from pipeline.build.planned_corpus import corpus_of_request
from pipeline.build.recompute import compare_with_audio
from pipeline.build.verify import find_faults
from pipeline.datasets.audioset import audioset_corpus, audioset_settings
from pipeline.datasets.corpus import CorpusRequest
from pipeline.datasets.folder import folder_corpus, folder_settings
from pipeline.errors import StoreError
from pipeline.files import BuildPart

IDS = [f"clip_{number:06d}" for number in range(40)]


def write_tone(path: Path, number: int) -> None:
    """Write half a second of a tone of its own."""
    time_S = np.arange(4_000) / 8_000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (200 + 50 * number) * time_S), 8_000)


@pytest.fixture
def sounds(tmp_path) -> Path:
    """A folder of 40 tones, and a list of them beside it."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number, clip_id in enumerate(IDS):
        write_tone(folder / f"{clip_id}.wav", number)
    lines = [f'{clip_id}, 0.000, 10.000, "/m/09x0r"\n' for clip_id in IDS]
    (tmp_path / "train_segments.csv").write_text("".join(lines))
    return folder


def folder_request(sounds: Path) -> CorpusRequest:
    return CorpusRequest(settings=folder_settings(sounds), make=lambda: folder_corpus(sounds))


def audioset_request(sounds: Path, audio: Path | None = None) -> CorpusRequest:
    arguments = ([audio or sounds], [sounds.parent / "train_segments.csv"])
    return CorpusRequest(settings=audioset_settings(*arguments), make=lambda: audioset_corpus(*arguments))


def run(request: CorpusRequest, out: Path, *, rescan: bool = False, part: str = "0/1") -> pl.DataFrame | None:
    """Do what a build command does."""
    corpus = corpus_of_request(request, [out], rescan=rescan)
    output = StoreOutput(path=out, spec=preset_mel_spec("audio-jepa"))
    options = BuildOptions(workers=0, part=BuildPart.parse(part))
    return build_stores(corpus, [output], options)[0]


def test_files_that_come_and_go_change_no_plan(sounds, tmp_path, capsys):
    """Two parts of one build, between which a built file is deleted and another file appears."""
    run(folder_request(sounds), tmp_path / "whole.zarr")
    out = tmp_path / "x.zarr"
    assert run(folder_request(sounds), out, part="0/2") is None
    (sounds / "clip_000000.wav").unlink()
    write_tone(sounds / "a_new_one.wav", 99)
    manifest = run(folder_request(sounds), out, part="1/2")
    assert manifest is not None
    assert (manifest["status"] == "good").all()
    assert_same_bytes(tmp_path / "whole.zarr", out)
    said = capsys.readouterr().err
    assert (
        "are not looked up again: 0 of 40 had no sound then. --rescan fills rows whose sound was missing"
        in said
    )
    assert "a store never grows, so new sounds go into another store" in said


def test_a_rescan_tells_of_clips_that_have_no_row(sounds, tmp_path):
    """The rows of a store are its identity: a training run counts by them."""
    run(folder_request(sounds), tmp_path / "x.zarr")
    write_tone(sounds / "a_new_one.wav", 99)
    corpus = corpus_of_request(folder_request(sounds), [tmp_path / "x.zarr"], rescan=True)
    assert corpus.plan.height == 40
    (note,) = [note for note in corpus.notes if "came since" in note]
    assert note.startswith("1 clip came since the store was planned, such as a_new_one.wav")


def test_a_sound_that_came_since_is_found_by_a_rescan_and_only_then(sounds, tmp_path):
    """Walking through two million files at every start costs minutes; the same bytes come out either way."""
    run(audioset_request(sounds), tmp_path / "whole.zarr")
    late = sounds / "clip_000007.wav"
    late.rename(tmp_path / "kept.wav")
    out = tmp_path / "x.zarr"
    run(audioset_request(sounds), out)
    shutil.copy(tmp_path / "kept.wav", late)
    manifest = run(audioset_request(sounds), out)
    assert manifest.row(7, named=True)["reason"] == "missing"
    assert (run(audioset_request(sounds), out, rescan=True)["status"] == "good").all()
    assert_same_bytes(tmp_path / "whole.zarr", out)

    # What the rescan found is stored in its turn.
    request = CorpusRequest(settings=audioset_request(sounds).settings, make=pytest.fail)
    assert corpus_of_request(request, [out]).sources.frame["kind"].null_count() == 0


def test_a_list_that_has_changed_is_refused(sounds, tmp_path):
    """Its rows would be those of other clips."""
    run(audioset_request(sounds), tmp_path / "x.zarr")
    path = tmp_path / "train_segments.csv"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(
        StoreError,
        match=r"planned from other clips, lists or classes \(.*train_segments\.csv has changed since\)",
    ):
        run(audioset_request(sounds), tmp_path / "x.zarr")


def test_a_list_that_is_gone_is_not_needed(sounds, tmp_path):
    """Everything that the list says is in the store."""
    run(audioset_request(sounds), tmp_path / "x.zarr")
    (tmp_path / "train_segments.csv").unlink()
    assert (run(audioset_request(sounds), tmp_path / "x.zarr")["status"] == "good").all()
    rows = list(compare_with_audio(tmp_path / "x.zarr"))
    assert len(rows) == 40
    assert not any(row.fault or row.missing_sound for row in rows)


def pack(sounds: Path, archive: Path, *, backwards: bool) -> None:
    """Put the sounds into a tar, in the order of their names or in the opposite one."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted(sounds.iterdir(), reverse=backwards):
            tar.add(path, path.name)


def test_an_archive_that_was_packed_anew_gives_each_row_its_own_sound(sounds, tmp_path, capsys):
    """The stored places are bytes of the old archive; there, the new one has the sounds of other clips."""
    archive = tmp_path / "all.tar"
    pack(sounds, archive, backwards=False)
    run(audioset_request(sounds), tmp_path / "whole.zarr")
    out = tmp_path / "x.zarr"
    assert run(audioset_request(sounds, archive), out, part="0/2") is None
    pack(sounds, archive, backwards=True)
    os.utime(archive, ns=(0, 0))
    assert run(audioset_request(sounds, archive), out, part="1/2") is not None
    assert f"{archive}: has changed since it was listed" in capsys.readouterr().err
    digests = [
        pl.read_parquet(path / "manifest.parquet")["digest"] for path in (out, tmp_path / "whole.zarr")
    ]
    assert digests[0].equals(digests[1])
    assert not any(row.fault for row in compare_with_audio(out))


def test_a_store_of_an_older_version_is_carried_on_and_gets_its_plan(sounds, tmp_path):
    """Its files stay as they are, but for the two new ones."""
    out = tmp_path / "x.zarr"
    run(audioset_request(sounds), out)
    shutil.copytree(out, tmp_path / "first.zarr")
    (out / "plan.parquet").unlink()
    (out / "sources.parquet").unlink()
    assert read_sources_record(out) is None
    assert not list(find_faults(out))
    run(audioset_request(sounds), out)
    assert_same_bytes(tmp_path / "first.zarr", out)
    assert read_sources_record(out) is not None


def test_another_command_looks_for_sounds_anew(sounds, tmp_path):
    """Whoever names another folder wants it searched."""
    run(audioset_request(sounds), tmp_path / "x.zarr")
    shutil.copytree(sounds, tmp_path / "moved")
    request = audioset_request(sounds, tmp_path / "moved")
    run(request, tmp_path / "x.zarr")
    record = read_sources_record(tmp_path / "x.zarr")
    assert record is not None
    assert record.asked == request.settings
    assert {"plan.parquet", "manifest.parquet"} <= files_of(tmp_path / "x.zarr")


def test_a_damaged_plan_is_named_and_mended(sounds, tmp_path):
    """A flipped byte in it must not become another clip's row."""
    out = tmp_path / "x.zarr"
    run(audioset_request(sounds), out)
    shutil.copytree(out, tmp_path / "first.zarr")
    plan = pl.read_parquet(out / "plan.parquet")
    plan.with_columns(clip_id=plan["clip_id"].reverse()).write_parquet(out / "plan.parquet")
    (fault,) = find_faults(out)
    assert "plan.parquet: not the plan that the store was built with" in fault.text
    (out / "plan.parquet").unlink()
    run(audioset_request(sounds), out)
    assert_same_bytes(tmp_path / "first.zarr", out)
