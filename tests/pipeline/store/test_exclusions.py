"""Exclude lists: the clips that they name are never drawn, and all reports on the store mention them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from command_line import run
from corpus import clip_id
from stores import assert_same_bytes, build

from ajepa.pretrain.training_set import TrainingSet
from ajepa.training.run import Run
from ajepa.training.run_identity import RunIdentity
from pipeline.audit.audit import AuditedClips, audit_clips
from pipeline.audit.command import record_exclude_lists, suggest_exclude_list
from pipeline.audit.findings import collect_findings
from pipeline.build.repair import repair_store
from pipeline.build.verify import find_faults
from pipeline.errors import InputError, RunError, StoreError
from pipeline.report.describe import describe_rows, describe_store
from pipeline.report.store_page import render_store_page
from pipeline.store.exclusions import EXCLUSIONS_FILE, ExcludeList, Exclusions
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import coverage_table
from pipeline.tables import read_table, write_table

TRAIN, EVAL = clip_id(2), clip_id(40)


@pytest.fixture
def copy(store_path, tmp_path):
    return shutil.copytree(store_path, tmp_path / "copy.zarr")


@pytest.fixture
def a_list(tmp_path):
    """An exclude list of two good clips and a failed one."""
    path = tmp_path / "noisy.txt"
    path.write_text(f"# heard\n{TRAIN}  # a hum\n\n{clip_id(5)}\n{EVAL} #clipped\n")
    return path


def manifest_of(*ids: str) -> pl.DataFrame:
    return pl.DataFrame(
        {"clip_id": ids, "split": ["train", "eval"] * (len(ids) // 2) + ["train"] * (len(ids) % 2)}
    )


def identity_of(store: FeatureStore) -> RunIdentity:
    return TrainingSet(stores=(store.path,)).data_identity(store)


# reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found", "unknown"),
    [
        ("a\nb\n", ["a", "b"], []),
        ("\ufeffa\r\nb", ["a", "b"], []),
        ("  a  \n\n# b\nc # b\n", ["a", "c"], []),
        ("a#1\nb #1\n", ["a#1", "b"], []),
        ("a #x\n", ["a #x"], []),  # an id of the store, so no comment
        ("a\na # again\nz # not there\n", ["a"], ["z"]),
        ("-x\n", ["-x"], []),
    ],
)
def test_a_text_is_one_id_a_line(tmp_path, text, found, unknown):
    """Ids may be any file names; a line that is an id of the store is never cut at `#`."""
    (path := tmp_path / "list.txt").write_bytes(text.encode())
    manifest = manifest_of("a", "b", "c", "-x", "a#1", *(["a #x"] if text == "a #x\n" else []))
    frame, missing = ExcludeList.read(path).match_clips(manifest)
    assert (sorted(frame["clip_id"]), missing) == (sorted(found), unknown)
    assert frame["split"].null_count() == frame.height


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_may_name_the_split(tmp_path, suffix):
    """If an id is in two splits, the list may exclude only one of them."""
    frame = pl.DataFrame(
        {"note": ["x", "y", "z"], "clip_id": ["a", "b", "c"], "split": ["eval", None, "eval"]}
    )
    path = tmp_path / f"list.{suffix}"
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    manifest = pl.DataFrame(
        {"clip_id": ["a", "a", "b", "b", "c"], "split": ["train", "eval", "train", "eval", "train"]}
    )
    read = ExcludeList.read(path)
    found, unknown = read.match_clips(manifest)
    assert unknown == ["c"]
    assert Exclusions(frame=found).excluded_mask_N(manifest).tolist() == [False, True, True, True, False]
    assert (read.name, len(read.sha256)) == (path.name, 64)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, r"not a readable exclude list \(No such file or directory\)"),
        ("a.CSV", b"ytid,why\nx,y\n", "no column clip_id, it has ytid, why"),
        ("a.txt", b"\xff\xfe\x00", "not a readable exclude list"),
        ("a.csv", b"ytid,why\nx,y\n", "no column clip_id, it has ytid, why"),
        ("a.parquet", b"PAR1", "not a readable exclude list"),
        ("a.txt", b"# nothing\n", "names no clip; to remove the recorded lists, give --no-exclude"),
        ("a.csv", b"clip_id\n", "names no clip"),
    ],
)
def test_a_file_that_is_no_list_is_refused_in_one_line(tmp_path, name, content, said):
    """The line says what, where and what was expected."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        ExcludeList.read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_table_written_by_a_spreadsheet_is_read(tmp_path):
    """Byte order mark, Windows line ends, blanks about the names of columns, a suffix in capitals."""
    (path := tmp_path / "LIST.CSV").write_bytes("\ufeffclip_id, split\r\na,eval\r\nb,\r\n".encode())
    found, unknown = ExcludeList.read(path).match_clips(manifest_of("b", "a"))
    assert (found.select("clip_id", "split").rows(), unknown) == ([("a", "eval"), ("b", None)], [])


