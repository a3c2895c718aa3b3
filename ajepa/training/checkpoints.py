"""Checkpoint: a folder of safetensors with digests, whole or absent; which of them stay."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import RunError
from pipeline.files import PARTIAL_SUFFIX, sync_to_disk

CHECKPOINT_FORMAT = 1

STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What training stands on after `step` steps: named tensors, one safetensors file per part."""

    step: int
    parts: dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class BestCheckpoint:
    """The score of a checkpoint (the higher, the better), and its step."""

    score: float
    step: int


def step_of_folder(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def complete_checkpoints(parent: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return sorted(parent.glob("step-" + "[0-9]" * 8))


def find_best_checkpoint(folders: Sequence[Path]) -> BestCheckpoint | None:
    """The highest score that any was written with, of equal ones the latest."""
    scores = (
        (step_of_folder(folder), json.loads((folder / STATE_FILE).read_text()).get("score"))
        for folder in folders
    )
    return max(
        (BestCheckpoint(score=score, step=step) for step, score in scores if score is not None), default=None
    )


def read_checkpoint(folder: Path, parts: Sequence[str] = ()) -> Checkpoint:
    """The parts named, or all; RunError where their bytes are not those that were written."""
    state = json.loads((folder / STATE_FILE).read_text())
    names = parts or tuple(state["sha256"])
    for name in names:
        refuse_damaged_part(folder / f"{name}.safetensors", state["sha256"][name])
    return Checkpoint(
        step=state["step"], parts={name: load_file(folder / f"{name}.safetensors") for name in names}
    )


def write_checkpoint(parent: Path, checkpoint: Checkpoint, score: float | None) -> None:
    """Write `checkpoint` into a folder of its own, whole or not at all, its score with it."""
    place = parent / f"step-{checkpoint.step:08d}"
    parent.mkdir(exist_ok=True)
    scratch = place.with_name(f"{place.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    scratch.mkdir()
    write_checkpoint_parts(scratch, checkpoint, score)
    scratch.rename(place)
    sync_to_disk(parent)


def write_checkpoint_parts(folder: Path, checkpoint: Checkpoint, score: float | None) -> None:
    """Every part and then `state.json` with their digests, each forced to the disk."""
    digests = {}
    for name, tensors in checkpoint.parts.items():
        file = folder / f"{name}.safetensors"
        write_safetensors(file, tensors)
        sync_to_disk(file)
        digests[name] = checkpoint_file_sha256(file)
    state = {"format": CHECKPOINT_FORMAT, "step": checkpoint.step, "score": score, "sha256": digests}
    (folder / STATE_FILE).write_text(json.dumps(state))
    sync_to_disk(folder / STATE_FILE)
    sync_to_disk(folder)


def write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, readable by whom other files are; OSError where the disk is full, as of any other file."""
    file.touch()
    mode = file.stat().st_mode  # safetensors would shut out all but its owner
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file, metadata)
    except SafetensorError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None
    file.chmod(mode)


def remove_old_checkpoints(folders: Sequence[Path], *, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep`, the best, and those at multiples of `keep_every` (0: none)."""
    best = find_best_checkpoint(folders)
    for folder in folders[:-keep]:
        step = step_of_folder(folder)
        if (best and step == best.step) or (keep_every and step % keep_every == 0):
            continue
        # renamed first: a crash halfway through must not leave a folder that looks like a checkpoint
        shutil.rmtree(folder.rename(folder.with_name(folder.name + PARTIAL_SUFFIX)))


def refuse_full_disk(path: Path, checkpoint: Checkpoint) -> None:
    """RunError where `checkpoint` does not fit beside the older ones, which go only once it is whole."""
    needed = sum(tensor.nbytes for part in checkpoint.parts.values() for tensor in part.values())
    free = shutil.disk_usage(path).free
    if needed > free:
        told = f"step {checkpoint.step} needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise RunError(
            f"{path}: no space for the checkpoint ({told}); make room, then run the same command again"
        )


def checkpoint_file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def refuse_damaged_part(file: Path, expected: str) -> None:
    """RunError where the bytes of `file` are not those that were written."""
    if not file.is_file() or checkpoint_file_sha256(file) != expected:
        raise RunError(
            f"{file}: damaged (its digest differs); remove {file.parent} to go back to the one before"
        )
