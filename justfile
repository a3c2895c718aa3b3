# Every recipe makes .venv first, if it is not there or pyproject.toml or constraints.txt have changed.

export PATH := justfile_directory() / ".venv/bin" + ":" + env("PATH")
# Python keeps what it has compiled, the tests too, wherever a machine says otherwise: compiling them takes 14 seconds.
export PYTHONDONTWRITEBYTECODE := ""
python := env("PYTHON", "python3")

# List the recipes.
default:
    @just --list

# The virtual environment with the tested versions; quick when it is there.
[private]
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
    if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    {{ python }} -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
    echo "installing into .venv (about 6 GB, a few minutes)"
    {{ python }} -m venv .venv
    pip install --quiet --constraint constraints.txt --editable '.[dev]'
    echo "$wanted" > .venv/installed

# Sound files to a pre-trained, measured encoder in some 16 minutes; see demo/report/.
demo: setup
    rm -rf demo
    ajepa-data demo-corpus demo/corpus --clips 600
    ajepa-data build-audioset --audio demo/corpus/audio --segments demo/corpus/balanced_train_segments.csv --segments demo/corpus/eval_segments.csv --out demo/demo.zarr
    ajepa-data propagate-labels demo/demo.zarr
    ajepa-data verify demo/demo.zarr
    ajepa-train pretrain --store demo/demo.zarr --recipe small --run demo/run
    ajepa-train evaluate --store demo/demo.zarr --run demo/run --pooling moments --layer concat-all
    ajepa-data report demo/demo.zarr --out demo/report/mels.png --html demo/report/store.html
    ajepa-train report --store demo/demo.zarr --run demo/run --html demo/report/run.html --out demo/report

# The test suite; arguments go to pytest. Each worker has half of the tests, and then takes what the other has left.
test *arguments: setup
    OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist worksteal {{ arguments }}

# Format, lint and types.
lint: setup
    ruff format --check .
    ruff check .
    mypy

# What must be green before a change lands.
check: lint test

# The documentation as a site, into site/; a link or a name that leads nowhere ends it.
docs: setup
    pip install --quiet --constraint constraints.txt --editable '.[docs]'
    NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

# Kill builds at random moments, restart them, compare every byte; arguments: how many, then --folder, --without-locks, --s3.
torture kills="50" *arguments: setup
    OMP_NUM_THREADS=1 python tests/support/torture.py {{ kills }} {{ arguments }}

# Damage sounds of every container and decode them; arguments: how many, then --first SEED, --workers N, --keep FOLDER.
fuzz count="2000" *arguments: setup
    OMP_NUM_THREADS=1 python tests/support/fuzz_sounds.py {{ count }} {{ arguments }}

# Benchmarks, each with its baselines in one run: mel, build, growth, rehearsal, labels, loader, step, learning, ablation, finetune.
bench name *arguments: setup
    python -m bench.{{ name }} {{ arguments }}

# What a GPU must show, in 7 minutes: its tests, speed beside the published step, learning. Without a GPU a tiny form of it.
gpu *arguments: setup
    python -m bench.gpu {{ arguments }}