# recording -------------------------------------------------------------------------------------------------------


def test_excluded_clips_are_not_drawn_and_all_others_are(copy, store, a_list):
    """This holds for any list of splits; failed clips are never drawn either."""
    (done,) = record_exclude_lists(FeatureStore.open(copy), [a_list])
    assert str(done) == "noisy.txt: 3 clips excluded"
    after = FeatureStore.open(copy)
    gone = set(store.good_rows()) - set(after.good_rows())
    assert {after.manifest["clip_id"][int(row)] for row in gone} == {TRAIN, EVAL}
    assert len(store.good_rows(["eval"])) - len(after.good_rows(["eval"])) == 1
    assert set(after.good_rows()) <= set(store.good_rows())


def test_a_list_replaces_the_one_before_and_none_takes_all_back(copy, a_list, tmp_path):
    """Only the last recorded lists are valid."""
    everything = FeatureStore.open(copy).good_rows().tolist()
    record_exclude_lists(FeatureStore.open(copy), [a_list])
    (other := tmp_path / "other.txt").write_text(clip_id(7))
    record_exclude_lists(FeatureStore.open(copy), [other])
    assert set(everything) - set(FeatureStore.open(copy).good_rows().tolist()) == {7}
    record_exclude_lists(FeatureStore.open(copy), [])
    store = FeatureStore.open(copy)
    assert store.good_rows().tolist() == everything
    assert (store.exclusions.digest, store.exclusions.summarise_lists()) == (None, [])


def test_the_digest_is_of_the_clips_and_not_of_how_they_were_listed(copy, a_list, tmp_path):
    """A run can be resumed with other lists if they exclude the same clips."""
    record_exclude_lists(FeatureStore.open(copy), [a_list])
    one = FeatureStore.open(copy).exclusions.digest
    (first := tmp_path / "b.txt").write_text(f"{EVAL}\n{clip_id(5)}\n")
    (second := tmp_path / "a.txt").write_text(f"{TRAIN}\n{EVAL}\n")
    record_exclude_lists(FeatureStore.open(copy), [first, second])
    assert FeatureStore.open(copy).exclusions.digest == one
    record_exclude_lists(FeatureStore.open(copy), [first])
    assert FeatureStore.open(copy).exclusions.digest not in (one, None)


def test_unknown_ids_are_reported_and_refused_only_where_none_is_known(copy, tmp_path):
    """A list for all of AudioSet serves a subset; one for another set is a mistake."""
    (path := tmp_path / "x.txt").write_text(f"{TRAIN}\nclip_00004\nnowhere\n")
    (done,) = record_exclude_lists(FeatureStore.open(copy), [path])
    assert (done.clip_count, done.unknown_count) == (1, 2)
    assert "2 ids are not in the store, such as 'clip_00004'; did you mean" in str(done)
    before = (copy / EXCLUSIONS_FILE).read_bytes()
    path.write_text("clip_0000xx\nnowhere\n")
    with pytest.raises(
        InputError, match=r"names no clip of .*: 2 not there, such as 'clip_0000xx'; did you mean 'clip_0000"
    ):
        record_exclude_lists(FeatureStore.open(copy), [path])
    assert (copy / EXCLUSIONS_FILE).read_bytes() == before


def test_a_build_and_a_repair_keep_the_lists(copy, corpus, a_list):
    """Building the store again must not add excluded clips again."""
    record_exclude_lists(FeatureStore.open(copy), [a_list])
    before, rows = (copy / EXCLUSIONS_FILE).read_bytes(), FeatureStore.open(copy).good_rows().tolist()
    build(corpus, copy)
    (copy / "stats.json").unlink()
    repair_store(copy, list(find_faults(copy)), workers=0)
    assert (copy / EXCLUSIONS_FILE).read_bytes() == before
    assert list(find_faults(copy)) == []
    assert FeatureStore.open(copy).good_rows().tolist() == rows


def other_clip(path):
    frame, metadata = read_table(path)
    write_table(path, frame.with_columns(clip_id=pl.lit("clip_000001")), metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"PAR1"),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        other_clip,
        lambda path: pq.write_table(pq.read_table(path).drop_columns("split"), path),
    ],
)
def test_damage_is_a_fault_with_its_remedy_and_nothing_is_drawn(copy, a_list, damage):
    """An excluded clip must not be drawn again without a message."""
    record_exclude_lists(FeatureStore.open(copy), [a_list])
    damage(copy / EXCLUSIONS_FILE)
    (fault,) = find_faults(copy)
    assert (
        "excluded.parquet: not as written; record the lists again with: ajepa-data audit-labels" in fault.text
    )
    with pytest.raises(StoreError, match="--no-exclude"):
        FeatureStore.open(copy).good_rows()
    record_exclude_lists(FeatureStore.open(copy), [a_list])
    assert list(find_faults(copy)) == []


