"""From files to a store: its content, and that restarts, crashes and full disks do not change it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
import zarr
from corpus import BROKEN, MISSING, SHORT, SILENT, clip_id, tone_in_noise, write_corpus
from stores import assert_same_bytes, build

from pipeline.audio.decode import load_clip_audio, read_segment
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.audio.sources import SoundLocator
from pipeline.build import shard_builder
from pipeline.build.build import build_store
from pipeline.build.plan import StoreOutput
from pipeline.build.shard_builder import MAX_UNEXPECTED_FAILURES, UnexpectedFailures
from pipeline.build.verify import find_faults
from pipeline.datasets.audioset import audioset_corpus
from pipeline.errors import AudioError, InputError, StoreError, UnexpectedAudioError
from pipeline.files import lock_store
from pipeline.store.feature_store import FeatureStore
from pipeline.store.shards import ledger_path, shard_path

BUILD = """
from pathlib import Path
from stores import build
if __name__ == "__main__":
    build(Path({corpus!r}), Path({out!r}), workers=1)
"""


@pytest.fixture(scope="module")
def fresh(corpus, tmp_path_factory):
    """A store straight from the build, nothing propagated."""
    out = tmp_path_factory.mktemp("fresh") / "fresh.zarr"
    build(corpus, out)
    return out


def test_a_row_holds_the_log_mel_of_its_clip(corpus, store):
    """The numbers a trainer sees are those of the sound, in the row the list gives it."""
    spec = preset_mel_spec("a-jepa")
    for row in (0, SHORT[0], 47):
        path = corpus / "audio" / f"{clip_id(row)}.wav"
        audio = load_clip_audio(SoundLocator.from_path(path), start_seconds=30, end_seconds=40)
        expected_TF = (
            log_mel(torch.from_numpy(audio.resample_wave(32_000))[None], spec)[0].numpy().astype(np.float16)
        )
        stored_TF = store.read(np.array([row]))[0]
        np.testing.assert_array_equal(stored_TF[: len(expected_TF)], expected_TF)
        np.testing.assert_array_equal(stored_TF[len(expected_TF) :], np.float16(spec.floor_log))
        assert store.n_frames_N[row] == len(expected_TF)


def test_zarr_python_reads_the_same_numbers(store):
    """The store can be read without this package; absent clips read as NaN."""
    mel = zarr.open_group(store.path, mode="r")["mel"]
    good_N = store.good_rows()
    np.testing.assert_array_equal(mel.oindex[good_N], store.read(good_N))
    assert np.isnan(mel[MISSING]).all()


def test_bad_clips_keep_their_rows_and_say_why(store):
    """A missing clip is a row with a reason, never a row of zeros and never a shift of the others."""
    failed = (
        store.manifest.with_row_index("row")
        .filter(pl.col("status") == "failed")
        .select("row", "reason")
        .rows()
    )
    assert failed == [(MISSING, "missing"), (SILENT, "silent"), (BROKEN, "unreadable")]
    with pytest.raises(StoreError, match=rf"row {SILENT} \(clip .*\) is not good: silent"):
        store.read(np.array([SILENT]))


def test_statistics_are_those_of_the_valid_frames(store):
    """Padding and failed clips must not pull the mean."""
    for split, rows_N in {"a_train": store.good_rows(["a_train"]), "all": store.good_rows()}.items():
        frames = [store.read(rows_N[i : i + 1])[0, : store.n_frames_N[row]] for i, row in enumerate(rows_N)]
        values_NF = np.concatenate(frames).astype(np.float64)
        assert store.stats[split]["frames"] == len(values_NF)
        np.testing.assert_allclose(store.stats[split]["mean"], values_NF.mean(), rtol=1e-12)
        np.testing.assert_allclose(store.stats[split]["std"], values_NF.std(), rtol=1e-9)
        np.testing.assert_allclose(store.stats[split]["std_F"], values_NF.std(0), rtol=1e-9)


def test_normalisation_knows_only_the_splits_it_is_asked_for(store):
    """Evaluation clips must not shift what the model sees in training, however little."""
    assert store.mean_and_std(["a_train"]) == pytest.approx(
        (store.stats["a_train"]["mean"], store.stats["a_train"]["std"])
    )
    assert store.mean_and_std(["a_train", "eval"]) == pytest.approx(
        (store.stats["all"]["mean"], store.stats["all"]["std"])
    )


def test_uint8_is_float16_but_for_its_steps(store, uint8_store_path):
    """Half the size, at a twelfth of a nat."""
    small = FeatureStore.open(uint8_store_path)
    rows_N = small.good_rows()
    restored_BTF = small.offset + small.scale * small.read(rows_N).astype(np.float32)
    assert np.abs(restored_BTF - store.read(rows_N).astype(np.float32)).max() <= small.scale / 2 + 0.005
    assert small.store_id != store.store_id


def test_labels_are_those_of_the_list_and_the_ones_they_imply(store):
    """Raw labels stay as listed; Bell adds Musical instrument and Music beside them."""

    def names_of(row, label_set):
        return {
            store.classes.names[c] for c in np.flatnonzero(store.labels_BC(np.array([row]), label_set)[0])
        }

    assert store.label_sets == ("raw", "unambiguous")
    assert names_of(2, "raw") == {"Bell"}
    assert names_of(2, "unambiguous") == {"Bell", "Music", "Musical instrument"}
    assert names_of(4, "unambiguous") == set()


def test_workers_and_reruns_change_no_byte(corpus, fresh, tmp_path):
    """The plan, not the machine, decides the store."""
    build(corpus, tmp_path / "two.zarr", workers=2)
    assert_same_bytes(fresh, tmp_path / "two.zarr")
    build(corpus, tmp_path / "two.zarr", workers=0)
    assert_same_bytes(fresh, tmp_path / "two.zarr")
    assert not list(find_faults(tmp_path / "two.zarr"))


@pytest.mark.parametrize("after_seconds", [0.3, 1.2])
def test_a_killed_build_carries_on_to_the_same_bytes(corpus, fresh, tmp_path, after_seconds):
    """Weeks are lost where a crash means starting again."""
    out = tmp_path / "killed.zarr"
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD.format(corpus=str(corpus), out=str(out))],
        cwd=Path(__file__).parents[2] / "support",
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "ledger").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    while not list((out / "ledger").glob("*.parquet")) and after_seconds > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(StoreError, match="not finished"):
        FeatureStore.open(out)
    (out / "mel" / "c" / "0").mkdir(parents=True, exist_ok=True)
    (out / "mel" / "c" / "0" / "0.1.partial").write_bytes(b"debris of a crash")
    build(corpus, out)
    assert_same_bytes(fresh, out)


def test_a_shard_written_but_not_in_the_ledger_is_built_again(corpus, fresh, tmp_path):
    """A crash between rename and commit: a shard that is not in the ledger does not count."""
    out = tmp_path / "window.zarr"
    build(corpus, out)
    ledger_path(out, 1).unlink()
    shard_path(out, 1).write_bytes(b"half of another shard")
    build(corpus, out)
    assert_same_bytes(fresh, out)


@pytest.fixture
def grown_corpus(tmp_path):
    """A corpus whose one missing clip has arrived, and the store built before that."""
    folder = write_corpus(tmp_path / "corpus", clips=20)
    build(folder, tmp_path / "x.zarr")
    late_S = tone_in_noise(MISSING, seconds=10, rate_hz=32_000)
    soundfile.write(folder / "audio" / f"{clip_id(MISSING)}.wav", late_S, 32_000)
    return folder, tmp_path / "x.zarr"


@pytest.mark.parametrize("moment", ["shard written", "record waits", "shard placed"])
def test_a_crash_while_a_shard_is_replaced_loses_no_good_row(grown_corpus, tmp_path, monkeypatch, moment):
    """The old pair of shard and record holds until the new one is whole, even if the sounds are gone by then."""
    folder, out = grown_corpus
    old_bytes = shard_path(out, 0).read_bytes()

    def crash(*arguments):
        raise KeyboardInterrupt

    target = {
        "shard written": "pipeline.store.shards.write_commit",
        "record waits": "pipeline.files.Path.replace",
        "shard placed": "pipeline.store.shards.promote_record",
    }
    with monkeypatch.context() as patch:
        replace = Path.replace
        if moment == "record waits":  # every rename but that of the shard
            patch.setattr(Path, "replace", lambda a, b: crash() if b.name == "0" else replace(a, b))
        else:
            patch.setattr(target[moment], crash)
        with pytest.raises(KeyboardInterrupt):
            build(folder, out)
    has_new_shard = moment == "shard placed"
    assert (shard_path(out, 0).read_bytes() != old_bytes) == has_new_shard
    for path in (folder / "audio").glob("*.wav"):
        path.write_bytes(b"gone")
    manifest = build(folder, out)
    assert manifest.filter(pl.col("status") == "good").height == 18 + has_new_shard
    assert not list(find_faults(out))


def test_a_damaged_shard_is_not_given_fresh_checksums(grown_corpus):
    """Filling a gap must not make a flipped bit in the clip beside it look right."""
    folder, out = grown_corpus
    content = bytearray(shard_path(out, 0).read_bytes())
    content[300_000] ^= 1
    shard_path(out, 0).write_bytes(content)
    with pytest.raises(StoreError, match=r"shard 0 is damaged; run: ajepa-data verify .* --repair"):
        build(folder, out)


def test_a_rerun_that_changes_nothing_leaves_the_store_usable_throughout(corpus, fresh, monkeypatch):
    """Failed clips are tried again, and meanwhile others train from the store."""
    monkeypatch.setattr(
        "pipeline.build.build.finish_store", lambda *_, **__: FeatureStore.open(fresh).manifest.height
    )
    assert build(corpus, fresh).height == 48


def test_a_clip_that_arrives_later_fills_its_row_and_only_that(tmp_path):
    """Downloads trickle in; the good rows of a shard are not decoded again."""
    folder = write_corpus(tmp_path / "corpus", clips=20)
    build(folder, tmp_path / "x.zarr")
    for path in (folder / "audio").glob("*.wav"):
        if path.stem != clip_id(7):
            path.unlink()  # so that decoding any of them again would lose it
    soundfile.write(
        folder / "audio" / f"{clip_id(MISSING)}.wav",
        tone_in_noise(MISSING, seconds=10, rate_hz=32_000),
        32_000,
    )
    manifest = build(folder, tmp_path / "x.zarr")
    assert manifest.filter(pl.col("status") != "good")["clip_id"].to_list() == [clip_id(SILENT)]
    whole = write_corpus(tmp_path / "whole", clips=20)
    soundfile.write(
        whole / "audio" / f"{clip_id(MISSING)}.wav",
        tone_in_noise(MISSING, seconds=10, rate_hz=32_000),
        32_000,
    )
    build(whole, tmp_path / "whole.zarr")
    for shard in range(2):
        assert (
            shard_path(tmp_path / "x.zarr", shard).read_bytes()
            == shard_path(tmp_path / "whole.zarr", shard).read_bytes()
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "audio-jepa"}, "holds mel spec a-jepa, not audio-jepa"),
        ({"dtype": "uint8"}, "holds float16, not uint8"),
    ],
)
def test_a_store_of_another_kind_is_not_continued(corpus, fresh, change, message):
    """Two specs in one store would train on nonsense."""
    before = (fresh / "manifest.parquet").read_bytes()
    with pytest.raises(StoreError, match=message):
        build(corpus, fresh, **change)
    fewer = audioset_corpus([corpus / "audio"], [corpus / "a_train_segments.csv"])
    lists = [corpus / name for name in ("a_train_segments.csv", "eval_segments.csv")]
    change = rf"\(segments {lists[0]} and {lists[1]} -> {lists[0]}\)"
    with pytest.raises(StoreError, match=f"other clips, lists or classes {change}; give the same"):
        build_store(fewer, StoreOutput(path=fresh, spec=preset_mel_spec("a-jepa")))
    assert (fresh / "manifest.parquet").read_bytes() == before


def test_wrong_input_leaves_nothing_half_made(corpus, tmp_path):
    """A mistake in the first line must not cost a clean-up."""
    with pytest.raises(InputError, match="no such folder"):
        audioset_corpus([tmp_path / "no"], [corpus / "eval_segments.csv"])
    assert not list(tmp_path.iterdir())


def test_two_builds_of_one_store_do_not_meet(fresh):
    """Two writers in one shard lose data."""
    with (
        lock_store(fresh),
        pytest.raises(StoreError, match=f"being written by process {os.getpid()} on"),
        lock_store(fresh),
    ):
        pass


def test_too_little_space_is_an_error_before_the_first_clip(corpus, tmp_path, monkeypatch):
    """Not after a night of decoding."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    with pytest.raises(StoreError, match="47 clips need"):
        build(corpus, tmp_path / "x.zarr")
    assert not list(tmp_path.iterdir())


