"""The checks of `ajepa-train doctor`: device and precision, DALI, and a few steps on a small store."""

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

SMOKE_CLIPS = 8

SMOKE_FRAMES = 256

SMOKE_STEPS = 6

GB = 1e9

# The loaders may differ by so much on a GPU; on a CPU their batches are equal to the bit.
LOADER_TOLERANCE = 1e-3


def training_findings(trial_folder: Path) -> Iterator[MachineCheck]:
    """Check everything that stage two needs; a small store and a short run are made in `trial_folder`."""
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
    """The device and the precision that training picks by itself; `slow` without a GPU."""
    device = pick_device("auto")
    _, precision = hardware_precision(device)
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        memory = f"{free_bytes / GB:.0f} of {total_bytes / GB:.0f} GB free"
        return MachineCheck(
            name="device", state="ok", message=f"{precision}, {memory}, CUDA {torch.version.cuda}"
        )
    remedy = "recipe small is made for CPUs; if there is a GPU, check its driver with nvidia-smi"
    return MachineCheck(name="device", state="slow", message=f"no CUDA device; {precision}", remedy=remedy)


def compare_loaders(trial_folder: Path) -> str:
    """Make one batch with each loader on each device; RuntimeError where DALI's is not the plain one's."""
    # A batch of the plain loader, which defines what is right
    store = FeatureStore.open(build_trial_store(trial_folder))
    order = RowOrder(rows_N=store.good_rows(["train"]), clips=SMOKE_CLIPS, seed=0)
    mean, std = store.mean_and_std(["train"])
    view = View(frames=SMOKE_FRAMES, mean=mean, std=std)
    plain_BTF = next(PlainLoader(store, order, view).batches(0, 1)).mel_BTF

    # The same batch of DALI
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        with DaliLoader(store, order, view, device) as dali_loader:
            dali_BTF = next(dali_loader.batches(0, 1)).mel_BTF.cpu()
        difference = (dali_BTF - plain_BTF).abs().max().item()
        # Written so that nan is refused too
        if not difference <= LOADER_TOLERANCE:
            raise RuntimeError(f"DALI on {device} and the plain loader differ by {difference:.3g}")
    return f"DALI on {' and '.join(devices)} gives the batches of the plain loader"


def train_smoke_recipe(trial_folder: Path) -> str:
    """Take a few steps of the recipe `smoke` and read its checkpoint again; RuntimeError where one is missing."""
    store = build_trial_store(trial_folder)
    recipe = smoke_recipe().with_counts(steps=SMOKE_STEPS, clips_per_step=SMOKE_CLIPS)
    recipe = replace(recipe, checkpoint_every=SMOKE_STEPS)
    run = pretrain(store, recipe, trial_folder / "run", say=lambda line: None)

    # Every step is logged, and the checkpoint is that of the last one
    losses = [line["loss"] for line in run.read_metrics()]
    checkpoint_step = run.load_checkpoint("target").step
    if len(losses) != SMOKE_STEPS or checkpoint_step != SMOKE_STEPS:
        raise RuntimeError(
            f"expected {SMOKE_STEPS} steps, got {len(losses)} in the log and {checkpoint_step} in the checkpoint"
        )
    return f"{SMOKE_STEPS} steps of smoke, loss {losses[0]:.2f} to {losses[-1]:.2f}, and a checkpoint"