def test_a_flipped_byte_changes_nothing_unseen(copy, a_list):
    """The byte may be anywhere in the file, including the footer."""
    record_exclude_lists(FeatureStore.open(copy), [a_list])
    path, rng = copy / EXCLUSIONS_FILE, np.random.default_rng(0)
    whole, frame = path.read_bytes(), FeatureStore.open(copy).exclusions.frame
    found = 0
    for place in rng.integers(0, len(whole), 40):
        content = bytearray(whole)
        content[place] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        try:
            assert FeatureStore.open(copy).exclusions.frame.equals(frame)
        except StoreError:
            found += 1
    assert found


def test_a_run_with_other_lists_is_refused_with_the_difference(copy, store_path, a_list, tmp_path):
    """A run without lists is not affected."""
    plain = identity_of(FeatureStore.open(store_path))
    assert plain.excluded is None
    record_exclude_lists(FeatureStore.open(copy), [a_list])
    listed = identity_of(FeatureStore.open(copy))
    assert listed == replace(plain, excluded=FeatureStore.open(copy).exclusions.digest)
    Run.create_or_open(tmp_path / "run", recipe={}, identity=plain)
    with pytest.raises(RunError, match=r"identity.excluded: was absent, now [0-9a-f]{12}"):
        Run.create_or_open(tmp_path / "run", recipe={}, identity=listed)
    record_exclude_lists(FeatureStore.open(copy), [])
    Run.create_or_open(tmp_path / "run", recipe={}, identity=identity_of(FeatureStore.open(copy)))


def test_coverage_page_and_inspection_mention_excluded_clips(copy, store, a_list):
    """A user who misses a clip finds the list that excludes it."""
    assert "excluded" not in coverage_table(
        store.manifest, store.exclusions.excluded_mask_N(store.manifest)
    ) + describe_store(store)
    assert "exclude lists" not in render_store_page(store, clip_count=1)
    record_exclude_lists(FeatureStore.open(copy), [a_list])
    store = FeatureStore.open(copy)
    lines = coverage_table(store.manifest, store.exclusions.excluded_mask_N(store.manifest)).splitlines()
    assert [line.split()[-2:] for line in lines if "excluded by a list" in line] == [["1", "1"]]
    assert "3 clips by noisy.txt (sha256 " in describe_store(store)
    assert "excluded" in describe_rows(store, [2])
    assert "by noisy.txt" in describe_rows(store, [2])
    assert "excluded" not in describe_rows(store, [3])
    assert (
        "Good clips that loaders skip because of exclude lists: 2 (3 clips by noisy.txt)."
        in render_store_page(store, clip_count=1)
    )


def test_the_page_of_a_store_of_which_all_is_excluded_says_so(copy, tmp_path):
    """The page must name the lists, and not fail because there is no clip to draw."""
    path = tmp_path / "all.csv"
    FeatureStore.open(copy).manifest.select("clip_id").write_csv(path)
    record_exclude_lists(FeatureStore.open(copy), [path])
    assert "Every good clip is excluded, so there is nothing to show." in render_store_page(
        FeatureStore.open(copy)
    )
    found = collect_findings(audit_clips(AuditedClips.of_store(FeatureStore.open(copy))), "x")
    assert not [f for f in found if "pre-training only" in f.what]


def test_an_id_of_another_split_is_reported_with_that_split(copy, tmp_path):
    """Suggesting the same id would not help."""
    path = tmp_path / "a.csv"
    path.write_text(f"clip_id,split\n{TRAIN},eval\n")
    with pytest.raises(InputError, match=f"1 not there, such as '{TRAIN}', which is in a_train only"):
        record_exclude_lists(FeatureStore.open(copy), [path])
    path.write_text(f"clip_id,split\n{TRAIN},eval\n{EVAL},eval\n")
    (done,) = record_exclude_lists(FeatureStore.open(copy), [path])
    said = f"1 clip excluded, 1 id is not in the store, such as '{TRAIN}', which is in a_train only"
    assert str(done) == f"a.csv: {said}"


# suggesting ------------------------------------------------------------------------------------------------------


def with_leaks(copy, **ids):
    """The clips of the store, with the audio of two eval clips in train."""
    frame, metadata = read_table(copy / "manifest.parquet")
    digests = frame["digest"].to_list()
    digests[2], digests[7] = digests[40], digests[41]
    write_table(copy / "manifest.parquet", frame.with_columns(digest=pl.Series(digests), **ids), metadata)
    return AuditedClips.of_store(FeatureStore.open(copy))