def test_the_store_opens_again_in_another_process_by_its_path(store):
    """Spawned workers get a pickled store."""
    import pickle

    again = pickle.loads(pickle.dumps(store))
    assert (again.store_id, again.spec, again.label_sets) == (store.store_id, store.spec, store.label_sets)


def test_the_identity_follows_the_content(fresh, store):
    """Labels may be added later: they are no part of what the numbers are."""
    assert FeatureStore.open(fresh).store_id == store.store_id
    assert json.loads((fresh / "zarr.json").read_text())["attributes"]["ajepa"]["spec_id"] == store.spec_id


def test_a_store_of_another_spec_than_expected_is_refused(store_path):
    """A checkpoint names the spec it was trained on."""
    with pytest.raises(StoreError, match=r"expected MelSpec.*audio-jepa"):
        FeatureStore.open(store_path, expect=preset_mel_spec("audio-jepa"))


@pytest.mark.parametrize("path", ["nowhere.zarr", "."])
def test_a_folder_that_is_no_store_is_refused(tmp_path, path):
    """With the command that makes one."""
    with pytest.raises(StoreError, match=r"not a feature store.*; make one with: ajepa-data build-folder"):
        FeatureStore.open(tmp_path / path)


def test_a_store_that_does_not_exist_has_a_nearest_name(tmp_path):
    """A misspelt path is more likely than a missing store."""
    (tmp_path / "mine.zarr").mkdir()
    with pytest.raises(
        StoreError, match=r"store; there is nothing at this path; did you mean .*mine\.zarr\? Or make one"
    ):
        FeatureStore.open(tmp_path / "mime.zarr")


