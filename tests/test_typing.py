"""Type hints from outside: what an editor and a type checker know of the two packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ajepa
import pipeline

ROOT = Path(__file__).parents[1]

# Other packages are not read, which would take a minute of PyTorch alone: their types are Any.
CONFIG = """
[tool.mypy]
strict = true
follow_imports = "silent"

[[tool.mypy.overrides]]
module = ["torch.*", "polars.*", "pyarrow.*", "zarr.*", "scipy.*", "sklearn.*", "safetensors.*", "fsspec.*", "typer.*"]
follow_imports = "skip"
ignore_missing_imports = true

[[tool.mypy.overrides]]
module = ["soundfile", "soxr", "tqdm.*", "av.*", "nvidia.*", "h5py.*", "huggingface_hub.*"]
follow_imports = "skip"
ignore_missing_imports = true
"""


def check_types(scripts: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Check scripts with mypy at its strictest, in one go: most of the time is that of the two packages."""
    config = folder / "pyproject.toml"
    config.write_text(CONFIG)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        config,
        "--cache-dir",
        folder / "cache",
        *scripts,
    ]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_strict_type_checker_accepts_a_users_script(tmp_path):
    """Every name that the script uses is there, with its keywords; and a wrong keyword is found, so types are read."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    script = ROOT / "tests" / "support" / "public_api.py"
    wrong = tmp_path / "wrong.py"
    wrong.write_text(script.read_text().replace('errors="row"', 'errors="rows"'))
    done = check_types([script, wrong], tmp_path)
    *found, summary = done.stdout.splitlines()
    assert summary == "Found 1 error in 1 file (checked 2 source files)", done.stdout + done.stderr
    assert all(line.startswith("wrong.py:") for line in found)
    assert 'Argument "errors" to "embed" of "Embedder" has incompatible type' in found[0]


@pytest.mark.parametrize("package", [ajepa, pipeline])
def test_a_package_says_that_it_is_typed_and_its_version(package):
    """PEP 561's marker, without which type checkers take every name for Any; the version of the distribution."""
    assert (Path(package.__file__).parent / "py.typed").is_file()
    assert package.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="has no attribute 'versions'"):
        _ = package.versions
