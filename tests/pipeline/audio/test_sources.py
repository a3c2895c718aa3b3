"""Sounds are found in every layout and decode to the same samples from each; damage costs only its clips."""

import builtins
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import AUDIO, write_panns, write_parquet, write_passt, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import ENCODERS, SUBTYPES, babble, write

from pipeline.audio import hdf5, parquet, sources
from pipeline.audio.decode import load_clip_audio
from pipeline.audio.sources import SOURCES_SCHEMA, ClipSources, SoundLocator
from pipeline.audio.tar import TarReader
from pipeline.errors import AudioError, InputError

FILES = {f"{number:011d}.flac": bytes([number]) * (100 * number + 1) for number in range(8)}


def find_rows(*locations):
    """The sounds below some locations as dicts, and the notes."""
    result = sources.find_sounds(locations)
    return result.sounds.rows(named=True), result.notes


def member_bytes(row):
    with open(row["path"], "rb") as file:
        file.seek(row["offset"])
        return file.read(row["size"])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_row_of_a_tar_has_the_position_of_its_member(tmp_path, form):
    """In each of the three formats, with names too long for a header; members that are no sounds are left out."""
    # 121 characters: ustar splits the name, GNU and PAX add a member for it.
    deep = "/".join(["folder"] * 15) + "/abcdefghijk.flac"
    files = {
        **FILES,
        "00000000001.json": b"{}",
        "a.cls": b"3",
        deep: b"deep",
        "../../etc/b.wav": b"up",
        "/c.wav": b"",
    }
    rows, notes = find_rows(write_tar(tmp_path / "x.tar", files, form=form))
    sounds = {name: content for name, content in files.items() if not name.endswith((".json", ".cls"))}
    assert {row["source"].removeprefix("x.tar::"): member_bytes(row) for row in rows} == sounds
    assert notes == ()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_no_text_or_very_long_are_read(tmp_path, form):
    """Nothing is unpacked: names are only displayed, and the bytes are found by their position."""
    long = "n" * 300 + ".wav"
    rows, notes = find_rows(
        write_tar(tmp_path / "x.tar", {"a\udcff/b.wav": b"odd", long: b"long"}, form=form)
    )
    assert [member_bytes(row) for row in rows] == [b"odd", b"long"]
    assert [row["name"] for row in rows] == ["b.wav", long]
    assert rows[0]["source"] == "x.tar::a\\xff/b.wav"
    assert notes == ()