def test_a_full_disk_is_an_error_that_costs_nothing(corpus, fresh, tmp_path):
    """Simulated by a limit on the size of files; the same command carries on."""
    out = tmp_path / "full.zarr"
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    code = BUILD.format(corpus=str(corpus), out=str(out)).replace("build(", f"{limit}; build(")
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2] / "support",
        capture_output=True,
        text=True,
    )
    assert "StoreError" in process.stderr
    assert "no space left for shard 0; free some and run the same command again" in process.stderr
    assert not [path for path in out.rglob("*") if path.is_file() and path.stat().st_size > 2**19]
    build(corpus, out)
    assert_same_bytes(fresh, out)


def test_sounds_are_read_in_the_order_of_their_archives(corpus, tmp_path, monkeypatch):
    """A Parquet row group is read whole for one clip: in the order of rows an archive would be read over and over."""
    read_paths = []
    load = shard_builder.load_clip_audio
    monkeypatch.setattr(
        shard_builder,
        "load_clip_audio",
        lambda locator, **options: read_paths.append(locator.path) or load(locator, **options),
    )
    shuffled = tmp_path / "lists"
    shuffled.mkdir()
    for name in ("a_train_segments.csv", "eval_segments.csv"):
        head, rows = np.split(np.array((corpus / name).read_text().splitlines()), [3])
        (shuffled / name).write_text("\n".join([*head, *np.random.default_rng(0).permutation(rows)]) + "\n")
    (shuffled / "audio").symlink_to(corpus / "audio")
    build(shuffled, tmp_path / "x.zarr")
    assert len(read_paths) == 47
    # The order may only begin again between the three shards.
    assert sum(later < earlier for earlier, later in itertools.pairwise(read_paths)) <= 2


