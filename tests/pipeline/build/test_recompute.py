"""Rows recomputed from their sounds are the stored ones; a row that differs is reported."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus import clip_id, tone_in_noise, write_corpus
from damage import flip
from spoken_seconds import tone_seconds, write_stream
from stores import build

from pipeline.audio import ffmpeg_decoder
from pipeline.audio.decode import AudioPolicy
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.audio.sources import SoundLocator
from pipeline.build import recompute
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.build.recompute import VERSION_TOLERANCE_NAT, compare_with_audio, recomputed_store
from pipeline.cli import app
from pipeline.datasets.folder import folder_corpus
from pipeline.errors import BrokenClipError, InputError, StoreError
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.loading.dali import DaliLoader
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore


@pytest.fixture(scope="module")
def shared_stores(tmp_path_factory) -> Path:
    """A folder with a corpus, and a store of each dtype built from it; nobody changes it."""
    folder = tmp_path_factory.mktemp("sounds")
    write_corpus(folder / "corpus", clips=20)
    for dtype in ("float16", "uint8"):
        build(folder / "corpus", folder / f"{dtype}.zarr", dtype=dtype, policy=AudioPolicy(keep_silent=True))
    propagate_store_labels(folder / "float16.zarr")
    return folder


@pytest.fixture
def own_stores(shared_stores, tmp_path) -> Path:
    """A copy of them that a test may change."""
    folder = shutil.copytree(shared_stores, tmp_path / "own")
    for store in folder.glob("*.zarr"):
        record = (store / "build.json").read_text().replace(str(shared_stores), str(folder))
        (store / "build.json").write_text(record)
    return folder


def sound_path(folder: Path, row: int) -> Path:
    return folder / "corpus" / "audio" / f"{clip_id(row)}.wav"


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_every_row_and_crop_is_the_stored_one_bit_for_bit(shared_stores, dtype):
    """Silent clips among them, which another policy would refuse; also in another process."""
    store = FeatureStore.open(shared_stores / f"{dtype}.zarr")
    recomputed = recomputed_store(store)
    rows = store.good_rows()
    assert 9 in rows
    np.testing.assert_array_equal(recomputed.read(rows), store.read(rows))
    starts = np.arange(len(rows)) * 7
    unpickled = pickle.loads(pickle.dumps(recomputed))
    np.testing.assert_array_equal(
        unpickled.read(rows, starts_B=starts, frames=50), store.read(rows, starts_B=starts, frames=50)
    )


@pytest.mark.parametrize("loader", [PlainLoader, DaliLoader])
def test_loaders_train_from_sounds_as_from_the_store(shared_stores, loader, monkeypatch):
    """The same batches, with labels; not one shard is read."""
    store = FeatureStore.open(shared_stores / "float16.zarr")
    order = RowOrder(rows_N=store.good_rows(), clips=4, seed=0)
    view = View(frames=64, mean=-8.0, std=4.0, label_set="unambiguous")
    expected = list(PlainLoader(store, order, view).batches(0, 6))
    monkeypatch.setattr("pipeline.store.reader.ShardReader.read", None)
    with loader(recomputed_store(store, threads=1), order, view) as opened:
        for batch, expected_batch in zip(opened.batches(0, 6), expected, strict=True):
            assert batch.mel_BTF.equal(expected_batch.mel_BTF)
            assert batch.labels_BC.equal(expected_batch.labels_BC)


def test_a_sound_that_is_gone_or_changed_breaks_its_row(own_stores):
    """Never another row; the message says what to do, in one line."""
    recomputed = recomputed_store(FeatureStore.open(own_stores / "float16.zarr"))
    sound_path(own_stores, 2).unlink()
    soundfile.write(sound_path(own_stores, 4), tone_in_noise(4, seconds=1.0, rate_hz=32_000), 32_000)
    sound_path(own_stores, 6).write_bytes(b"no sound")
    for row, message in (
        (2, "missing: .* is gone|missing"),
        (4, "its sound has 98 frames, the store 998"),
        (6, "unreadable"),
    ):
        with pytest.raises(BrokenClipError, match=message) as broken:
            recomputed.read(np.array([0, row]))
        assert broken.value.row == row
        assert f"row {row} (clip {clip_id(row)}" in str(broken.value)
        assert str(broken.value).endswith("--against-audio")
    with pytest.raises(StoreError, match=r"row 5 .* is not good: missing") as refused:
        recomputed.read(np.array([5]))
    assert not isinstance(refused.value, BrokenClipError)


def test_a_server_that_does_not_answer_breaks_no_clip(own_stores, monkeypatch):
    """A loader that skips broken clips must not skip all of them."""

    def raise_no_answer(self):
        raise InputError("s3://b/x.wav: no answer")

    monkeypatch.setattr(SoundLocator, "open_sound", raise_no_answer)
    with pytest.raises(StoreError, match="no answer") as caught:
        recomputed_store(FeatureStore.open(own_stores / "float16.zarr")).read(np.array([0]))
    assert not isinstance(caught.value, BrokenClipError)


def test_a_sound_that_only_a_loose_policy_accepts_is_recomputed(tmp_path):
    """13 hours, more than is taken by default: --max-seconds was the build's to decide."""
    (tmp_path / "sounds").mkdir()
    hour = np.tile(np.random.default_rng(0).uniform(-0.1, 0.1, 10_000), 360)
    soundfile.write(tmp_path / "sounds" / "day.wav", np.tile(hour, 13), 1_000, subtype="PCM_U8")
    output = StoreOutput(path=tmp_path / "day.zarr", spec=preset_mel_spec("a-jepa"))
    policy = AudioPolicy(max_seconds=86_400)
    build_store(folder_corpus(tmp_path / "sounds"), output, BuildOptions(policy=policy, workers=0))
    store = FeatureStore.open(output.path)
    assert len(store.good_rows()) == 1
    np.testing.assert_array_equal(recomputed_store(store).read(np.array([0])), store.read(np.array([0])))


