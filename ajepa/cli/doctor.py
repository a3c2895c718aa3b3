"""What this machine can train with: device and precision, DALI, and a few steps on a small store."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.pretrain import smoke
from ajepa.training.devices import pick_device, precision
from pipeline.cli.doctor import INSTALL, Finding, looked, system, trial_store, versions
from pipeline.loading.dali import DaliLoader, dali
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import Order
from pipeline.store.feature_store import FeatureStore

PACKAGES = ("ajepa", "torch", "numpy", "safetensors", "scikit-learn", "matplotlib")

CLIPS, FRAMES, STEPS = 8, 256, 6

GB = 1e9

TOLERANCE = 1e-3  # on GPUs; on CPUs they are equal to the bit


def train_findings(trial: Path) -> Iterator[Finding]:
    """All that stage two needs; a small store and a run of some steps are made below `trial`."""
    yield looked("system", system, "Linux is needed, and Python 3.11 or newer")
    yield looked("packages", lambda: versions(PACKAGES), INSTALL)
    yield device()
    yield looked("dali", lambda: f"DALI {dali().__version__}", "pip install nvidia-dali-cuda130")
    yield looked("loaders", lambda: agreed(trial), "train with --loader plain, and report this")
    yield looked("training", lambda: trained(trial), INSTALL)


def device() -> Finding:
    """What is trained on where nothing is said, in which precision; `slow` without a GPU."""
    chosen = pick_device("auto")
    how = precision(chosen)[1]
    if chosen.type == "cuda":
        free, total = (amount / GB for amount in torch.cuda.mem_get_info(chosen))
        told = f"{how}, {free:.0f} of {total:.0f} GB free, CUDA {torch.version.cuda}"
        return Finding(name="device", state="ok", told=told)
    mend = "recipe small is made for CPUs; where there is a GPU, see what nvidia-smi says of its driver"
    return Finding(name="device", state="slow", told=f"no CUDA device; {how}", mend=mend)


def agreed(trial: Path) -> str:
    """A batch of each loader on each device; RuntimeError where DALI's is not the plain one's."""
    store = FeatureStore.open(trial_store(trial))
    order = Order(rows_N=store.good_rows(["train"]), clips=CLIPS, seed=0)
    mean, std = store.mean_and_std(["train"])
    view = View(frames=FRAMES, mean=mean, std=std)
    plain = next(PlainLoader(store, order, view).batches(0, 1)).mel_BTF
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in devices:
        with DaliLoader(store, order, view, name) as fast:
            apart = (next(fast.batches(0, 1)).mel_BTF.cpu() - plain).abs().max().item()
        if not apart <= TOLERANCE:
            raise RuntimeError(f"DALI on {name} and the plain loader differ by {apart:.3g}")
    return f"DALI on {' and '.join(devices)} gives the batches of the plain loader"


def trained(trial: Path) -> str:
    """A few steps of the recipe `smoke`, and its checkpoint read again; RuntimeError where one is missing."""
    store = trial_store(trial)
    recipe = replace(smoke().resized(steps=STEPS, clips_per_step=CLIPS), checkpoint_every=STEPS)
    run = pretrain(store, recipe, trial / "run", say=lambda line: None)
    lines, step = run.metrics(), run.load("target").step
    if len(lines) != STEPS or step != STEPS:
        raise RuntimeError(f"{STEPS} steps were asked for, {len(lines)} logged, {step} in the checkpoint")
    return f"{STEPS} steps of smoke, loss {lines[0]['loss']:.2f} to {lines[-1]['loss']:.2f}, and a checkpoint"
