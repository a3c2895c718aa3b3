"""The documentation cannot drift: its Python runs, its commands can be typed, its links lead somewhere."""

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
import soundfile
import typer
from pages import BLOCKS, PAGES, ROOT, Block, command_words
from tiny import tiny

import ajepa.cli.app
import pipeline.cli.app
from ajepa.pretrain.pretrain import pretrain

APPS = {"ajepa-data": pipeline.cli.app.app, "ajepa-train": ajepa.cli.app.app}

COMMANDS = [
    pytest.param(line, id=f"{block.name} {line[:40]}") for block in BLOCKS for line in block.command_lines
]

TUTORIAL = "docs/tutorial.md"

PYTHON_PAGES = sorted({b.page for b in BLOCKS if b.language == "python" and b.page != TUTORIAL})

# The tutorial with less of everything.
SMALLER = {
    "--clips 600": "--clips 24",
    "--out mine.zarr": "--out mine.zarr --workers 0",
    "--recipe small --steps 300": "--recipe smoke --steps 2 --set masks=spans",
    "--recipe own-small": "--recipe own-small --set steps=2 --batch 4",
    "--epochs 12": "--epochs 1",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_documentation_can_be_typed(line, desk, monkeypatch):
    """Its command, its options and the kinds of their values are there."""
    monkeypatch.chdir(desk)
    program, name, *words = command_words(line)
    typer.main.get_command(APPS[program]).commands[name].make_context(name, words)


def test_every_block_says_its_language():
    """A block without one would be in no test."""
    known = {"sh", "python", "text", "csv", "toml", ""}
    assert {block.language for block in BLOCKS} <= known
    unnamed = [block for block in BLOCKS if not block.language]
    assert not [block.name for block in unnamed if "ajepa-" in block.text.split("\n")[0]]


@pytest.mark.parametrize("page", PAGES)
def test_a_link_of_the_documentation_leads_somewhere(page):
    """To a file of the repository, and to a heading of it, as the site and a reader of the files need it."""
    for target in re.findall(r"\]\(([^()\s]+)\)", PAGES[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {anchor_of(heading) for heading in headings}, target


def anchor_of(heading: str) -> str:
    """The anchor that Markdown gives to a heading."""
    words = re.sub(r"[^\w\s-]", "", heading.lower())
    return re.sub(r"\s+", "-", words.strip())


@pytest.mark.parametrize("page", ["README.md", "docs/evaluate.md"])
def test_a_number_that_a_page_repeats_is_that_of_the_benchmarks(page):
    """bench/README.md says how each was made; a copy elsewhere must not differ."""
    numbers = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    cells = re.findall(r"\.\d{3} ± \.\d{3} / \.\d{3} ± \.\d{3}", PAGES[page])
    assert cells
    assert set(cells) <= set(re.findall(r"\.\d{3} ± \.\d{3} / \.\d{3} ± \.\d{3}", numbers))


@pytest.fixture(scope="module")
def desk(store_path, tmp_path_factory) -> Path:
    """A folder with the names that the pages use: a store, runs, two sounds."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "as20k.zarr").symlink_to(store_path)
    pretrain(store_path, tiny(), folder / "runs/a", device="cpu", say=lambda line: None)
    for other in ("b", "mine"):
        (folder / "runs" / other).symlink_to(folder / "runs/a")
    for name, rate_hz in (("a.mp3", 44_100), ("b.wav", 16_000)):
        noise_S = 0.1 * np.random.default_rng(rate_hz).standard_normal(2 * rate_hz)
        soundfile.write(folder / name, noise_S, rate_hz)
    return folder


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_of_a_page_runs(page, desk, monkeypatch):
    """From its first block to its last, as someone types who reads from the top."""
    monkeypatch.chdir(desk)
    names = {}
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            execute(block, names)


def execute(block: Block, names: dict) -> None:
    """Run a block of Python; an error names its line of the page."""
    exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), names)


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    """All of its blocks in order, on fewer clips and steps: tables, neighbours, a classifier and a map come out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ajepa.evaluate.probes.MAX_ATTENTIVE_STEPS", 20)
    text_of = {block.name: block.text for block in BLOCKS if block.page == TUTORIAL}
    assert all(old in "".join(text_of.values()) for old in SMALLER)

    names = {}
    for block in BLOCKS:
        if block.page == TUTORIAL and block.language == "python":
            execute(block, names)
        elif block.page == TUTORIAL and block.language == "sh":
            for line in block.command_lines:
                type_command(line, monkeypatch)
    plt.close("all")

    # What the page says is there, or was printed.
    printed = capsys.readouterr().out
    assert re.search(r" is like \['", printed)
    assert re.search(r"^0\.\d{3} of \d+ held-out clips$", printed, re.MULTILINE)
    assert "log-mel statistics" in printed
    assert (tmp_path / "map.png").read_bytes()[1:4] == b"PNG"
    assert len(pl.read_parquet("mine.parquet")) == len(pl.read_csv("labels.csv"))
    for name in ("store.html", "run.html"):
        assert "</html>" in (tmp_path / name).read_text()[-20:]


def type_command(line: str, monkeypatch) -> None:
    """Run a command of the tutorial in this process, with less of everything."""
    for old, new in SMALLER.items():
        if "build-folder" in line or "mine.zarr" not in old:
            line = line.replace(old, new)
    program, *words = command_words(line)
    monkeypatch.setattr(sys, "argv", [program, *words])
    module = {"ajepa-data": pipeline.cli.app, "ajepa-train": ajepa.cli.app}[program]
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert not stop.value.code, line
