"""A step is queued without a look at its results; a bad one is refused by the device, and reported a step late."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny import tiny, tiny_finetune, tiny_views
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ajepa.finetune.trainer import FinetuneTrainer
from ajepa.pretrain.pretrain import pretrain
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.training.devices import Precision, pick_precision
from ajepa.training.run import Run
from ajepa.training.steps_ahead import StepsAhead
from ajepa.training.trainer import BadStep, Trainer
from pipeline.errors import RunError
from pipeline.loading.loader import Batch, PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.splits import train_splits

CPU = torch.device("cpu")

FP32 = pick_precision("fp32", CPU)

FP16 = Precision(dtype=torch.float16, description="fp16, whose loss is scaled")

READS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select")

# Operations whose result has a size that only the values tell: a GPU has to be asked for it.
SIZED_BY_VALUES = {"nonzero", "masked_select", "bincount", "unique_dim", "_unique2", "_local_scalar_dense"}


class RefusingSizedByValues(TorchDispatchMode):
    """Raises where an operation would make the host wait for a GPU, also in the backward pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in SIZED_BY_VALUES or masks:
            raise AssertionError(f"{name} waits for the values of a tensor")
        return func(*args, **(kwargs or {}))


@contextmanager
def refusing_reads():
    """A block in which no value of a tensor reaches Python."""

    def refuse(name):
        def read(*_, **__):
            raise AssertionError(f"Tensor.{name} waits for the values of a tensor")

        return read

    with pytest.MonkeyPatch.context() as patch, RefusingSizedByValues():
        for name in READS:
            patch.setattr(Tensor, name, refuse(name))
        yield


def batch_of(store, *, frames: int, crops: int = 1) -> Batch:
    order = RowOrder(rows_N=store.good_rows(train_splits(store)), clips=8, seed=0)
    mean, std = store.mean_and_std(train_splits(store))
    labels = "raw" if crops == 1 else None
    return PlainLoader(
        store, order, View(frames=frames, mean=mean, std=std, crops=crops, label_set=labels)
    ).make_batch(0)


def pretrainer(store, recipe, **options) -> tuple[Trainer, Batch]:
    batch = batch_of(store, frames=recipe.source_frames, crops=recipe.crops)
    return PretrainTrainer(recipe, CPU, **{"precision": FP32} | options), batch


def classifier(store, **changes) -> tuple[Trainer, Batch]:
    batch = batch_of(store, frames=64)
    assert batch.labels_BC is not None
    merge_SC = torch.eye(batch.labels_BC.shape[1])
    recipe = tiny_finetune(**changes)
    return FinetuneTrainer(recipe, merge_SC, CPU, single_label=False, precision=FP32), batch


KINDS = {
    "papers": lambda store: pretrainer(store, tiny(mask_sets=2, max_gradient_norm=1.0)),
    "views": lambda store: pretrainer(store, tiny_views()),
    "views in passes": lambda store: pretrainer(store, tiny_views(), micro_clips=3),
    "recomputed": lambda store: pretrainer(store, tiny(), recompute=True),
    "scaled": lambda store: pretrainer(store, tiny(max_gradient_norm=1.0), precision=FP16),
    "classifier": classifier,
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_reads_a_tensor(store, kind, padded):
    """On a GPU every such read empties the queue: the GPU then waits until the host has filled it again."""
    trainer, batch = KINDS[kind](store)
    if padded:
        n_frames_B = batch.n_frames_B.clone()
        n_frames_B[1::3] = 20
        batch = replace(batch, n_frames_B=n_frames_B)
    with refusing_reads():
        started = [trainer.start_step(step, batch) for step in (10, 11)]
        with pytest.raises(AssertionError, match="waits for the values"):
            started[0].read_metrics()
    losses = [each.read_metrics()["loss"] for each in started]
    assert losses[0] > 0
    assert losses[0] != losses[1]


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that a checkpoint would hold, copied."""
    parts = trainer.make_checkpoint(0).parts
    return {f"{part}.{name}": value.clone() for part in parts for name, value in parts[part].items()}


@pytest.mark.parametrize("kind", ["papers", "views", "classifier"])
def test_a_bad_step_changes_nothing_of_a_checkpoint(store, kind):
    """Neither weights nor moments nor averages: the next step goes on from what was there before."""
    trainer, batch = KINDS[kind](store)
    trainer.train_step(10, batch)
    before = state_of(trainer)
    mel_BTF = batch.mel_BTF.clone()
    mel_BTF[2, 3, 4] = torch.nan
    started = trainer.start_step(11, replace(batch, mel_BTF=mel_BTF))
    for name, value in state_of(trainer).items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(BadStep, match="step 12: loss is nan") as refused:
        started.read_metrics()
    assert refused.value.tensors["mel_BTF"].isnan().any()

    # As if it had never been.
    other, _ = KINDS[kind](store)
    other.train_step(10, batch)
    assert other.train_step(12, batch) == trainer.train_step(12, batch)


def test_a_run_ends_with_a_bad_step_that_was_read_late(store_path, tmp_path, monkeypatch):
    """Nothing is logged or saved in between: the step after it has begun, and counts for nothing."""
    start_step = PretrainTrainer.start_step
    begun = []

    def start_with_nan(trainer, step, batch):
        begun.append(step)
        if step == 3:
            batch.mel_BTF[0, 0, 0] = torch.nan
        return start_step(trainer, step, batch)

    monkeypatch.setattr(PretrainTrainer, "start_step", start_with_nan)
    recipe = tiny(log_every=10, checkpoint_every=10, health_every=0)
    with pytest.raises(
        RunError, match=r"step 4: loss is nan.*stopped before the update.*kept in .*bad-step-0+4"
    ):
        pretrain(store_path, recipe, tmp_path / "run", device="cpu", say=lambda line: None)
    assert begun == [0, 1, 2, 3, 4]
    assert Run.open(tmp_path / "run").newest_step == 0
    assert Run.open(tmp_path / "run").read_metrics() == []


def test_a_thread_makes_the_value_of_the_next_step_and_of_no_other():
    """Its work is over when the step is taken; steps may be taken in any order."""
    made, threads = [], set()
    is_made_ahead = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 3:
            threads.add(threading.current_thread())
            is_made_ahead.set()
        if step == 7:
            raise RunError("seven")
        return step**2

    ahead = StepsAhead(make, last_step=9)
    assert ahead.take(2) == 4
    assert is_made_ahead.wait(30)
    assert threads != {threading.main_thread()}
    assert ahead.take(3) == 9
    assert made[:2] == [2, 3]
    assert ahead.take(6) == 36
    with pytest.raises(RunError, match="seven"):
        ahead.take(7)
    assert ahead.take(8) == 64
    assert 9 not in made