def test_a_tar_is_not_read_through(tmp_path):
    """Only the headers are read of a tar with gigabytes of sound."""
    path = tmp_path / "big.tar"
    with path.open("wb") as file:
        for name in ("a.wav", "b.wav"):
            member = tarfile.TarInfo(name)
            member.size = 2**33 + 1  # beyond octal digits: base 256
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.seek(-(-member.size // 512) * 512, os.SEEK_CUR)
        file.write(bytes(1024))
    rows, notes = find_rows(path)
    assert [(row["name"], row["size"]) for row in rows] == [("a.wav", 2**33 + 1), ("b.wav", 2**33 + 1)]
    assert notes == ()


def test_links_folders_and_sparse_members_are_no_sounds(tmp_path):
    """Their bytes are stored elsewhere."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("a.wav", tarfile.SYMTYPE),
            ("b.wav", tarfile.LNKTYPE),
            ("c.wav", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "d.wav"
            tar.addfile(member)
        sparse = tarfile.TarInfo("e.wav")
        sparse.pax_headers = {"GNU.sparse.major": "1"}
        tar.addfile(sparse)
        tar.addfile(tarfile.TarInfo("d.wav"), io.BytesIO())
    assert [row["name"] for row in find_rows(tmp_path)[0]] == ["d.wav"]


def cut_file(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_the_members_before_the_cut_of_a_short_tar_are_used(tmp_path):
    """The cut member is listed too, because the decoder checks it; the tar gets one note."""
    whole, _ = find_rows(write_tar(tmp_path / "x.tar", FILES))
    middle = whole[5]["offset"] + 200
    rows, notes = find_rows(cut_file(tmp_path / "x.tar", middle))
    assert [row["name"] for row in rows] == list(FILES)[:6]
    assert notes == (f"{tmp_path}/x.tar: is cut short in its member 6; fetch it again",)


@pytest.mark.parametrize(
    ("damage", "count", "message"),
    [
        (lambda content: content[:0], 0, "is no tar"),
        (lambda content: b"<html>" * 200, 0, "is no tar"),
        (lambda content: b"\x1f\x8b" + content[2:], 0, "is compressed"),
        (
            lambda content: content[:1024] + b"\xff" + content[1025:],
            1,
            "is damaged at byte 1,024; the 1 members",
        ),
        (lambda content: content[:2048], 2, "ends after 2 members without a tar's end mark"),
        (lambda content: content[:2100], 2, "ends after 2 members without a tar's end mark"),
        (lambda content: with_size(content, b"77777777777"), 1, "is cut short in its member 1"),
        (lambda content: with_size(content, b"not-a-size "), 0, "is damaged at byte 0"),
        (lambda content: with_size(content, b"\xff" * 11), 0, "is damaged at byte 0"),
        (lambda content: with_size(content, b"77777777777", kind=b"L"), 0, "is damaged at byte 0"),
    ],
)
def test_a_damaged_tar_says_where_and_gives_the_members_before(tmp_path, damage, count, message):
    """There is no exception, because other archives may be whole."""
    path = write_tar(tmp_path / "x.tar", {name: b"1" for name in FILES}, form=tarfile.USTAR_FORMAT)
    path.write_bytes(damage(path.read_bytes()))
    rows, (note,) = find_rows(path)
    assert [row["name"] for row in rows] == list(FILES)[:count]
    assert message in note


def with_size(content, size, kind=b"0"):
    """The tar with another size in its first header, whose checksum is corrected."""
    head = bytearray(content[:512])
    head[124:135], head[156:157], head[148:156] = size, kind, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + content[512:]


def test_damaged_pax_records_end_where_they_make_no_sense(tmp_path):
    """A record of length 0 would never end."""
    member = tarfile.TarInfo("a.wav")
    member.pax_headers = {"comment": "here"}
    content = member.tobuf(tarfile.PAX_FORMAT).replace(b"16 comment=here", b"0 xcomment=here")
    (tmp_path / "x.tar").write_bytes(content + bytes(1024))
    assert [m.name for m in TarReader(tmp_path / "x.tar").read_members()] == ["a.wav"]


def test_compressed_tars_are_refused_with_advice(tmp_path):
    """A compressed tar is an error alone, and a note among other files."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.wav"))
    with pytest.raises(
        InputError, match=r"x\.tar\.gz: is compressed.*unpack it, or store it as a plain \.tar"
    ):
        sources.find_sounds([tmp_path / "x.tar.gz"])
    (tmp_path / "b.wav").touch()
    rows, (note,) = find_rows(tmp_path)
    assert [row["name"] for row in rows] == ["b.wav"]
    assert "unpack it" in note


