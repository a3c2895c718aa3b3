"""A step on a GPU: nobody waits in it, fast attention runs, a bad one changes nothing, a killed run is carried on."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from tiny import tiny, tiny_finetune, tiny_views

from ajepa.finetune.trainer import FinetuneTrainer
from ajepa.model.patches import PatchGrid
from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.training.devices import pick_precision
from ajepa.training.run import Run
from ajepa.training.trainer import BadStep, Trainer
from pipeline.loading.loader import Batch, PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.splits import train_splits

pytestmark = pytest.mark.gpu

RESUMED_TOLERANCE = 2e-3  # relative, of the loss: sums of a GPU have no fixed order


def batch_on(device: str, store, *, frames: int, crops: int = 1, clips: int = 8) -> Batch:
    """Clips as a recipe wants them, with labels where it has no crops."""
    order = RowOrder(rows_N=store.good_rows(train_splits(store)), clips=clips, seed=0)
    mean, std = store.mean_and_std(train_splits(store))
    labels = "raw" if crops == 1 else None
    view = View(frames=frames, mean=mean, std=std, crops=crops, label_set=labels)
    return PlainLoader(store, order, view, device=device).make_batch(0)


# What reads a tensor's values: on a GPU, the host waits for them.
READING_METHODS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def refusing_waits(device: str):
    """A block in which PyTorch raises where the host waits for the GPU; on a CPU, where it would wait for one."""
    if device == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            for name in READING_METHODS:
                patch.setattr(torch.Tensor, name, refuse_reading)
            patch.setattr(torch.Tensor, "numpy", read_host_array)
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


READ_ARRAY = torch.Tensor.numpy


def read_host_array(tensor: torch.Tensor, **options: bool) -> np.ndarray:
    """Masks and numbers of frames are the host's own and may be read; values of the model may not."""
    return refuse_reading(tensor) if tensor.is_floating_point() else READ_ARRAY(tensor, **options)


def refuse_reading(tensor: torch.Tensor, *arguments: object) -> NoReturn:
    raise AssertionError(f"a step reads a tensor of {tensor.dtype}, for which a GPU would be waited for")


def trainers(store, device: str) -> dict[str, tuple[Trainer, Batch]]:
    """A trainer of every kind, and a batch for it; clips of several lengths."""
    fp32 = pick_precision("fp32", torch.device(device))
    kinds: dict[str, tuple[Trainer, Batch]] = {}
    for name, recipe in {"papers": tiny(mask_sets=2, max_gradient_norm=1.0), "views": tiny_views()}.items():
        batch = batch_on(device, store, frames=recipe.source_frames, crops=recipe.crops)
        kinds[name] = PretrainTrainer(recipe, torch.device(device), precision=fp32), batch

    # Of a classifier, the classes are those of the store.
    batch = batch_on(device, store, frames=64)
    assert batch.labels_BC is not None
    merge_SC = torch.eye(batch.labels_BC.shape[1])
    classifier = FinetuneTrainer(
        tiny_finetune(), merge_SC, torch.device(device), single_label=False, precision=fp32
    )
    kinds["classifier"] = classifier, batch
    return kinds


@pytest.mark.parametrize("kind", ["papers", "views", "classifier"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_no_step_waits_for_the_gpu(store, gpu, kind, padded):
    """The host fills the queue; whatever it reads on the way would empty it first."""
    trainer, batch = trainers(store, gpu)[kind]
    if padded:
        batch = replace(batch, n_frames_B=batch.n_frames_B // 3 * 2)
    trainer.train_step(10, batch)  # allocates
    with refusing_waits(gpu):
        first = trainer.start_step(11, batch)
        second = trainer.start_step(12, batch)
    assert first.read_metrics()["loss"] > 0
    assert second.read_metrics()["loss"] != first.read_metrics()["loss"]


def test_a_step_that_is_no_number_changes_nothing(store, gpu):
    """The device refuses the update before the host knows of it."""
    trainer, batch = trainers(store, gpu)["papers"]
    trainer.train_step(10, batch)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batch.mel_BTF[2, 3, 4] = torch.nan
    started = trainer.start_step(11, batch)
    with pytest.raises(BadStep, match="step 12: loss is nan"):
        started.read_metrics()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_full_clips_are_attended_to_by_a_flash_kernel(store, gpu):
    """A mask of keys would leave only slower ones: PyTorch's flash kernel and cuDNN's take none."""
    recipe = tiny()
    grid = PatchGrid.from_size(1024, 128)
    recipe = replace(recipe, model=replace(recipe.model, encoder=replace(recipe.model.encoder, grid=grid)))
    trainer = PretrainTrainer(recipe, torch.device(gpu), precision=pick_precision("bf16", torch.device(gpu)))
    batch = batch_on(gpu, store, frames=1024)
    batch = replace(batch, n_frames_B=torch.full_like(batch.n_frames_B, 998))
    trainer.train_step(10, batch)
    activities = [
        torch.profiler.ProfilerActivity.CUDA if gpu == "cuda" else torch.profiler.ProfilerActivity.CPU
    ]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        trainer.train_step(11, batch)
    names = {event.key.lower() for event in profiler.key_averages()}
    if gpu == "cuda":
        assert any("flash" in name for name in names), sorted(names)
        assert not any("fmha_cutlass" in name for name in names), "the kernel that takes masks ran"


KILLED_RUN = """
import sys
from pathlib import Path
from dying import die_after_checkpoint
from tiny import tiny
from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
start_step = PretrainTrainer.start_step
def start_or_die(trainer, step, batch):
    if step == 8:
        die_after_checkpoint(Path(run), 5)
    return start_step(trainer, step, batch)
PretrainTrainer.start_step = start_or_die
store, run, device = sys.argv[1:]
pretrain(store, tiny(), Path(run), steps=10, device=device, precision="fp32", say=lambda line: None)
"""


def test_a_run_that_was_killed_is_carried_on_as_if_it_had_not_been(store_path, tmp_path, gpu):
    """From its last checkpoint, to the same losses."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(
        [str(root), str(root / "tests/support"), *os.environ.get("PYTHONPATH", "").split(":")]
    )
    process = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(store_path), str(tmp_path / "run"), gpu],
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert Run.open(tmp_path / "run").newest_step == 5
    runs = [
        pretrain(
            store_path,
            tiny(),
            tmp_path / name,
            steps=10,
            device=gpu,
            precision="fp32",
            say=lambda line: None,
        )
        for name in ("run", "undisturbed")
    ]
    lines, undisturbed = (run.read_metrics() for run in runs)
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line, other in zip(lines, undisturbed, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=RESUMED_TOLERANCE)
