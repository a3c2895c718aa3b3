"""The memory that steps of training really take, measured in a process of its own: start these by `start_forked`."""

import ctypes
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from large_classifiers import large_recipe

from ajepa.finetune.trainer import FinetuneTrainer
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.catalogue import override_recipe
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain, small_recipe
from ajepa.training.devices import Precision, pick_precision
from pipeline.loading.loader import Batch

CPU = torch.device("cpu")

CLASSES_MEASURED = 50

M_MMAP_THRESHOLD = -3  # malloc.h


def return_pieces_of_some_kb() -> None:
    """Let glibc give pieces of 64 KiB and more back at once, as it does larger ones, instead of keeping them."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65_536) == 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most that this process has had. Not ru_maxrss: a child's begins with the size of who forked it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def precision_of(arguments: list[str]) -> Precision:
    return pick_precision("bf16" if "bf16" in arguments else "fp32", CPU)


def take_pretrain_steps(recipe: Pretrain, arguments: list[str]) -> None:
    """The first and the last step of a recipe: the second of them has the optimiser's moments."""
    trainer = PretrainTrainer(
        recipe,
        CPU,
        recompute="recompute" in arguments,
        precision=precision_of(arguments),
        micro_clips=8 if "micro" in arguments else None,
    )
    clips, frames = recipe.clips_per_step, recipe.source_frames
    crops = clips * recipe.crops
    for step in (0, recipe.steps - 1):
        batch = Batch(
            mel_BTF=torch.randn(crops, frames, 128),
            n_frames_B=torch.full((crops,), frames),
            rows_B=np.arange(clips),
            labels_BC=None,
        )
        trainer.train_step(step, batch)


def measured_pretrain_recipe(arguments: list[str]) -> Pretrain:
    """`small` with these settings; of fewer clips in bf16, which most processors compute slowly."""
    recipe = override_recipe(small_recipe(), [argument for argument in arguments if "=" in argument])
    return recipe.with_counts(clips_per_step=8) if "bf16" in arguments else recipe


def measured_classifier_recipe(arguments: list[str]) -> Finetune:
    """A large classifier; of fewer clips in bf16, which most processors compute slowly."""
    recipe = large_recipe(arguments[0])
    clips = {"vit": 8, "cnn6": 4}
    return replace(recipe, clips_per_step=clips[arguments[0]]) if "bf16" in arguments else recipe


def print_pretrain_bytes(arguments: list[str]) -> None:
    """Print the peak of two steps of `small`, above what steps of one clip have left."""
    if "micro" in arguments:
        return_pieces_of_some_kb()
    take_pretrain_steps(small_recipe().with_counts(clips_per_step=1), arguments)
    before = resident_bytes()
    take_pretrain_steps(measured_pretrain_recipe(arguments), arguments)
    print(peak_resident_bytes() - before)


def take_classifier_steps(recipe: Finetune, arguments: list[str]) -> None:
    """Two steps: the second one has the optimiser's moments."""
    trainer = FinetuneTrainer(
        recipe,
        torch.eye(CLASSES_MEASURED),
        CPU,
        single_label=False,
        recompute="recompute" in arguments,
        precision=precision_of(arguments),
        micro_clips=4 if "micro" in arguments else None,
    )
    clips, spec = recipe.clips_per_step, recipe.model
    for step in range(2):
        batch = Batch(
            mel_BTF=torch.randn(clips, spec.frames, spec.bands),
            n_frames_B=torch.full((clips,), spec.frames),
            rows_B=np.arange(clips),
            labels_BC=torch.zeros(clips, CLASSES_MEASURED),
        )
        trainer.train_step(step, batch)


def print_classifier_bytes(arguments: list[str]) -> None:
    """Print the peak of two steps of a large classifier, above what steps of one clip have left."""
    model = arguments[0]
    if {"recompute", "cnn6"} & set(arguments):
        return_pieces_of_some_kb()
    take_classifier_steps(large_recipe(model, clips_per_step=1), arguments)
    before = resident_bytes()
    take_classifier_steps(measured_classifier_recipe(arguments), arguments)
    print(peak_resident_bytes() - before)