def test_rows_of_parquet_are_named_by_path_by_id_or_by_place(tmp_path):
    """Any of these may be absent in tables from Hugging Face."""
    files = {f"{name}.flac": b"x" for name in "abcd"}
    write_parquet(tmp_path / "a.parquet", files, group=3, video_id=["id_a", "id_b", None, "id_d"])
    rows, notes = find_rows(tmp_path)
    assert [(row["name"], row["id"]) for row in rows] == list(
        zip(files, ["id_a", "id_b", None, "id_d"], strict=True)
    )
    assert [(row["group"], row["row"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    plain = pa.table({"id": ["one", None], "audio": pa.array([b"x", b"y"], pa.binary())})
    pq.write_table(plain, tmp_path / "b.parquet")
    rows, notes = find_rows(tmp_path / "b.parquet")
    assert [row["source"] for row in rows] == ["b.parquet::one", "b.parquet::row 1 of group 0"]
    assert [parquet.read_parquet_sound(tmp_path / "b.parquet", 0, row) for row in (1, 0)] == [b"y", b"x"]
    assert notes == ()


def test_planning_reads_no_sound_of_a_parquet_file(tmp_path, monkeypatch):
    """Reading two terabytes would take a day."""
    write_parquet(tmp_path / "a.parquet", FILES, video_id=[name[:11] for name in FILES])
    columns_read = []
    read = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile,
        "read",
        lambda self, columns: columns_read.append(columns) or read(self, columns=columns),
    )
    assert len(find_rows(tmp_path)[0]) == 8
    assert columns_read == [["audio.path", "video_id"]]


def test_a_row_group_is_read_once_if_its_rows_are_read_in_order(tmp_path, monkeypatch):
    """A shard of many rows must not read a row group for each row; a large group is read in parts."""
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 500)
    path = write_parquet(tmp_path / "a.parquet", FILES, group=8)
    restarts = []
    restart = parquet.RowGroupReader._restart_reading
    monkeypatch.setattr(
        parquet.RowGroupReader, "_restart_reading", lambda self: restarts.append(1) or restart(self)
    )
    assert [parquet.read_parquet_sound(path, 0, row) for row in range(8)] == list(FILES.values())
    assert len(restarts) == 1
    version = (path.stat().st_mtime_ns, path.stat().st_size)
    assert parquet.cached_row_group(path, 0, version)._rows_per_batch == 1
    assert parquet.read_parquet_sound(path, 0, 2) == FILES["00000000002.flac"]
    assert len(restarts) == 2


def test_a_parquet_file_that_is_replaced_is_read_anew(tmp_path):
    """A worker runs for a long time, in which a user may fetch the file again."""
    path = write_parquet(tmp_path / "a.parquet", {"a.wav": b"old"})
    assert parquet.read_parquet_sound(path, 0, 0) == b"old"
    write_parquet(path, {"a.wav": b"other"})
    assert parquet.read_parquet_sound(path, 0, 0) == b"other"


WAV_HEAD = b"RIFF\x24\0\0\0WAVEfmt "


def sound_column_of(path, columns):
    """The name of the column of sounds of a table with these columns."""
    pq.write_table(pa.table(columns), path)
    column = parquet.find_sound_column(pq.ParquetFile(path))
    return column and column.leaf


def test_the_column_of_sounds_is_found_by_name_or_by_content(tmp_path):
    """Some tables have columns of pictures too."""
    path = tmp_path / "a.parquet"
    pictures = pa.array([{"bytes": b"\xff\xd8\xff\xe0 a picture", "path": None}], AUDIO)
    columns = {"image": pictures, "label": ["dog"], "thumbnail": pa.array([b"\x89PNG"], pa.binary())}
    assert sound_column_of(path, columns | {"audio": pa.array([b"x"], pa.binary())}) == "audio"
    assert sound_column_of(path, columns | {"audio.bytes": pa.array([b"x"], pa.binary())}) == "audio.bytes"
    assert sound_column_of(path, columns | {"mp3": pa.array([WAV_HEAD], pa.large_binary())}) == "mp3"
    assert sound_column_of(path, columns) == "image.bytes"
    assert sound_column_of(path, {"label": ["dog"]}) is None


def test_the_first_sound_of_a_column_decides_even_after_nulls(tmp_path):
    """Rows without a sound are common at the head of a table."""
    sounds = pa.array([None] * 20 + [WAV_HEAD], pa.binary())
    pictures = pa.array([b"x"] * 21, pa.binary())
    assert sound_column_of(tmp_path / "a.parquet", {"image": pictures, "wave": sounds}) == "wave"


def test_a_flattened_table_has_its_sounds_and_paths(tmp_path):
    """Columns `audio.bytes` and `audio.path`, as tools that know no structs write them."""
    columns = {"audio.bytes": pa.array([b"x", b"y"], pa.binary()), "audio.path": ["a.wav", "b.wav"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows, notes = find_rows(tmp_path)
    assert [row["name"] for row in rows] == ["a.wav", "b.wav"]
    assert [parquet.read_parquet_sound(tmp_path / "a.parquet", 0, row) for row in (0, 1)] == [b"x", b"y"]
    assert notes == ()


@pytest.mark.parametrize("column", ["video_id", "YTID", "Id"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_an_id_column_may_have_any_capitals_and_be_a_dictionary(tmp_path, column, kind):
    ids = pa.array(["one", None, "one"]).cast(kind)
    write_parquet(tmp_path / "a.parquet", {f"{name}.wav": b"x" for name in "abc"}, **{column: ids})
    assert [row["id"] for row in find_rows(tmp_path)[0]] == ["one", None, "one"]


def test_threads_get_each_the_sound_of_its_own_row(tmp_path, monkeypatch):
    """A reader goes from batch to batch: two threads in it at once would get each other's sounds."""
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 4_000)
    files = {f"{row:04}.wav": f"{row} ".encode() * 100 for row in range(300)}
    path = write_parquet(tmp_path / "a.parquet", files, group=100)
    with ThreadPoolExecutor(8) as threads:
        read = threads.map(lambda row: parquet.read_parquet_sound(path, row // 100, row % 100), range(300))
        assert list(read) == list(files.values())


MEMBERS = st.tuples(
    st.integers(0, 30),  # number in the name
    st.sampled_from(["file", "file", "link", "folder"]),
    st.integers(0, 1_100),  # bytes
    st.booleans(),  # whether the name is too long for a header
)

TARS = st.tuples(
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.lists(MEMBERS, min_size=1, max_size=6, unique_by=lambda member: member[0]),
)


def tar_bytes(form, members):
    """A tar of files, folders, and hard links to its first member."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for number, kind, size, is_long in members:
            member = tarfile.TarInfo(f"{'n' * 120 * is_long}/{number}.wav")
            if kind == "link" and tar.getmembers():
                member.type, member.linkname = tarfile.LNKTYPE, tar.getmembers()[0].name
            elif kind == "folder":
                member.type = tarfile.DIRTYPE
            else:
                member.size = size
            tar.addfile(member, io.BytesIO(bytes([number + 1]) * member.size))
    return content.getvalue()


@settings(max_examples=100, deadline=None)
@given(st.lists(TARS, min_size=1, max_size=3))
def test_members_are_those_that_tarfile_reads_over_joined_tars(tmp_path_factory, tars):
    """Every file and every hard link to one, in order, with its bytes; no fault is told of tars that are whole."""
    content = b"".join(tar_bytes(*one) for one in tars)
    path = tmp_path_factory.getbasetemp() / "joined.tar"
    path.write_bytes(content)
    expected = []
    with tarfile.open(path, ignore_zeros=True) as tar:
        for member in tar:
            with suppress(KeyError):  # a link to what is not there
                if content_file := tar.extractfile(member):  # None for a folder and a link to one
                    expected.append((member.name, content_file.read()))
    reader = TarReader(path)
    members = list(reader.read_members())
    found = [(member.name, content[member.offset : member.offset + member.size]) for member in members]
    assert found == expected
    assert reader.fault is None


def test_what_follows_the_end_mark_and_is_no_tar_is_left_alone(tmp_path):
    """Some programs fill their last block with whatever was in memory."""
    path = write_tar(tmp_path / "x.tar", {"a.wav": b"1"})
    path.write_bytes(path.read_bytes() + b"something else" * 100)
    rows, notes = find_rows(path)
    assert [row["name"] for row in rows] == ["a.wav"]
    assert notes == ()


def test_hdf5_of_panns_and_passt_is_listed(tmp_path):
    """Each row has a name, stored as bytes."""
    pytest.importorskip("h5py")
    write_panns(tmp_path / "a.h5", {f"Y{name[:11]}.wav": np.arange(9) for name in FILES})
    write_passt(tmp_path / "b.hdf5", FILES)
    rows, notes = find_rows(tmp_path)
    assert [row["source"] for row in rows[:1] + rows[8:9]] == [
        "a.h5::Y00000000000.wav",
        "b.hdf5::00000000000.flac",
    ]
    assert [row["row"] for row in rows] == [*range(8), *range(8)]
    assert {row["kind"] for row in rows} == {"hdf5"}
    assert hdf5.read_hdf5_sound(tmp_path / "b.hdf5", 3) == FILES["00000000003.flac"]
    assert notes == ()


def test_the_rate_of_panns_is_the_file_s_own_or_32_khz(tmp_path):
    """A row reaches the decoder as a wav, whose header states the rate."""
    pytest.importorskip("h5py")
    for rate_hz, expected_hz in ((None, 32_000), (8_000, 8_000)):
        path = write_panns(tmp_path / "a.h5", {"a.wav": np.arange(5)}, rate_hz=rate_hz)
        content = hdf5.read_hdf5_sound(path, 0)
        assert struct.unpack_from("<I", content, 24) == (expected_hz,)
        assert np.frombuffer(content[44:], "<i2").tolist() == [0, 1, 2, 3, 4]


def test_without_h5py_one_line_says_what_to_install(tmp_path, monkeypatch):
    """h5py is an optional extra."""
    (tmp_path / "a.h5").touch()
    real_import = builtins.__import__

    def import_without_h5py(name, *rest):
        if name == "h5py":
            raise ModuleNotFoundError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", import_without_h5py)
    with pytest.raises(InputError, match=r"a\.h5: reading HDF5 needs h5py; pip install 'ajepa\[hdf5\]'"):
        find_rows(tmp_path)


def other_table(path):
    pq.write_table(pa.table({"label": ["x"]}), path)


def other_hdf5(path):
    import h5py

    with h5py.File(path, "w") as file:
        file["waveform"] = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.parquet", lambda path: path.write_bytes(b"<html>"), "is no Parquet file that can be read"),
        ("x.parquet", lambda path: path.touch(), "is no Parquet file that can be read"),
        (
            "x.parquet",
            lambda path: cut_file(write_parquet(path, FILES), 2_000),
            "is no Parquet file that can be read",
        ),
        ("x.parquet", other_table, "has no column of sounds (there are: label)"),
        ("x.parquet", lambda path: path.symlink_to("gone"), "is no Parquet file that can be read"),
        ("x.h5", lambda path: path.write_bytes(b"<html>"), "is no HDF5 file that can be read"),
        ("x.h5", lambda path: cut_file(write_passt(path, FILES), 2_000), "is no HDF5 file that can be read"),
        ("x.hdf5", other_hdf5, "is not packed as PANNs or PaSST do it (datasets: waveform"),
        ("x.tar", lambda path: path.write_bytes(b"<html>"), "is no tar; fetch it again"),
        ("x.tar", lambda path: path.symlink_to("gone"), "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_is_no_archive_is_noted_and_the_rest_is_used(tmp_path, name, make, message):
    """One bad download must not stop a build of two million clips."""
    pytest.importorskip("h5py")
    make(tmp_path / name)
    write_tar(tmp_path / "whole.tar", FILES)
    rows, notes = find_rows(tmp_path)
    assert len(rows) == 8
    (note,) = notes
    assert note.removeprefix(f"{tmp_path}/{name}: ").startswith(message)
    assert "\n" not in note


@pytest.mark.parametrize("kind", ["tar", "parquet", "h5"])
def test_no_damage_to_an_archive_does_more_than_cost_its_sounds(tmp_path, kind):
    """Bytes flipped and cut at random give a note or nothing while a build is planned, never an exception."""
    if kind == "h5":
        pytest.importorskip("h5py")
    make = {"tar": write_tar, "parquet": write_parquet, "h5": write_passt}[kind]
    content = make(tmp_path / f"x.{kind}", FILES).read_bytes()
    rng = np.random.default_rng(0)
    for attempt in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 4):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"{attempt}.{kind}"
        path.write_bytes(damaged[: rng.integers(len(content))] if attempt % 4 == 0 else damaged)
        _, notes = find_rows(path)
        assert len(notes) <= 1


def test_the_table_of_sounds_has_one_schema_for_all_layouts(tmp_path):
    """The schema does not depend on what is found."""
    write_tar(tmp_path / "x.tar", {"notes.txt": b""})
    assert dict(sources.find_sounds([tmp_path]).sounds.schema) == sources.FOUND_SOUNDS_SCHEMA
    assert sources.find_sounds([tmp_path]).sounds.schema["offset"] == pl.Int64


RATE_HZ = 48_000

CONTAINERS = (*ENCODERS, *SUBTYPES, ".wav")


def locators_by_name(*locations):
    """The locators of all sounds below some locations, by the name of the sound."""
    sounds = sources.find_sounds(locations).sounds
    clip_sources = ClipSources(frame=sounds.select(*SOURCES_SCHEMA))
    return {locator.name: locator for locator in clip_sources.locators_of_rows(range(sounds.height))}


def load(locator, start_seconds=1.0, end_seconds=3.0):
    return load_clip_audio(locator, start_seconds=start_seconds, end_seconds=end_seconds)


def refusal(locator):
    with pytest.raises(AudioError) as error:
        load(locator)
    return error.value.reason, str(error.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sound in every container, by name."""
    folder = tmp_path_factory.mktemp("files")
    sound_SC = np.stack([babble(4, RATE_HZ, seed=seed) for seed in range(2)], axis=1)
    return {f"sound{s}": write(folder / f"sound{s}", sound_SC, RATE_HZ) for s in CONTAINERS}


@pytest.fixture(scope="module")
def packed(files, tmp_path_factory):
    """The same sounds in archives: layout -> name -> locator."""
    folder = tmp_path_factory.mktemp("packed")
    content = {name: path.read_bytes() for name, path in files.items()}
    return {
        "tar": locators_by_name(write_tar(folder / "x.tar", content)),
        "parquet": locators_by_name(write_parquet(folder / "x.parquet", content)),
    }


@pytest.mark.parametrize("layout", ["tar", "parquet"])
@pytest.mark.parametrize("name", [f"sound{suffix}" for suffix in CONTAINERS])
@pytest.mark.parametrize("segment", [(0.0, 4.0), (1.5, 2.5)])
def test_a_sound_is_the_same_from_a_file_from_a_tar_and_from_parquet(files, packed, layout, name, segment):
    """Every sample, length, codec and flag is the same: a layout must not change what is learnt."""
    loose = load(SoundLocator.from_path(files[name]), *segment)
    member = load(packed[layout][name], *segment)
    assert np.array_equal(loose.wave_S, member.wave_S)
    facts = ("rate_hz", "channels", "codec", "source_seconds", "digest", "flags", "peak_dbfs", "rms_dbfs")
    assert [getattr(loose, fact) for fact in facts] == [getattr(member, fact) for fact in facts]


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_damage_gives_the_same_error_in_every_layout(files, tmp_path, layout, capfd):
    """Half of a file gives the same reason and the same words in every layout, and nothing on the terminal."""
    halves = {name: path.read_bytes()[: path.stat().st_size // 2] for name, path in files.items()}
    make = {"tar": write_tar, "parquet": write_parquet}[layout]
    members = locators_by_name(make(tmp_path / f"x.{layout}", halves))
    for name, content in halves.items():
        (tmp_path / name).write_bytes(content)
        assert outcome(members[name]) == outcome(SoundLocator.from_path(tmp_path / name)), name
    assert capfd.readouterr() == ("", "")


def outcome(locator):
    try:
        return load(locator, 0.0, 4.0).digest
    except AudioError as error:
        return error.reason, str(error)


def test_a_row_of_panns_is_the_wave_that_was_packed(tmp_path):
    """int16 samples go through the common decoding path as a wav in memory."""
    pytest.importorskip("h5py")
    wave_S = np.round(babble(10, 32_000) * 32767).astype(np.int16)
    path = write_panns(tmp_path / "eval.h5", {"Yabcdefghijk.wav": wave_S, "Ybcdefghijkl.wav": 0 * wave_S})
    filled, empty = locators_by_name(path).values()
    clip = load(filled, 30.0, 40.0)
    assert np.array_equal(clip.wave_S, wave_S / np.float32(2**15))
    assert (clip.rate_hz, clip.codec, clip.flags) == (32_000, "pcm_16", ())
    assert refusal(empty) == (
        "missing",
        "Ybcdefghijkl.wav: row 1 of eval.h5 holds zeros only: the clip was missing when packed",
    )


def test_a_row_of_passt_is_the_mp3_that_was_packed(files, tmp_path):
    """A row that was never filled is a missing clip."""
    pytest.importorskip("h5py")
    path = write_passt(tmp_path / "x.hdf5", {"sound.mp3": files["sound.mp3"].read_bytes(), "no.mp3": b""})
    filled, empty = locators_by_name(path).values()
    assert load(filled).digest == load(SoundLocator.from_path(files["sound.mp3"])).digest
    assert refusal(empty)[0] == "missing"


def test_a_row_of_parquet_without_bytes_is_missing(tmp_path):
    """Hugging Face writes null for a file that could not be fetched."""
    (locator,) = locators_by_name(write_parquet(tmp_path / "x.parquet", {"a.wav": None})).values()
    assert refusal(locator) == ("missing", "a.wav: row 0 of row group 0 of x.parquet holds no sound")


@pytest.mark.parametrize("suffix", ["tar", "parquet", "h5"])
def test_an_archive_that_changes_under_a_build_costs_its_clips(files, tmp_path, suffix):
    """A removed archive is missing, an overwritten one unreadable; neither ends the build with an exception."""
    if suffix == "h5":
        pytest.importorskip("h5py")
    make = {"tar": write_tar, "parquet": write_parquet, "h5": write_passt}[suffix]
    path = make(tmp_path / f"x.{suffix}", {"sound.mp3": files["sound.mp3"].read_bytes()})
    (locator,) = locators_by_name(path).values()
    path.write_bytes(b"<html>" * 20_000)
    assert refusal(locator)[0] == "unreadable"
    path.unlink()
    reason, text = refusal(locator)
    assert reason == "missing"
    assert str(tmp_path) not in text
    assert "\n" not in text


def test_a_member_of_gigabytes_is_not_loaded(tmp_path):
    """A segment of a day of sound in a tar takes no more memory than the segment needs."""
    wave_S = babble(2, RATE_HZ)
    day_bytes = 2 * RATE_HZ * 40_000
    head = bytearray(write(tmp_path / "a.wav", wave_S, RATE_HZ).read_bytes())
    struct.pack_into("<I", head, head.index(b"data") + 4, day_bytes)
    member = tarfile.TarInfo("a.wav")
    member.size = 44 + day_bytes
    with (tmp_path / "x.tar").open("wb") as file:  # sparse: 3.8 GB of nothing behind the sound
        file.write(member.tobuf() + head)
        file.truncate(512 + -(-member.size // 512) * 512 + 1024)
    (locator,) = locators_by_name(tmp_path / "x.tar").values()
    tracemalloc.start()
    clip = load(locator, 1.0, 2.0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (clip.source_seconds, clip.flags) == (40_000.0, ("cut",))
    np.testing.assert_allclose(clip.wave_S, wave_S[RATE_HZ:], atol=2**-15)
    assert peak_bytes < 2**23


def test_locators_are_small_and_can_be_pickled(packed, files):
    """A task of a thousand clips goes to a worker through a pipe."""
    for locator in (
        *packed["tar"].values(),
        *packed["parquet"].values(),
        SoundLocator.from_path(files["sound.wav"]),
    ):
        assert pickle.loads(pickle.dumps(locator)) == locator
        assert len(pickle.dumps(locator)) < 600


def test_sources_give_the_locators_of_some_rows_and_none_for_a_clip_without_sound():
    """Two million rows are columns; objects are made for a shard at a time."""
    rows = {
        "kind": ["file", None, "tar"],
        "path": ["a", None, "x.tar"],
        "source": ["a", None, "x.tar::m/b.wav"],
    }
    frame = pl.DataFrame(rows | {"offset": [None, None, 512], "size": [None, None, 9]})
    frame = frame.with_columns(group=None, row=None, exact=False).select(*SOURCES_SCHEMA).cast(SOURCES_SCHEMA)
    clip_sources = ClipSources(frame=frame)
    _, nowhere, member = clip_sources.locators_of_rows(range(0, 3))
    assert nowhere is None
    assert (member.kind, member.offset, member.size, member.name) == ("tar", 512, 9, "b.wav")
    assert len(clip_sources.locators_of_rows(range(1, 2))) == 1
