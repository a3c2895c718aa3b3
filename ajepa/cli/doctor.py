"""What this machine can train with: device and precision, DALI, and a few steps on a small store."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ajepa.pretrain.pretrain import pretrain
from ajepa.recipes.pretrain import smoke_recipe
from ajepa.training.devices import hardware_precision, pick_device
from pipeline.cli.doctor import (
    INSTALL_COMMAND,
    MachineCheck,
    build_trial_store,
    describe_system,
    package_versions,
    run_machine_check,
)
from pipeline.loading.dali import DaliLoader, import_dali
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore

TRAINING_PACKAGES = ("ajepa", "torch", "numpy", "safetensors", "scikit-learn", "matplotlib")

SMOKE_CLIPS, SMOKE_FRAMES, SMOKE_STEPS = 8, 256, 6

GB = 1e9

LOADER_TOLERANCE = 1e-3  # on GPUs; on CPUs they are equal to the bit


def training_findings(trial_folder: Path) -> Iterator[MachineCheck]:
    """All that stage two needs; a small store and a run of some steps are made below `trial`."""
    yield run_machine_check("system", describe_system, "Linux is needed, and Python 3.11 or newer")
    yield run_machine_check("packages", lambda: package_versions(TRAINING_PACKAGES), INSTALL_COMMAND)
    yield device_finding()
    yield run_machine_check(
        "dali", lambda: f"DALI {import_dali().__version__}", "pip install nvidia-dali-cuda130"
    )
    yield run_machine_check(
        "loaders", lambda: compare_loaders(trial_folder), "train with --loader plain, and report this"
    )
    yield run_machine_check("training", lambda: train_smoke_recipe(trial_folder), INSTALL_COMMAND)


def device_finding() -> MachineCheck:
    """What is trained on where nothing is said, in which precision; `slow` without a GPU."""
    chosen = pick_device("auto")
    how = hardware_precision(chosen)[1]
    if chosen.type == "cuda":
        free, total = (amount / GB for amount in torch.cuda.mem_get_info(chosen))
        told = f"{how}, {free:.0f} of {total:.0f} GB free, CUDA {torch.version.cuda}"
        return MachineCheck(name="device", state="ok", message=told)
    mend = "recipe small is made for CPUs; where there is a GPU, see what nvidia-smi says of its driver"
    return MachineCheck(name="device", state="slow", message=f"no CUDA device; {how}", remedy=mend)


def compare_loaders(trial_folder: Path) -> str:
    """A batch of each loader on each device; RuntimeError where DALI's is not the plain one's."""
    store = FeatureStore.open(build_trial_store(trial_folder))
    order = RowOrder(rows_N=store.good_rows(["train"]), clips=SMOKE_CLIPS, seed=0)
    mean, std = store.mean_and_std(["train"])
    view = View(frames=SMOKE_FRAMES, mean=mean, std=std)
    plain = next(PlainLoader(store, order, view).batches(0, 1)).mel_BTF
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in devices:
        with DaliLoader(store, order, view, name) as fast:
            apart = (next(fast.batches(0, 1)).mel_BTF.cpu() - plain).abs().max().item()
        if not apart <= LOADER_TOLERANCE:
            raise RuntimeError(f"DALI on {name} and the plain loader differ by {apart:.3g}")
    return f"DALI on {' and '.join(devices)} gives the batches of the plain loader"


def train_smoke_recipe(trial_folder: Path) -> str:
    """A few steps of the recipe `smoke`, and its checkpoint read again; RuntimeError where one is missing."""
    store = build_trial_store(trial_folder)
    recipe = replace(
        smoke_recipe().with_counts(steps=SMOKE_STEPS, clips_per_step=SMOKE_CLIPS),
        checkpoint_every=SMOKE_STEPS,
    )
    run = pretrain(store, recipe, trial_folder / "run", say=lambda line: None)
    lines, step = run.read_metrics(), run.load_checkpoint("target").step
    if len(lines) != SMOKE_STEPS or step != SMOKE_STEPS:
        raise RuntimeError(
            f"{SMOKE_STEPS} steps were asked for, {len(lines)} logged, {step} in the checkpoint"
        )
    return f"{SMOKE_STEPS} steps of smoke, loss {lines[0]['loss']:.2f} to {lines[-1]['loss']:.2f}, and a checkpoint"
