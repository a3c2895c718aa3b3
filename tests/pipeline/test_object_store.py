"""Stores and sounds on s3://, tested with a local server of the same protocol: every byte is as on the disk."""

import itertools
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
from bucket import BUCKET, download_all
from corpus import write_corpus
from stores import assert_same_bytes, build, corpus_in, point_at_no_server

from pipeline import object_store
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.audio.tar import TarReader
from pipeline.audit.command import record_exclude_lists
from pipeline.build import remote_store
from pipeline.build.build import build_store, build_stores
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.build.remote_store import RemoteStore, staging_folder
from pipeline.cli import app
from pipeline.datasets.audioset import audioset_corpus
from pipeline.errors import AudioError, InputError, StopSignal, StoreError, UnavailableError
from pipeline.files import BuildPart
from pipeline.labels.label_sets import propagate_store_labels
from pipeline.object_store import (
    filesystem_and_path,
    object_sizes,
    remove_object,
    upload_file,
)
from pipeline.store.feature_store import FeatureStore

pytestmark = pytest.mark.usefixtures("bucket_server")

LATE_CLIP = "audio/clip_000003.wav"  # of the first shard

SHORT_URL = f"s3://{BUCKET}/short.zarr"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two shards' worth of clips, of few seconds: they are decoded a hundred times."""
    return write_corpus(tmp_path_factory.mktemp("small") / "corpus", clips=32, clip_seconds=3.0)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    """The same clips as a store on the disk."""
    out = tmp_path_factory.mktemp("whole") / "x.zarr"
    build(small, out)
    return out


@pytest.fixture
def url(tmp_path) -> str:
    """A URL of this test's own."""
    return f"s3://{BUCKET}/{tmp_path.name}/x.zarr"


def build_remote(folder: Path, url: str, staging: Path, *, workers: int = 0, part: BuildPart = BuildPart()):
    output = StoreOutput(path=staging, spec=preset_mel_spec("a-jepa"), remote=url)
    return build_stores(corpus_in(folder), [output], BuildOptions(workers=workers, part=part))[0]


class Death(BaseException):
    """Simulates a kill: no code handles this exception."""


def die_at_step(monkeypatch, last: int) -> None:
    """Die at step `last`; every upload and removal is two steps, one before it and one after."""
    counter = itertools.count()

    def may_die(step):
        def counted(*values):
            if next(counter) == last:
                raise Death
            step(*values)
            if next(counter) == last:
                raise Death

        return counted

    monkeypatch.setattr(remote_store, "upload_file", may_die(upload_file))
    monkeypatch.setattr(remote_store, "remove_object", may_die(remove_object))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_on_s3_holds_the_bytes_of_one_on_the_disk(small, whole, url, tmp_path, workers):
    """The location of a store does not change its content, and no shard remains in the staging folder."""
    manifest = build_remote(small, url, tmp_path / "staging", workers=workers)
    assert (manifest["status"] == "good").sum() == 30
    assert_same_bytes(whole, download_all(url, tmp_path / "there"))
    assert FeatureStore.open(tmp_path / "there").manifest.equals(manifest)
    assert not list((tmp_path / "staging").glob("mel/c/*/0/0"))
    assert not (tmp_path / "staging" / "kept").exists()


@pytest.mark.parametrize("last", [1, 9, 10, 11, 12, 13, 14, 20, 27, 34])
def test_a_build_killed_at_any_step_carries_on_to_the_same_bytes(
    small, whole, url, tmp_path, monkeypatch, last
):
    """A kill before or after any upload, with or without the staging folder: the next build gives the same bytes."""
    staging = tmp_path / "staging"
    with monkeypatch.context() as patch:
        die_at_step(patch, last)
        with pytest.raises(Death):
            build_remote(small, url, staging)
    if last % 4 < 2:
        shutil.rmtree(staging)
    build_remote(small, url, staging)
    assert_same_bytes(whole, download_all(url, tmp_path / "there"))