@pytest.mark.parametrize("name", ["leaks.txt", "new/leaks.csv"])
def test_a_suggested_list_mends_the_leaks_and_keeps_eval(copy, tmp_path, name):
    """Once the list is recorded, no leak is left."""
    rows = with_leaks(copy)
    assert [c.leak for c in audit_clips(rows).copies] == [True]
    assert suggest_exclude_list(rows, tmp_path / name) == 2
    text = (tmp_path / name).read_text()
    assert f"has the exact audio of {clip_id(40)} in eval" in text
    before, after = FeatureStore.open(copy).good_rows(), FeatureStore.open(copy)
    record_exclude_lists(FeatureStore.open(copy), [tmp_path / name])
    assert set(before) - set(after.good_rows()) == {2, 7}  # row 40 and 41 of eval stay
    rows = AuditedClips.of_store(after)
    assert audit_clips(rows).copies == ()
    assert suggest_exclude_list(rows, tmp_path / "more.txt") == 0
    assert not (tmp_path / "more.txt").exists()


def test_ids_that_a_text_cannot_hold_are_asked_for_as_csv(copy, tmp_path):
    """`loop #3` would come back as `loop`."""
    rows = with_leaks(copy, clip_id=pl.col("clip_id") + " #3")
    with pytest.raises(InputError, match=r"a text cannot name 'clip_000002 #3' alone; .* \.csv"):
        suggest_exclude_list(rows, tmp_path / "leaks.txt")
    assert suggest_exclude_list(rows, tmp_path / "leaks.csv") == 2
    frame, unknown = ExcludeList.read(tmp_path / "leaks.csv").match_clips(rows.manifest)
    assert (frame["clip_id"].to_list(), unknown) == (["clip_000002 #3", "clip_000007 #3"], [])


def test_one_id_in_two_splits_is_suggested_for_one_of_them(copy, tmp_path):
    """A text file would also exclude the eval row."""
    frame, metadata = read_table(copy / "manifest.parquet")
    ids = frame["clip_id"].to_list()
    ids[2] = ids[40]
    write_table(copy / "manifest.parquet", frame.with_columns(clip_id=pl.Series(ids)), metadata)
    rows = AuditedClips.of_store(FeatureStore.open(copy))
    with pytest.raises(InputError, match="csv"):
        suggest_exclude_list(rows, tmp_path / "leaks.txt")
    assert suggest_exclude_list(rows, tmp_path / "leaks.csv") == 1
    record_exclude_lists(FeatureStore.open(copy), [tmp_path / "leaks.csv"])
    store = FeatureStore.open(copy)
    assert (2 in store.good_rows(), 40 in store.good_rows()) == (False, True)


def test_nothing_is_suggested_where_no_split_is_held_out(copy, tmp_path):
    """Folds are evaluated in turn; the user may name one as held out."""
    rows = AuditedClips.of_store(FeatureStore.open(copy), ["a_train", "eval"])
    with pytest.raises(InputError, match=r"every split is held out, so nothing can leak; .* --eval SPLIT"):
        suggest_exclude_list(rows, tmp_path / "x.txt")
    with pytest.raises(StoreError, match=r"no split 'dev'; did you mean .*It has: a_train, eval"):
        AuditedClips.of_store(FeatureStore.open(copy), ["dev"])


# the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_writes_and_records(copy, tmp_path, monkeypatch, capsys, store_path):
    """The steps of a user: audit, write the list, record it, remove it."""
    with_leaks(copy)
    command = ["audit-labels", copy]
    assert (
        run(
            *command,
            "--suggest",
            tmp_path / "leaks.txt",
            "--json",
            tmp_path / "a.json",
            monkeypatch=monkeypatch,
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "leak   2 clips of a_train with the exact audio of 2 clips of eval" in said
    assert f"ajepa-data audit-labels {copy} --exclude {tmp_path / 'leaks.txt'}" in said
    assert json.loads((tmp_path / "a.json").read_text())["findings"][0]["level"] == "leak"
    assert run(*command, "--exclude", tmp_path / "leaks.txt", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "leaks.txt: 2 clips excluded" in said
    assert "0 leaks" in said
    assert run(*command, "--suggest", tmp_path / "more.txt", monkeypatch=monkeypatch) == 0
    assert "more.txt: not written" in capsys.readouterr().out
    assert run(*command, "--no-exclude", monkeypatch=monkeypatch) == 0
    assert "1 leak" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--exclude", "x.txt", "--no-exclude"], "give only one of them"),
        (["--exclude", "nowhere.txt"], "nowhere.txt: not a readable exclude list"),
        (["--eval", "dev"], "no split 'dev'"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(copy, store_path, monkeypatch, capsys, more, said):
    """The exit status is 1."""
    assert run("audit-labels", copy, *more, monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert_same_bytes(copy, store_path)
