"""What `pip install` brings: all of the code and its data, nothing else, and two programs that start."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = ("pipeline", "ajepa", "manifests")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, the build backend, is not installed"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist of this tree."""
    out = tmp_path_factory.mktemp("dist")
    hatchling = [sys.executable, "-m", "hatchling", "build", "--directory", out, "-t", "wheel", "-t", "sdist"]
    subprocess.run(hatchling, cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def files_in(folder: str) -> set[str]:
    """Of the tree: what is there but for what running it left."""
    paths = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def test_a_wheel_holds_the_packages_and_nothing_else(wheel):
    """Tables, class trees and the page too; no test and no benchmark lands in site-packages."""
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == set().union(*map(files_in, PACKAGES))
    assert {"pipeline/report/page.html", "manifests/audioset.json", "manifests/published_results.csv"} <= held


def test_a_wheel_tells_what_it_is(wheel):
    """Licence, readme, versions of Python: what an index shows and pip obeys."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    told = message_from_string(wheel.read(name).decode())
    assert told["License-Expression"] == "Apache-2.0"
    assert "LICENSE" in told.get_all("License-File")
    assert told["Requires-Python"] == ">=3.11"
    assert told.get_payload().startswith("# ajepa")


def test_an_sdist_holds_what_its_tests_need(built):
    """Who packages it for a distribution builds and tests from it."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = set().union(*map(files_in, (*PACKAGES, "tests", "bench", "docs")))
    assert wanted <= held
    assert {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "justfile",
        "constraints.txt",
        "mkdocs.yml",
        "SECURITY.md",
    } <= held


@pytest.mark.parametrize("program", ["ajepa-data", "ajepa-train"])
def test_a_program_starts_from_the_wheel_alone(built, wheel, tmp_path, program):
    """Away from this tree, with nothing of it on the path."""
    site = tmp_path / "site"
    wheel.extractall(site)
    (entry,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    points = dict(line.split(" = ") for line in wheel.read(entry).decode().splitlines() if " = " in line)
    module, main = points[program].split(":")
    start = f"import sys, {module} as m; sys.argv = ['{program}', '--help']; print(m.__file__); m.{main}()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", start],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(site))
    assert f"Usage: {program}" in done.stdout