def fail_for(monkeypatch, is_odd):
    """Let the decoder raise a TypeError for the clips whose sounds have such names."""

    def read_or_fail(decoder, *rest):
        if is_odd(decoder):
            raise TypeError("an odd file")
        return read_segment(decoder, *rest)

    monkeypatch.setattr("pipeline.audio.decode.read_segment", read_or_fail)


def test_a_file_that_nobody_foresaw_costs_its_row_alone(corpus, store, tmp_path, monkeypatch):
    """Every other row is as without it, and the row says which exception it was."""
    calls = itertools.count()
    fail_for(monkeypatch, lambda decoder: next(calls) == 2)
    manifest = build(corpus, tmp_path / "x.zarr")
    good = store.manifest["status"] == "good"
    lost = (manifest["status"] != store.manifest["status"]).arg_true().to_list()
    assert len(lost) == 1
    assert manifest["reason"][lost[0]] == "unreadable"
    assert "TypeError: an odd file" in manifest["detail"][lost[0]]
    assert (manifest["status"] == "good").sum() == good.sum() - 1


def test_many_such_files_in_a_row_end_the_build_in_one_line(corpus, tmp_path, monkeypatch):
    """Then a library is broken, not a hundred sounds; nothing of them is written down."""
    monkeypatch.setattr("pipeline.build.shard_builder.MAX_UNEXPECTED_FAILURES", 5)
    fail_for(monkeypatch, lambda decoder: True)
    with pytest.raises(StoreError, match=r"5 clips in a row fail in the same way.*TypeError: an odd file"):
        build(corpus, tmp_path / "x.zarr")
    monkeypatch.undo()
    build(corpus, tmp_path / "x.zarr")
    build(corpus, tmp_path / "y.zarr")
    assert_same_bytes(tmp_path / "x.zarr", tmp_path / "y.zarr")


def test_only_failures_in_a_row_of_one_unexpected_kind_count():
    """A good clip, an expected failure or another exception begins the row anew."""
    unexpected = UnexpectedFailures()
    for _ in range(3):
        for fault in ["TypeError"] * (MAX_UNEXPECTED_FAILURES - 1) + ["ValueError"]:
            unexpected.count_failure(UnexpectedAudioError("x", fault))
        for _ in range(2 * MAX_UNEXPECTED_FAILURES):
            unexpected.count_failure(AudioError("silent", "x"))
        for _ in range(MAX_UNEXPECTED_FAILURES - 1):
            unexpected.count_failure(UnexpectedAudioError("x", "TypeError"))
        unexpected.reset()
