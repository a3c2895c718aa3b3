"""The table of embeddings: a row for every sound, resumed to the same bytes, searched by its own model alone."""

import shutil
import signal
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from forked import run_command, start_command
from sounds import babble, write
from tiny import tiny

import ajepa
from ajepa.cli import app
from ajepa.embed import nearest, table
from ajepa.embed.embedder import Embedder
from ajepa.embed.embedding_job import EmbeddingJob, make_embedding_job
from ajepa.embed.nearest import nearest_sounds
from ajepa.embed.table import summarise_table, write_embedding_table
from ajepa.pretrain.pretrain import pretrain
from pipeline.errors import STOP_SIGNALS, InputError, RunError, StoreError

RATE_HZ = 32_000


@pytest.fixture(scope="module")
def run_path(store_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return pretrain(store_path, tiny(), path, steps=2, device="cpu", say=lambda line: None).path


@pytest.fixture(scope="module")
def model(run_path) -> Embedder:
    return ajepa.load(run_path, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven sounds: nine good, loose and in a tar; a text, and one that was cut short."""
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(7):
        write(folder / f"{number}.wav", babble(0.5 + number, 16_000, seed=number), 16_000)
    (folder / "7.wav").write_text("no sound")
    cut = write(folder / "8.wav", babble(3, 16_000), 16_000)
    cut.write_bytes(cut.read_bytes()[:30_000])
    with tarfile.open(folder / "more.tar", "w") as tar:
        for name in ("a.flac", "b.mp3"):
            tar.add(write(folder / name, babble(2, 44_100), 44_100), arcname=name)
            (folder / name).unlink()
    return folder


def write_and_read(model, locations, out, **options) -> pl.DataFrame:
    job = make_embedding_job([str(location) for location in locations], model)
    write_embedding_table(model, job, out, say=lambda line: None, **options)
    return pl.read_parquet(out)


def test_every_sound_is_a_row_and_a_bad_one_says_why(model, folder, tmp_path):
    """Nothing is left out in silence; an unusable sound has a reason instead of a vector."""
    rows = write_and_read(model, [folder], tmp_path / "emb.parquet")
    assert rows.height == 11
    assert rows.schema["embedding"] == pl.Array(pl.Float32, model.width)
    bad = rows.filter(pl.col("embedding").is_null()).sort("path")
    assert bad["reason"].to_list() == ["unreadable", "truncated"]
    assert bad["detail"].str.contains(r"\.wav: ").all()
    assert bad["seconds"].is_null().all()
    assert rows.filter(pl.col("reason").is_not_null()).height == 2
    good = rows.filter(pl.col("path").str.ends_with("/3.wav"))
    expected = model.embed(folder / "3.wav")[0]
    np.testing.assert_allclose(good["embedding"].to_numpy()[0], expected.clip_D, atol=1e-5)
    assert good.item(0, "seconds") == pytest.approx(3.5)
    assert rows["path"].str.contains("more.tar::a.flac").sum() == 1


def test_a_summary_names_the_first_unusable_sounds_with_their_reasons(model, folder, tmp_path, monkeypatch):
    """No more than a few: the table has them all."""
    out = tmp_path / "emb.parquet"
    lines = []
    counts = write_embedding_table(model, make_embedding_job([str(folder)], model), out, say=lines.append)
    summary = summarise_table(out, counts, say=lines.append)
    assert summary == f"{out}: 9 of 11 sounds embedded; without: 1 truncated, 1 unreadable"
    assert [line.partition(" (")[0] for line in lines] == [
        f"without embedding: {folder / '7.wav'}: unreadable",
        f"without embedding: {folder / '8.wav'}: truncated",
    ]
    assert not any("(7.wav" in line or "(8.wav" in line for line in lines)
    monkeypatch.setattr(table, "FAILURES_SHOWN", 1)
    summarise_table(out, counts, say=lines.append)
    assert len(lines) == 3


def test_the_command_fails_in_one_line_where_no_sound_can_be_embedded(
    folder, run_path, tmp_path, monkeypatch, capsys
):
    """A script that goes on with an empty table would find out much later."""
    out = tmp_path / "emb.parquet"
    arguments = ["embed", folder / "7.wav", "--model", run_path, "--out", out, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["ajepa-train", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.raises(SystemExit) as stop:
        app.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert stop.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert f"none of 1 sounds could be embedded, the first is {folder / '7.wav'}: unreadable (" in line
    assert line.endswith("the table has every reason, delete it to try again")


def test_frames_come_with_their_times(model, folder, tmp_path):
    """One list a row, as long as the list of times; none for an unusable sound."""
    rows = write_and_read(model, [folder], tmp_path / "emb.parquet", frames=True)
    assert rows["frames"].list.len().to_list() == rows["frame_ms"].list.len().to_list()
    row = rows.filter(pl.col("path").str.ends_with("/5.wav"))
    expected = model.embed(folder / "5.wav")[0]
    np.testing.assert_allclose(np.array(row["frames"].to_list()[0]), expected.frames_TD, atol=1e-5)
    np.testing.assert_allclose(row["frame_ms"].to_list()[0], expected.times_ms_T)
    assert rows.filter(pl.col("reason").is_not_null())["frames"].list.len().to_list() == [0, 0]


@pytest.mark.parametrize("parts_before", [1, 3])
def test_a_table_that_was_interrupted_ends_with_the_same_bytes(
    model, folder, tmp_path, monkeypatch, parts_before
):
    """Written parts stay, the others are made again, and nobody can tell from the result."""
    monkeypatch.setattr(table, "PART_CLIPS", 3)
    write_and_read(model, [folder], tmp_path / "whole.parquet", workers=2)
    first_rows = []
    write_rows = table.EmbeddingTable.write_rows

    def write_or_die(table, first, rows, results):
        if len(first_rows) == parts_before:
            raise KeyboardInterrupt
        first_rows.append(first)
        write_rows(table, first, rows, results)

    out = tmp_path / "emb.parquet"
    with monkeypatch.context() as broken:
        broken.setattr(table.EmbeddingTable, "write_rows", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            write_and_read(model, [folder], out)
    assert not out.exists()
    lines = []
    counts = write_embedding_table(
        model, make_embedding_job([str(folder)], model), out, workers=0, say=lines.append
    )
    assert lines == [f"{out}: carrying on after {3 * parts_before} of 11 rows"]
    assert counts == {"good": 9, "unreadable": 1, "truncated": 1}
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emb.parquet", "whole.parquet"]


def test_paths_are_as_given_and_a_sound_given_twice_is_one_row(model, folder, tmp_path, monkeypatch, capsys):
    """A table moves with its sounds; the same sounds by other words are the same table."""
    shutil.copytree(folder, tmp_path / "sounds")
    monkeypatch.chdir(tmp_path)
    given = ["sounds/", "sounds/2.wav", str(tmp_path / "sounds" / "1.wav"), "./sounds/../sounds/more.tar"]
    rows = write_and_read(model, given, tmp_path / "emb.parquet")
    assert rows["path"].to_list() == [
        *(f"sounds/{number}.wav" for number in range(9)),
        *(f"sounds/more.tar::{name}" for name in ("a.flac", "b.mp3")),
    ]
    assert rows["clip_id"].equals(rows["path"].alias("clip_id"))
    lines = []
    for same in (["sounds"], [str(tmp_path / "sounds")], ["./sounds"]):
        write_embedding_table(
            model, make_embedding_job(same, model), tmp_path / "emb.parquet", say=lines.append
        )
    assert lines == [f"{tmp_path / 'emb.parquet'}: already complete, 11 rows"] * 3
    assert [row.path for row in make_embedding_job(["./sounds/3.wav"], model).rows] == ["./sounds/3.wav"]
    assert [row.path for row in make_embedding_job(["sounds/more.tar"], model).rows] == [
        "sounds/more.tar::a.flac",
        "sounds/more.tar::b.mp3",
    ]
    assert model.embed(Path("sounds")).names == tuple(rows["path"])


def test_a_table_is_carried_on_with_the_paths_it_was_begun_with(model, folder, tmp_path, monkeypatch):
    """Earlier versions wrote absolute paths; paths that differ in another way are refused in one line."""
    monkeypatch.setattr(table, "PART_CLIPS", 3)
    monkeypatch.chdir(folder.parent)
    whole = write_and_read(model, [folder], tmp_path / "whole.parquet")
    out = tmp_path / "emb.parquet"
    parts = tmp_path / "emb.parquet.partial"

    def begin(job):
        """Write the first part of a table, and no more."""
        with monkeypatch.context() as broken:
            broken.setattr(table.EmbeddingTable, "merge_parts", lambda table: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                write_embedding_table(model, job, out, say=lambda line: None)
        for part in sorted(parts.glob("*.parquet"))[1:]:
            part.unlink()

    # Begun with absolute paths, as earlier versions did, and carried on by a relative path.
    begin(make_embedding_job([str(folder)], model))
    assert write_and_read(model, [folder.name], out).equals(whole)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()

    # Begun by a relative path.
    out.unlink()
    begin(make_embedding_job([folder.name], model))
    with pytest.raises(
        RunError, match=rf"begun with paths such as {folder.name}/0.wav, which is {folder}/0.wav now"
    ):
        write_and_read(model, [folder], out)
    assert write_and_read(model, [folder.name], out)["path"][0] == f"{folder.name}/0.wav"


def test_a_table_moves_with_its_sounds(model, folder, tmp_path, monkeypatch):
    """The same relative command carries on in a copy of the whole folder; other sounds are told by their paths."""
    monkeypatch.setattr(table, "PART_CLIPS", 3)
    lines = []

    def embed(*given):
        job = make_embedding_job([str(location) for location in given], model)
        write_embedding_table(model, job, Path("vec/emb.parquet"), say=lines.append)

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copytree(folder, here / "sounds")
    monkeypatch.chdir(here)
    with monkeypatch.context() as broken:
        broken.setattr(table.EmbeddingTable, "merge_parts", lambda table: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed("./sounds")
    parts = sorted(Path("vec/emb.parquet.partial").glob("*.parquet"))
    parts[-1].unlink()
    shutil.copytree(here, there)
    embed("./sounds")

    # Interrupted and moved it ends with the bytes that it has where it was begun; moved again, it is complete.
    monkeypatch.chdir(there)
    embed("sounds")
    assert lines == ["vec/emb.parquet: carrying on after 9 of 11 rows"] * 2
    assert (there / "vec/emb.parquet").read_bytes() == (here / "vec/emb.parquet").read_bytes()
    assert pl.read_parquet("vec/emb.parquet")["path"].str.starts_with("./sounds/").all()
    shutil.copytree(there, tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path / "far" / "away")
    for given in ("sounds", "./sounds", "sounds//"):
        embed(given)
    assert lines[2:] == ["vec/emb.parquet: already complete, 11 rows"] * 3

    # Of other sounds the first path that differs is told.
    Path("sounds/3.wav").rename("sounds/30.wav")
    with pytest.raises(
        RunError,
        match=r"\(other sounds: the first that differs was \./sounds/3\.wav, is sounds/30\.wav now\)",
    ):
        embed("sounds")

    # Another folder's sounds of the same names are others where the table has not moved with them.
    monkeypatch.chdir(there)
    job = make_embedding_job(["sounds"], model)
    with pytest.raises(RunError, match="other sounds: the same paths, in another folder than then"):
        write_embedding_table(model, job, here / "vec/emb.parquet")


def test_tables_of_before_are_complete_with_the_same_sounds_in_other_words(
    model, folder, tmp_path, monkeypatch
):
    """They know absolute paths alone."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(EmbeddingJob, "identity_for", lambda job, table: job.source_identity)
    out = tmp_path / "emb.parquet"
    write_and_read(model, [folder.name], out)
    assert "given" not in table.read_table_plan(out)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    for given in (".", folder):
        lines = []
        write_embedding_table(model, make_embedding_job([str(given)], model), out, say=lines.append)
        assert lines == [f"{out}: already complete, 11 rows"]


def test_a_long_sound_ends_a_part(model, tmp_path, monkeypatch):
    """Memory follows a part: hours are written sooner than as many short sounds."""
    monkeypatch.setattr(table, "PART_FRAMES", 250)
    for number, seconds in enumerate((1.0, 2.0, 1.0, 4.0, 0.5)):
        write(tmp_path / f"{number}.wav", babble(seconds, 16_000), 16_000)
    parts = []
    write_rows = table.EmbeddingTable.write_rows

    def write_and_count(table, first, rows, results):
        parts.append(len(rows))
        write_rows(table, first, rows, results)

    monkeypatch.setattr(table.EmbeddingTable, "write_rows", write_and_count)
    assert write_and_read(model, [tmp_path], tmp_path / "emb.parquet").height == 5
    assert parts == [2, 2, 1]


def test_a_table_is_not_carried_on_as_another(model, run_path, folder, store_path, tmp_path):
    """Another model, pooling or set of sounds: named, and nothing is touched."""
    out = tmp_path / "emb.parquet"
    before = write_and_read(model, [folder], out)
    other = ajepa.load(run_path, device="cpu", pooling="frequency")
    with pytest.raises(RunError, match="pooling: was moments, now frequency"):
        write_and_read(other, [folder], out)
    with pytest.raises(RunError, match=r"other embeddings \(other sounds: 11 then, 1 now\); delete it"):
        write_and_read(model, [folder / "0.wav"], out)
    with pytest.raises(RunError, match=r"\(sounds: was files, now a store\); delete it"):
        write_and_read(model, [store_path], out)
    lines = []
    write_embedding_table(model, make_embedding_job([str(folder)], model), out, say=lines.append)
    assert lines == [f"{out}: already complete, 11 rows"]
    assert pl.read_parquet(out).equals(before)
    with pytest.raises(InputError, match="no such file or folder"):
        make_embedding_job([str(folder / "9.wav")], model)
    with pytest.raises(InputError, match="is a store; embed each store in a command of its own"):
        make_embedding_job([str(store_path), str(folder)], model)


def test_a_table_has_one_writer(model, folder, tmp_path):
    """Two would write the same parts; the second learns which process has the table, and the first goes on unharmed."""
    out = tmp_path / "new" / "emb.parquet"
    lines = []

    def second_writer(number):
        if number == 5:
            with pytest.raises(
                StoreError, match=r"emb\.parquet is being written by process \d+ on .*; wait for it"
            ):
                write_embedding_table(model, job, out, say=lines.append)
            lines.append("refused")
        return job.row_opener(number)

    job = make_embedding_job([str(folder)], model)
    disturbed_job = replace(job, row_opener=second_writer)
    counts = write_embedding_table(model, disturbed_job, out, say=lines.append, workers=0)
    assert lines == ["refused"]
    assert counts["good"] == 9
    assert [path.name for path in out.parent.iterdir()] == ["emb.parquet"]


def test_a_table_killed_at_its_very_end_leaves_nothing_behind(model, folder, tmp_path):
    """Between its last two steps the table is whole and its parts are still there."""
    out = tmp_path / "emb.parquet"
    write_and_read(model, [folder], out)
    (tmp_path / "emb.parquet.partial").mkdir()
    write_and_read(model, [folder], out)
    assert [path.name for path in tmp_path.iterdir()] == ["emb.parquet"]


def flip_last_value(path):
    """Change a byte of the last page of a Parquet file, ahead of its footer."""
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[-footer - 1] ^= 1
    path.write_bytes(content)


def test_a_damaged_table_or_part_is_one_line(model, folder, tmp_path, monkeypatch):
    """With the file and the next step; a damaged part is not copied into the table with a new checksum."""
    out = tmp_path / "emb.parquet"
    write_and_read(model, [folder], out)
    flip_last_value(out)
    with pytest.raises(RunError, match=r"emb\.parquet: cannot be read \(.*\); delete it and embed again"):
        list(table.table_batches(out, ("labels",), 100))
    out.write_bytes(b"PAR1")
    with pytest.raises(
        RunError, match=r"emb\.parquet: cannot be read \(.*\); make it with `ajepa-train embed`"
    ):
        table.read_table_plan(out)
    with pytest.raises(RunError, match=r"absent\.parquet: cannot be read \(missing\)"):
        table.read_table_plan(tmp_path / "absent.parquet")

    # The first part is damaged before the parts are merged.
    out.unlink()
    merge_parts = table.EmbeddingTable.merge_parts

    def merge_damaged_parts(whole):
        flip_last_value(whole.parts_folder / f"{0:010d}.parquet")
        merge_parts(whole)

    monkeypatch.setattr(table.EmbeddingTable, "merge_parts", merge_damaged_parts)
    with pytest.raises(
        RunError, match=r"0000000000\.parquet: cannot be read \(.*\); delete .*emb\.parquet\.partial"
    ):
        write_and_read(model, [folder], out)
    assert not out.exists()


def test_a_stores_clips_bring_their_ids_and_labels(model, store, store_path, tmp_path):
    """Its good clips, in their order, without decoding a sound."""
    rows = write_and_read(model, [store_path], tmp_path / "emb.parquet")
    good_N = store.good_rows()
    assert rows["clip_id"].to_list() == store.manifest["clip_id"][good_N].to_list()
    labels_BC = store.labels_BC(good_N)
    assert [len(names) for names in rows["labels"]] == labels_BC.sum(1).astype(int).tolist()
    (first,) = model.iterate_embeddings([model.row_opener(store, int(good_N[0]))])
    np.testing.assert_allclose(rows["embedding"].to_numpy()[0], first.clip_D, atol=1e-5)


def test_the_nearest_sound_is_the_sound_itself_and_then_similar_ones(
    model, folder, run_path, tmp_path, monkeypatch, capsys
):
    """Cosine over the table, best first; labels and seconds come along. A line says that the query is in the table."""
    index = tmp_path / "emb.parquet"
    write_and_read(model, [folder], index)
    found = nearest_sounds(folder / "2.wav", index, run_path, count=4, device="cpu")
    assert found[0].path == str(folder / "2.wav")
    assert found[0].similarity == pytest.approx(1.0, abs=1e-4)
    said = capsys.readouterr().err
    assert said == f"{folder / '2.wav'}: is in the table itself; its own row is among those listed\n"
    monkeypatch.chdir(folder.parent)
    relative = tmp_path / "relative.parquet"
    write_and_read(model, [folder.name], relative)
    assert (
        nearest_sounds(folder / "2.wav", relative, run_path, device="cpu")[0].path == f"{folder.name}/2.wav"
    )
    assert "is in the table itself" in capsys.readouterr().err
    similarities = [sound.similarity for sound in found]
    assert similarities == sorted(similarities, reverse=True)
    assert len(nearest_sounds(folder / "2.wav", index, run_path, count=100, device="cpu")) == 9


def test_a_query_that_is_not_in_the_table_is_not_said_to_be(model, folder, run_path, tmp_path, capsys):
    """Its neighbours alone, without a line."""
    index = tmp_path / "emb.parquet"
    write_and_read(model, [folder / "1.wav", folder / "2.wav"], index)
    assert len(nearest_sounds(folder / "3.wav", index, run_path, device="cpu")) == 2
    assert not capsys.readouterr().err


def test_the_copy_of_a_table_is_answered_with_the_table(run_path, folder, tmp_path):
    """CSV and JSON lines lie beside the Parquet table that is searched."""
    for suffix in (".csv", ".jsonl"):
        copy = tmp_path / f"emb{suffix}"
        copy.touch()
        message = r"`nearest` reads the Parquet table beside it, not its copy; embed again with --out .*emb\.parquet"
        with pytest.raises(RunError, match=message):
            nearest_sounds(folder / "2.wav", copy, run_path)
    (tmp_path / "emb.parquet").touch()
    with pytest.raises(RunError, match=r"not its copy; give .*emb\.parquet"):
        nearest_sounds(folder / "2.wav", copy, run_path)


def test_moments_of_several_layers_fill_a_table_and_are_searched(folder, run_path, tmp_path):
    """The table says how its vectors were made; its frames are narrower than its clips."""
    index = tmp_path / "emb.parquet"
    model = ajepa.load(run_path, at="init", device="cpu", pooling="moments", layer="concat-all")
    rows = write_and_read(model, [folder], index, frames=True)
    assert rows.schema["embedding"] == pl.Array(pl.Float32, model.width)
    assert rows.schema["frames"] == pl.List(pl.Array(pl.Float32, model.frame_width))
    found = nearest_sounds(folder / "2.wav", index, run_path, count=4, device="cpu", at="init")
    assert found[0].path == str(folder / "2.wav")
    assert found[0].similarity == pytest.approx(1.0, abs=1e-4)


def test_an_index_is_searched_by_the_model_that_made_it(model, folder, store_path, tmp_path):
    """Vectors of two models have nothing to do with each other, and would be compared all the same."""
    index = tmp_path / "emb.parquet"
    write_and_read(model, [folder], index)
    other = pretrain(store_path, tiny(seed=1), tmp_path / "run", steps=1, device="cpu", say=lambda line: None)
    with pytest.raises(
        RunError, match=f"was made by model {model.pretrained.model_id} .*; give the table's model"
    ):
        nearest_sounds(folder / "2.wav", index, other.path)
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(RunError, match="no table of embeddings"):
        nearest_sounds(folder / "2.wav", tmp_path / "a.parquet", other.path)


def test_the_commands_embed_stop_carry_on_and_search(folder, run_path, tmp_path):
    """As a user types them; SIGTERM in the middle costs nothing."""
    out = tmp_path / "emb.parquet"
    words = ["embed", str(folder), "--model", str(run_path), "--out", str(out), "--device", "cpu"]
    stopped = start_command(*words, folder=tmp_path, output=tmp_path / "stopped")
    for _ in range(600):
        if (tmp_path / "emb.parquet.partial").exists() or not stopped.is_alive():
            break
        time.sleep(0.05)
    stopped.terminate()
    stopped.join()
    assert stopped.exitcode in (0, 75)
    done = run_command(*words, folder=tmp_path)
    assert not done.returncode, done.stderr
    assert done.stdout.strip().endswith("9 of 11 sounds embedded; without: 1 truncated, 1 unreadable")
    assert f"without embedding: {folder / '7.wav'}: unreadable (" in done.stderr

    # Step 2 is the last one of the run.
    search = ["nearest", str(folder / "1.wav"), "--index", str(out), "--model", str(run_path), "--top", "3"]
    found = run_command(*search, "--checkpoint", "2", folder=tmp_path)
    assert not found.returncode, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[-1] == str(folder / "1.wav")
    assert signal.SIGTERM in STOP_SIGNALS


def test_wide_vectors_are_read_and_written_in_smaller_parts(folder, run_path, tmp_path, monkeypatch):
    """All layers side by side are thousands of numbers a sound, and half as many a column: memory stays bounded."""
    model = ajepa.load(run_path, device="cpu", pooling="moments", layer="concat-all")
    whole = write_and_read(model, [folder], tmp_path / "whole.parquet", frames=True)
    monkeypatch.setattr(nearest, "VALUES_PER_READ", 2 * model.width)
    monkeypatch.setattr(table, "PART_VALUES", 3 * model.frame_width)
    parts = []
    write_rows = table.EmbeddingTable.write_rows
    monkeypatch.setattr(
        table.EmbeddingTable,
        "write_rows",
        lambda self, first, rows, results: (parts.append(len(rows)), write_rows(self, first, rows, results)),
    )
    small = write_and_read(model, [folder], tmp_path / "small.parquet", frames=True)
    assert small.height == whole.height == sum(parts)
    assert max(parts) < small.height

    # Two rows at a time find the same neighbours.
    assert nearest.rows_per_read(model.width) == 2
    found = nearest_sounds(folder / "2.wav", tmp_path / "small.parquet", run_path, count=4, device="cpu")
    assert found[0].path == str(folder / "2.wav")