@pytest.fixture(scope="module")
def shorter(small, tmp_path_factory) -> Path:
    """The corpus without one clip."""
    folder = shutil.copytree(small, tmp_path_factory.mktemp("shorter") / "corpus")
    (folder / LATE_CLIP).unlink()
    return folder


@pytest.fixture(scope="module")
def late(small, tmp_path_factory) -> Path:
    """The corpus with sound for that one clip only: good clips need no sound any more."""
    folder = tmp_path_factory.mktemp("late")
    (folder / "audio").mkdir()
    for name in (LATE_CLIP, "a_train_segments.csv", "eval_segments.csv"):
        shutil.copy(small / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def short_names(shorter, tmp_path_factory) -> list[str]:
    """The names of the objects of a store built without the late clip, below SHORT_URL."""
    out = tmp_path_factory.mktemp("short") / "x.zarr"
    build(shorter, out)
    names = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    for name in names:
        upload_file(out / name, f"{SHORT_URL}/{name}")
    return names


# With a lost staging folder, a kill ahead of a step leaves what a kill after the step before leaves: odd ones suffice.
@pytest.mark.parametrize("last", [1, 3, 5, 7, 12, None])
def test_a_late_clip_fills_its_row_and_the_others_come_from_the_remote_shard(
    short_names, late, whole, url, tmp_path, monkeypatch, last
):
    """This also works after a kill between the old shard and the new one, with a lost staging folder."""
    for name in short_names:
        filesystem, source = filesystem_and_path(f"{SHORT_URL}/{name}")
        filesystem.fs.copy_file(source, filesystem_and_path(f"{url}/{name}")[1])
    if last is not None:
        with monkeypatch.context() as patch:
            die_at_step(patch, last)
            with pytest.raises(Death):
                build_remote(late, url, tmp_path / "lost")
    manifest = build_remote(late, url, tmp_path / "staging")
    there = download_all(url, tmp_path / "there")
    assert (there / "mel/c/0/0/0").read_bytes() == (whole / "mel/c/0/0/0").read_bytes()
    assert object_sizes(f"{url}/ledger").keys() == {"000000.parquet", "000001.parquet"}
    assert FeatureStore.open(there).manifest.equals(manifest)
    assert (manifest["status"] == "good").sum() == 30


def test_parts_on_two_machines_finish_to_the_same_bytes(small, whole, url, tmp_path):
    """The two machines share only the bucket."""
    for index in (1, 0):
        manifest = build_remote(small, url, tmp_path / f"machine-{index}", part=BuildPart(index, 2))
        assert (manifest is None) == (index == 1)
    assert_same_bytes(whole, download_all(url, tmp_path / "there"))


def test_labels_propagated_in_the_staging_folder_reach_the_remote_store(small, url, tmp_path):
    """A new staging folder does not undo the propagated labels."""
    build_remote(small, url, tmp_path / "staging")
    propagate_store_labels(tmp_path / "staging")
    build_remote(small, url, tmp_path / "staging")
    build_remote(small, url, tmp_path / "other")
    there = FeatureStore.open(download_all(url, tmp_path / "there"))
    assert there.label_sets == ("raw", "unambiguous")


def test_exclude_lists_reach_the_remote_store_and_outlive_the_staging_folder(small, url, tmp_path):
    """Excluded clips stay excluded on a new machine, and removed lists stay removed."""
    build_remote(small, url, tmp_path / "staging")
    (path := tmp_path / "a.txt").write_text("clip_000002")
    record_exclude_lists(FeatureStore.open(tmp_path / "staging"), [path])
    build_remote(small, url, tmp_path / "staging")
    build_remote(small, url, tmp_path / "other")
    assert FeatureStore.open(tmp_path / "other").exclusions.frame["clip_id"].to_list() == ["clip_000002"]
    record_exclude_lists(FeatureStore.open(tmp_path / "other"), [])
    build_remote(small, url, tmp_path / "other")
    assert FeatureStore.open(download_all(url, tmp_path / "there")).exclusions.digest is None


def test_a_remote_store_of_another_spec_is_refused_and_no_folder_is_made(small, url, tmp_path):
    """As on the disk."""
    build_remote(small, url, tmp_path / "staging")
    output = StoreOutput(path=tmp_path / "new", spec=preset_mel_spec("audio-jepa"), remote=url)
    with pytest.raises(StoreError, match=f"{url} holds mel spec a-jepa, not audio-jepa"):
        build_store(corpus_in(small), output, BuildOptions(workers=0))
    assert not (tmp_path / "new").exists()


def test_a_remote_store_of_another_plan_is_refused_with_the_option_that_differs(small, url, tmp_path):
    """The sentence of a store on the disk; the staging folder may be on another machine."""
    build_remote(small, url, tmp_path / "staging")
    other = audioset_corpus([small / "audio"], [small / "eval_segments.csv"])
    output = StoreOutput(path=tmp_path / "new", spec=preset_mel_spec("a-jepa"), remote=url)
    change = rf"\(segments \S+ and \S+eval_segments.csv -> {small / 'eval_segments.csv'}\)"
    with pytest.raises(
        StoreError, match=f"{url} was planned from other clips, lists or classes {change}; give"
    ):
        build_store(other, output, BuildOptions(workers=0))
    assert not (tmp_path / "new").exists()


def test_rows_of_a_damaged_remote_shard_are_not_reused(small, shorter, url, tmp_path):
    """Reused rows would get new checksums; the message says what to do, and that works."""
    build_remote(shorter, url, tmp_path / "staging")
    (tmp_path / "junk").write_bytes(b"junk")
    upload_file(tmp_path / "junk", f"{url}/mel/c/0/0/0")
    with pytest.raises(StoreError, match=f"shard 0 is damaged; delete {url}/ledger/000000.parquet and build"):
        build_remote(small, url, tmp_path / "staging")
    remove_object(f"{url}/ledger/000000.parquet")
    assert (build_remote(small, url, tmp_path / "staging")["status"] == "good").sum() == 30


def test_a_server_that_does_not_answer_is_one_line_within_seconds(small, tmp_path, monkeypatch):
    """A typing error must not cost the minutes that AWS's own retries take."""
    began = time.monotonic()
    with pytest.raises(InputError, match="no such object or bucket") as absent:
        build_remote(small, "s3://no-such-bucket/x.zarr", tmp_path / "staging")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL") as silent:
        build_remote(small, f"s3://{BUCKET}/x.zarr", tmp_path / "staging")
    with pytest.raises(InputError, match="Protocol not known: nonsense"):
        build_remote(small, "nonsense://x/x.zarr", tmp_path / "staging")
    assert "\n" not in str(absent.value) + str(silent.value)
    assert time.monotonic() - began < 20
    assert not (tmp_path / "staging").exists()


def test_the_command_takes_a_url(small, whole, url, tmp_path, monkeypatch, capsys):
    """The command prints the folder of the tables and of the shards that are not yet uploaded."""
    lists = [f"--segments={small / name}" for name in ("a_train_segments.csv", "eval_segments.csv")]
    arguments = ["build-audioset", f"--audio={small / 'audio'}", *lists, f"--out={url}/"]
    monkeypatch.setattr(
        sys, "argv", ["ajepa-data", *arguments, f"--staging={tmp_path / 'here'}", "--workers=0"]
    )
    with pytest.raises(SystemExit) as stop:
        app.main()
    printed = capsys.readouterr()
    assert not stop.value.code
    assert f"in {tmp_path / 'here' / 'x.zarr.staging'}" in printed.err
    assert f"{url}: done" in printed.out
    assert_same_bytes(whole, download_all(url, tmp_path / "there"))


def test_every_part_has_its_own_staging_folder():
    """In a common folder, two parts would confuse their records."""
    names = {
        staging_folder("s3://b/x.zarr/", Path(), part)
        for part in (BuildPart(), BuildPart(0, 2), BuildPart(1, 2))
    }
    assert names == {Path("x.zarr.staging"), Path("x.zarr.0-of-2.staging"), Path("x.zarr.1-of-2.staging")}


def test_other_schemes_are_left_to_fsspec(whole, tmp_path):
    """S3 has a client of its own, all other schemes have fsspec's drivers."""
    url = "memory://bucket/x.zarr"
    assert RemoteStore(url=url, staging=tmp_path).read_header() is None
    upload_file(whole / "zarr.json", f"{url}/zarr.json")
    there = RemoteStore(url=url, staging=tmp_path).read_header()
    assert there is not None
    assert there.to_json() == FeatureStore.open(whole).header.to_json()
    remove_object(f"{url}/zarr.json")
    assert object_sizes(url) == {}


@pytest.fixture(scope="module")
def audio_url(small, tmp_path_factory) -> str:
    """The clips' sounds in a bucket, every other one in a tar; and two files that are no sounds."""
    url, archive = f"s3://{BUCKET}/audio", tmp_path_factory.mktemp("tar") / "some-0001.tar"
    with tarfile.open(archive, "w") as tar:
        for number, path in enumerate(sorted((small / "audio").iterdir())):
            if number % 2:
                tar.add(path, f"deep/{path.name}")
            else:
                upload_file(path, f"{url}/loose/{path.name}")
    upload_file(archive, f"{url}/{archive.name}")
    upload_file(small / "a_train_segments.csv", f"{url}/readme.txt")
    (archive.parent / "x.parquet").write_bytes(b"a table")
    upload_file(archive.parent / "x.parquet", f"{url}/x.parquet")
    return url


def corpus_at(url: str, small: Path):
    """The corpus of the clips, with its sounds at `url`."""
    return audioset_corpus([url], [small / "a_train_segments.csv", small / "eval_segments.csv"])


def test_sounds_in_a_bucket_give_the_mel_of_sounds_on_the_disk(small, whole, audio_url, tmp_path):
    """This holds for loose files and tars, with worker processes and without."""
    corpus = corpus_at(audio_url + "/", small)
    assert [note for note in corpus.notes if f"{audio_url}/x.parquet: cannot be read from a URL" in note]
    for workers in (0, 1):
        output = StoreOutput(path=tmp_path / f"{workers}.zarr", spec=preset_mel_spec("a-jepa"))
        manifest = build_store(corpus, output, BuildOptions(workers=workers))
        assert manifest["source"].str.starts_with("some-0001.tar::deep/").sum() == 15
        for shard in (0, 1):
            name = f"mel/c/{shard}/0/0"
            assert (output.path / name).read_bytes() == (whole / name).read_bytes()


def test_one_tar_in_a_bucket_can_be_given_by_itself(small, audio_url):
    """As on the disk."""
    corpus = corpus_at(f"{audio_url}/some-0001.tar", small)
    assert corpus.sources.sound_count == corpus.sources.frame["kind"].eq("tar").sum() == 15


def test_an_object_that_is_gone_costs_its_clip_and_a_server_that_is_gone_none(
    small, url, tmp_path, monkeypatch
):
    """A network that fails for an hour must not make a hundred thousand clips unreadable."""
    for path in (small / "audio").iterdir():
        upload_file(path, f"{url}/{path.name}")
    corpus = corpus_at(url, small)
    remove_object(f"{url}/clip_000000.wav")
    output = StoreOutput(path=tmp_path / "x.zarr", spec=preset_mel_spec("a-jepa"))
    point_at_no_server(monkeypatch)
    with pytest.raises(UnavailableError, match="run the same command again"):
        build_store(corpus, output, BuildOptions(workers=0))
    monkeypatch.undo()
    manifest = build_store(corpus, output, BuildOptions(workers=0))
    assert manifest.row(0, named=True)["reason"] == "missing"
    assert "clip_000000.wav is gone" in manifest.row(0, named=True)["detail"]
    assert (manifest["status"] == "good").sum() == 29


def test_an_upload_that_a_signal_cuts_off_is_whole_or_not_there(url, tmp_path, monkeypatch):
    """The client completes an object whenever its stream is closed, also by an exception: with what it has so far."""
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(3 * 2**20))
    filesystem, _ = filesystem_and_path(url)
    open_object = type(filesystem).open

    def raise_stop(*_: object) -> None:
        raise StopSignal

    def open_and_be_signalled(*arguments: object, **options: object) -> object:
        opened = open_object(*arguments, **options)
        os.kill(os.getpid(), signal.SIGUSR1)
        return opened

    previous = signal.signal(signal.SIGUSR1, raise_stop)
    monkeypatch.setattr(type(filesystem), "open", open_and_be_signalled)
    try:
        with pytest.raises(StopSignal):
            upload_file(path, f"{url}/shard")
    finally:
        signal.signal(signal.SIGUSR1, previous)
    monkeypatch.undo()
    assert object_sizes(url).get("shard", path.stat().st_size) == path.stat().st_size


