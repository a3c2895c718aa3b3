"""A newcomer's first hour with own sounds, by the commands alone: every one of them ends in what was wanted."""

import sys

import numpy as np
import polars as pl
import pytest
from sounds import write

import ajepa.cli.app
import pipeline.cli.app

RATE_HZ = 16_000

PROGRAMS = {"ajepa-data": pipeline.cli.app.main, "ajepa-train": ajepa.cli.app.main}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a line in this process; what it printed, and its status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)

    def run_line(line: str, status: int = 0) -> str:
        words = line.split()
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            PROGRAMS[words[0]]()
        said = capsys.readouterr()
        assert (stop.value.code or 0) == status, said.err
        return said.out + said.err

    return run_line


def write_sounds(folder) -> None:
    """Thirty sounds of 3 s, low and high, and a table that names all but one of them."""
    rng = np.random.default_rng(0)
    (folder / "sounds").mkdir()
    lines = ["path,label"]
    for number in range(30):
        label, hz = (("low", 300.0), ("high", 3_000.0))[number % 2]
        wave_S = 0.2 * np.sin(2 * np.pi * hz * rng.uniform(0.8, 1.2) * np.arange(3 * RATE_HZ) / RATE_HZ)
        wave_S += 0.02 * rng.standard_normal(len(wave_S))
        write(folder / "sounds" / f"{number}.wav", wave_S.astype(np.float32), RATE_HZ)
        lines.append(f"{number}.wav,{label}")
    (folder / "labels.csv").write_text("\n".join(lines[:-1]) + "\n")


SMALL = (
    "--device cpu --set model.encoder.width=32 --set model.encoder.depth=1 --set model.predictor.width=16 "
    "--set clips_per_step=8 --set probe_every=0"
)


def test_from_a_folder_of_sounds_to_their_classes(run, tmp_path):
    """As the README tells it: build, pre-train, evaluate, fine-tune, predict; nothing has to be built twice."""
    write_sounds(tmp_path)
    said = run(
        "ajepa-data build-folder --folder sounds --table labels.csv --clip-seconds 2.6 --out mine.zarr --workers 0"
    )
    assert "1 sound of the folder is in no row of the table and left out, such as 29.wav" in said
    assert "no split to measure on: evaluate cross-validates over the sounds, finetune needs one" in said
    assert (
        "29 sounds are longer than 2.6 s: 11.6 s are left out; --clip-seconds 2.6 --hop-seconds 2.6" in said
    )

    # A store whose clips are as long as a view is trained on, and measured without a split.
    run(f"ajepa-train pretrain --store mine.zarr --recipe smoke --steps 2 --run runs/a {SMALL}")
    said = run("ajepa-train evaluate --store mine.zarr --run runs/a --probe knn")
    assert "probes are cross-validated over 5 folds of its sounds" in said
    assert "29 eval clips of mine.zarr, mean over 5 folds; run at step 2" in said
    said = run("ajepa-train finetune --store mine.zarr --task own --from runs/a --run runs/b", 1)
    assert (
        "no split to evaluate on, none of train is named eval, test or val; build it with --holdout 0.2"
        in said
    )

    # With a fifth held out it is fine-tuned, by the recipe that fits, and answers.
    build = "ajepa-data build-folder --folder sounds --table labels.csv --clip-seconds 2.6 --workers 0"
    said = run(f"{build} --holdout 0.2 --out held.zarr")
    assert "eval: 6 of 29 clips, by file" in said
    finetune = "ajepa-train finetune --store held.zarr --task own --from runs/a --run runs/b --device cpu"
    said = run(f"{finetune} --batch 8 --set steps=40 --set evaluations=1 --set head=random --set ema=0.9")
    assert "recipe own-small: the encoder is 32 wide, own is for 384 and more; views of 2.6 s" in said
    assert "6 eval clips of held.zarr" in said
    said = run("ajepa-train predict sounds --model runs/b --out classes.csv --top 1")
    assert "classes.csv: predictions of 30 of 30 sounds" in said
    found = pl.read_csv(tmp_path / "classes.csv")
    assert found["path"].str.starts_with("sounds/").all()
    expected = ["low" if int(path.rpartition("/")[2][:-4]) % 2 == 0 else "high" for path in found["path"]]
    assert np.mean(found["class_1"].to_numpy() == np.array(expected)) > 0.8

    # Tables for a spreadsheet.
    said = run("ajepa-train embed sounds --model runs/a --out emb.csv")
    assert "emb.csv: the same table; `nearest` reads emb.parquet" in said
    table = pl.read_csv(tmp_path / "emb.csv")
    assert table.height == 30
    assert {"path", "seconds", "embedding_0", "embedding_1"} <= set(table.columns)
    assert "already complete" in run("ajepa-train embed sounds --model runs/a --out emb.csv")
    said = run("ajepa-train embed sounds --model runs/a --frames --out frames.csv", 1)
    assert "--frames has as many vectors as a sound is long; choose NAME.parquet" in said
    run("ajepa-train compare runs/a runs/b --out results.csv")
    results = pl.read_csv(tmp_path / "results.csv")
    assert results["protocol"].to_list() == ["knn", "fine-tuned"]
    assert (results["model"] == "this result").all()
    assert results["low"].is_not_null().all()
