"""Workers that hang, die or meet a bug; Ray runs the same tasks with the same bytes, protection and errors."""

import os
from pathlib import Path

import pytest
from numbers_work import Numbers, work
from stores import assert_same_bytes, build

from pipeline.build.workers import run_in_processes, run_on_ray_cluster
from pipeline.errors import InputError, StoreError


def test_a_clip_that_kills_or_hangs_its_decoder_costs_only_itself(tmp_path):
    """One deadly file among millions must not end a build, nor take its neighbours along."""
    task = Numbers(tmp_path, ("is fine", "dies", "is fine", "hangs", "is fine"))
    list(run_in_processes(work, [task], workers=1, clip_limit_seconds=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.good",
        "1.crashed",
        "2.good",
        "3.timed_out",
        "4.good",
    ]


def test_an_input_error_in_a_worker_reaches_the_user_as_it_is(tmp_path):
    """A full disk is for the user to mend, with the sentence that says so."""
    with pytest.raises(StoreError, match="no space left"):
        list(run_in_processes(work, [Numbers(tmp_path, ("is full",))], workers=1, clip_limit_seconds=60))


def test_a_bug_in_a_worker_is_loud(tmp_path):
    """A bug must not be taken for a broken clip."""
    with pytest.raises(RuntimeError, match="ZeroDivisionError: no sound divides by zero"):
        list(run_in_processes(work, [Numbers(tmp_path, ("is a bug",))], workers=1, clip_limit_seconds=60))


ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'ajepa[ray]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


def test_a_store_built_on_ray_has_the_same_bytes(corpus, tmp_path):
    """The engine must not change the store."""
    build(corpus, tmp_path / "ray.zarr", engine="ray", workers=2)
    build(corpus, tmp_path / "local.zarr")
    assert_same_bytes(tmp_path / "local.zarr", tmp_path / "ray.zarr")


def test_a_clip_that_kills_its_process_costs_itself_on_ray_too(tmp_path, monkeypatch):
    """And an error that a user can act on arrives as it is."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "support"), prepend=os.pathsep)
    tasks = [Numbers(tmp_path, ("fine", "dies", "fine")), Numbers(tmp_path, ("fine",))]
    list(run_on_ray_cluster(work, tasks, workers=1, clip_limit_seconds=30))
    assert {path.name for path in tmp_path.iterdir()} == {"0.good", "1.crashed", "2.good"}
    with pytest.raises(StoreError, match="no space left"):
        list(run_on_ray_cluster(work, [Numbers(tmp_path, ("is full",))], workers=1, clip_limit_seconds=30))


def test_a_cluster_that_does_not_answer_is_an_error_in_one_line(tmp_path):
    """The line says how to start one."""
    with pytest.raises(InputError, match=r"no Ray cluster answers.*ray start --head"):
        list(run_on_ray_cluster(work, [], workers=1, clip_limit_seconds=30, address="127.0.0.1:1"))