def test_a_server_that_fails_for_a_moment_is_asked_again(url, tmp_path, monkeypatch):
    """One answer of 503 must not end a build of a week."""
    (tmp_path / "file").write_bytes(b"content")
    filesystem, _ = filesystem_and_path(url)
    open_object = type(filesystem).open
    failures = iter(
        [OSError("AWS Error SLOW_DOWN during PutObject"), OSError("AWS Error NETWORK_CONNECTION")]
    )

    def fail_twice(*arguments: object, **options: object) -> object:
        if failure := next(failures, None):
            raise failure
        return open_object(*arguments, **options)

    waits = []
    monkeypatch.setattr(object_store.time, "sleep", waits.append)
    monkeypatch.setattr(type(filesystem), "open", fail_twice)
    upload_file(tmp_path / "file", f"{url}/file")
    assert waits == list(object_store.RETRY_WAIT_SECONDS[:2])
    assert object_sizes(url) == {"file": 7}


def test_members_of_a_tar_are_fetched_many_at_a_time(audio_url, monkeypatch):
    """A request for each sound of a tar would cost 2 million of them, at 50 ms each."""
    url = f"{audio_url}/some-0001.tar"
    requests = []
    read_part = object_store._read_object_part
    monkeypatch.setattr(
        object_store, "_read_object_part", lambda *part: requests.append(part) or read_part(*part)
    )
    members = list(TarReader(url).read_members())
    sounds = [object_store.read_remote_sound(url, offset, size) for _, offset, size in members]
    assert len(requests) <= len(members) // 2
    for (_, offset, size), sound in zip(members, sounds, strict=True):
        assert read_part(url, offset, size) == sound


def test_a_sound_too_large_for_the_memory_costs_its_clip(audio_url, monkeypatch):
    """A sound is read into memory as a whole, so its size is limited."""
    monkeypatch.setattr(object_store, "MAX_REMOTE_SOUND_BYTES", 1000)
    with pytest.raises(AudioError, match="up to 1,000 are read from a URL"):
        object_store.read_remote_sound(f"{audio_url}/loose/clip_000000.wav")
    assert object_store.read_remote_sound(f"{audio_url}/loose/clip_000000.wav", 0, 4) == b"RIFF"


def test_a_prefix_with_nothing_below_is_one_line(small):
    """An empty prefix is probably a typing error."""
    with pytest.raises(InputError, match="nothing-here: no object below it"):
        corpus_at(f"s3://{BUCKET}/nothing-here", small)
