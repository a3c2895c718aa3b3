"""Ray runs the same tasks elsewhere: the same bytes, the same protection, the same errors."""

import os
from pathlib import Path

import pytest
from conftest import assert_same_bytes, build
from test_engines import Numbers, work

from pipeline.cluster import run_on_ray
from pipeline.errors import InputError, StoreError

ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'ajepa[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


def test_a_store_built_on_ray_has_the_same_bytes(corpus, tmp_path):
    """The engine must not show."""
    build(corpus, tmp_path / "ray.zarr", engine="ray", workers=2)
    build(corpus, tmp_path / "local.zarr")
    assert_same_bytes(tmp_path / "local.zarr", tmp_path / "ray.zarr")


def test_a_clip_that_kills_its_process_costs_itself_on_ray_too(tmp_path, monkeypatch):
    """And an error that a user can act on arrives as it is."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    tasks = [Numbers(tmp_path, ("fine", "dies", "fine")), Numbers(tmp_path, ("fine",))]
    list(run_on_ray(work, tasks, workers=1, clip_seconds=30))
    assert {path.name for path in tmp_path.iterdir()} == {"0.good", "1.crashed", "2.good"}
    with pytest.raises(StoreError, match="no space left"):
        list(run_on_ray(work, [Numbers(tmp_path, ("is full",))], workers=1, clip_seconds=30))


def test_a_cluster_that_does_not_answer_is_said(tmp_path):
    """One line, with how to start one."""
    with pytest.raises(InputError, match=r"no Ray cluster answers.*ray start --head"):
        list(run_on_ray(work, [], workers=1, clip_seconds=30, address="127.0.0.1:1"))