def test_lists_that_have_changed_are_refused(own_stores):
    """Row 7 would be another clip."""
    record = json.loads((own_stores / "float16.zarr" / "build.json").read_text())
    record["asked"]["segments"].pop()
    (own_stores / "float16.zarr" / "build.json").write_text(json.dumps(record))
    store = FeatureStore.open(own_stores / "float16.zarr")
    with pytest.raises(StoreError, match=r"planned from other clips, .*; put back what .*build.json says"):
        recomputed_store(store)
    (own_stores / "float16.zarr" / "build.json").unlink()
    with pytest.raises(StoreError, match="does not say what the store was built from"):
        recomputed_store(store)


def verify(monkeypatch, *arguments: object) -> int:
    """Run the verify command; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["ajepa-data", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return int(stop.value.code or 0)


def test_a_store_and_its_sounds_agree_bit_for_bit(shared_stores, monkeypatch, capsys):
    assert verify(monkeypatch, shared_stores / "uint8.zarr", "--against-audio") == 0
    assert (
        capsys.readouterr().out
        == f"{shared_stores / 'uint8.zarr'}: 19 rows agree with their sounds, bit for bit\n"
    )
    assert verify(monkeypatch, shared_stores / "float16.zarr", "--against-audio", "--sample", 4) == 0
    assert ": 4 rows agree" in capsys.readouterr().out


def test_faults_are_printed_line_by_line_and_a_lost_sound_is_none(own_stores, monkeypatch, capsys):
    """A flipped bit, another sound of the same length, a sound that decodes no more; and one that is gone."""
    store = own_stores / "float16.zarr"
    flip(store, 1)
    soundfile.write(sound_path(own_stores, 4), 0.9 * tone_in_noise(4, seconds=10.0, rate_hz=44_100), 44_100)
    sound_path(own_stores, 6).write_bytes(b"no sound")
    sound_path(own_stores, 8).unlink()
    soundfile.write(sound_path(own_stores, 10), tone_in_noise(10, seconds=9.0, rate_hz=44_100), 44_100)
    assert verify(monkeypatch, store, "--against-audio") == 1
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line.partition(" (clip")[0] for line in lines] == ["row 1", "row 4", "row 6", "row 8", "row 10"]
    assert "does not match its checksum" in lines[0]
    assert "nat from what its sound gives" in lines[1]
    assert "its sound is not the one that it was built from" in lines[1]
    assert "its sound cannot be used any more" in lines[2]
    assert "not compared" in lines[3]
    assert "998 frames, its sound gives 898" in lines[4]
    assert f"{store}: 4 of 18 rows differ from their sounds" in output.err
    (own_stores / "corpus" / "audio").rename(own_stores / "elsewhere")
    (own_stores / "corpus" / "audio").mkdir()
    soundfile.write(
        sound_path(own_stores, 5), tone_in_noise(5, seconds=10.0, rate_hz=16_000), 16_000
    )  # of no good row
    assert verify(monkeypatch, own_stores / "uint8.zarr", "--against-audio", "--sample", 3) == 1
    assert "nothing could be compared, no sound was found" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_other_versions_may_differ_within_the_tolerance_and_no_more(own_stores, monkeypatch, capsys, dtype):
    """Equal versions must give equal bytes; others may differ by a tenth of a nat and one stored step."""
    store = own_stores / f"{dtype}.zarr"
    shift = 1.0
    compute_stored_row = recompute.compute_stored_row

    def compute_shifted_row(audio, header):
        mel_TF, result = compute_stored_row(audio, header)
        nats = shift * VERSION_TOLERANCE_NAT + (header.scale if dtype == "uint8" else 0)
        return (mel_TF + np.asarray(nats / header.scale, mel_TF.dtype)).astype(mel_TF.dtype), result

    monkeypatch.setattr(recompute, "compute_stored_row", compute_shifted_row)
    comparisons = list(compare_with_audio(store))
    assert len(comparisons) > 0
    assert all(comparison.fault for comparison in comparisons)
    record = json.loads((store / "build.json").read_text())
    record["versions"]["soxr"] = "0.0.1"
    (store / "build.json").write_text(json.dumps(record))
    assert verify(monkeypatch, store, "--against-audio", "--sample", 5) == 0
    stdout = capsys.readouterr().out
    assert "built with soxr 0.0.1, now " in stdout
    assert "5 rows agree with their sounds, up to 0." in stdout
    shift = 4.0
    assert verify(monkeypatch, store, "--against-audio", "--sample", 5) == 1


def test_comparing_and_repairing_at_once_is_refused(own_stores, monkeypatch, capsys):
    assert verify(monkeypatch, own_stores / "uint8.zarr", "--against-audio", "--repair") == 1
    assert "give --repair without it" in capsys.readouterr().err


def test_a_long_mp3_is_decoded_once_to_be_built_and_once_a_thread_to_be_compared(tmp_path, monkeypatch):
    """Its seconds are found only by decoding all that comes before them; frames are counted."""
    decoded, decode_frames = [], ffmpeg_decoder.OpenStream.decode_frames

    def count_frames(stream):
        for frame in decode_frames(stream):
            decoded.append(frame.samples)
            yield frame

    monkeypatch.setattr(ffmpeg_decoder.OpenStream, "decode_frames", count_frames)
    (tmp_path / "sounds").mkdir()
    write_stream(tmp_path / "sounds" / "long.mp3", tone_seconds(40, 16_000), 16_000, "libmp3lame", "mp3")
    corpus = folder_corpus(tmp_path / "sounds", clip_seconds=2.0, hop_seconds=2.0)
    spec = replace(preset_mel_spec("a-jepa"), clip_seconds=2.0)
    decoded.clear()
    build_store(corpus, StoreOutput(path=tmp_path / "long.zarr", spec=spec), BuildOptions(workers=0))
    built = sum(decoded)
    assert 39 < built / 16_000 < 42
    decoded.clear()
    comparisons = list(compare_with_audio(tmp_path / "long.zarr"))
    assert len(comparisons) == 20
    assert not any(row.fault or row.missing_sound for row in comparisons)
    assert sum(decoded) < 2.1 * built
