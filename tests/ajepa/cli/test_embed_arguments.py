"""Sounds whose names begin with a dash can be given to every command; a misspelt option is still told."""

import sys

import pytest

from ajepa.cli.app import main


def run(*arguments, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ajepa-train", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


@pytest.mark.parametrize("name", ["-abcdefghij.wav", "--abcdefghi.wav", "-h.wav"])
def test_a_name_that_begins_with_a_dash_is_a_sound(tmp_path, monkeypatch, capsys, name):
    """3 % of the ids of AudioSet begin so; the error is that of the model, which is looked for next."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"")
    assert run("embed", name, "--model", "gone", "--out", "x.parquet", monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert "gone" in error
    assert "option" not in error


def test_a_misspelt_option_is_no_sound(tmp_path, monkeypatch, capsys):
    """Otherwise it would be looked for as a file, after minutes of loading."""
    monkeypatch.chdir(tmp_path)
    wanted = ("embed", "a.wav", "--modle", "--model", "gone", "--out", "x.parquet")
    assert run(*wanted, monkeypatch=monkeypatch) == 2
    assert "no such option, and no such file: --modle" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [["predict", "--out", "x.csv"], ["nearest", "--index", "x.parquet"]])
def test_other_commands_take_such_names_too(tmp_path, monkeypatch, capsys, wanted):
    """A name that one command takes and the next one refuses would be worse than either."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-abcdefghij.wav").write_bytes(b"")
    assert run(*wanted, "--model", "gone", "-abcdefghij.wav", monkeypatch=monkeypatch) == 1
    assert "option" not in capsys.readouterr().err
    assert run(*wanted, "--model", "gone", "--modle", monkeypatch=monkeypatch) == 2
    assert "no such option, and no such file: --modle" in capsys.readouterr().err
