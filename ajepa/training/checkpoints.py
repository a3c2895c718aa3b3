"""Checkpoints: folders of safetensors with digests, each whole or absent, and the rule which of them stay."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import RunError
from pipeline.files import PARTIAL_SUFFIX, sync_to_disk

# Format 1 had neither `precision` nor `scored_on`: its scores are those of clips of evaluation splits.
CHECKPOINT_FORMAT = 2

STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything that training needs to go on after `step` steps: named tensors, one safetensors file per part.

    precision  the numbers that the last steps were computed in: fp32, bf16 or fp16; None: not recorded
    """

    step: int
    parts: dict[str, dict[str, Tensor]]
    precision: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class BestCheckpoint:
    """The score of a checkpoint (the higher, the better), and its step.

    is_held_back  whether clips were scored that no result is measured on. Checkpoints of before were scored on clips of
                  evaluation splits; they count only where there is no other
    """

    is_held_back: bool = True
    score: float
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointScore:
    """The score of a checkpoint by which the best is chosen, and the clips that it was measured on, in words."""

    value: float
    clips: str


def step_of_folder(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def complete_checkpoints(parent: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return sorted(parent.glob("step-" + "[0-9]" * 8))


def find_best_checkpoint(folders: Sequence[Path]) -> BestCheckpoint | None:
    """The checkpoint with the highest score, of equal ones the latest; None where none was written with a score."""
    scored = []
    for folder in folders:
        state = json.loads((folder / STATE_FILE).read_text())
        if (score := state.get("score")) is not None:
            is_held_back = state.get("scored_on") is not None
            scored.append(BestCheckpoint(is_held_back=is_held_back, score=score, step=step_of_folder(folder)))
    return max(scored, default=None)


def read_checkpoint(folder: Path, parts: Sequence[str] = ()) -> Checkpoint:
    """The named parts of a checkpoint, or all of them; RunError where a file's bytes have changed."""
    state = read_checkpoint_state(folder)
    names = parts or tuple(state["sha256"])

    # Check every part before the first is loaded.
    for name in names:
        refuse_damaged_part(folder / f"{name}.safetensors", state["sha256"][name])
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in names}
    return Checkpoint(step=state["step"], parts=tensors, precision=state.get("precision"))


def read_checkpoint_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`; RunError where a newer version wrote it."""
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    if state["format"] > CHECKPOINT_FORMAT:
        raise RunError(
            f"{folder}: checkpoint format {state['format']}, this version reads {CHECKPOINT_FORMAT}; update ajepa"
        )
    return state


def write_checkpoint(parent: Path, checkpoint: Checkpoint, score: CheckpointScore | None) -> None:
    """Write `checkpoint` and its score into a folder of its own, whole or not at all."""
    # Write beside the place of the checkpoint. A rename within a folder happens at once or not at all.
    folder = parent / f"step-{checkpoint.step:08d}"
    parent.mkdir(exist_ok=True)
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    scratch.mkdir()
    write_checkpoint_parts(scratch, checkpoint, score)
    scratch.rename(folder)
    sync_to_disk(parent)


def write_checkpoint_parts(folder: Path, checkpoint: Checkpoint, score: CheckpointScore | None) -> None:
    """Write every part and then `state.json` with the digests, each forced to the disk."""
    # Force each part to the disk, then take the digest of its file.
    digests = {}
    for name, tensors in checkpoint.parts.items():
        file = folder / f"{name}.safetensors"
        write_safetensors(file, tensors)
        sync_to_disk(file)
        digests[name] = checkpoint_file_sha256(file)

    # The state comes last, because it holds the digests.
    state = {
        "format": CHECKPOINT_FORMAT,
        "step": checkpoint.step,
        "score": score and score.value,
        "scored_on": score and score.clips,
        "precision": checkpoint.precision,
        "sha256": digests,
    }
    (folder / STATE_FILE).write_text(json.dumps(state))
    sync_to_disk(folder / STATE_FILE)
    sync_to_disk(folder)


def write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other file; OSError where the disk is full."""
    # safetensors would let only the owner read it: take the permissions that an empty file gets.
    file.touch()
    mode = file.stat().st_mode

    # A full disk becomes the OSError that other files raise for it.
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        save_file(contiguous, file, metadata)
    except SafetensorError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None
    file.chmod(mode)


def remove_old_checkpoints(folders: Sequence[Path], *, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep`, the best, a warm start (step 0), and multiples of `keep_every` (0: none)."""
    best = find_best_checkpoint(folders)
    for folder in folders[:-keep]:
        step = step_of_folder(folder)
        is_best = best is not None and step == best.step
        if is_best or step == 0 or (keep_every and step % keep_every == 0):
            continue
        # Rename first: a crash halfway through must not leave a folder that looks like a checkpoint.
        shutil.rmtree(folder.rename(folder.with_name(folder.name + PARTIAL_SUFFIX)))


def refuse_full_disk(path: Path, checkpoint: Checkpoint) -> None:
    """RunError where `checkpoint` does not fit beside the older ones, which go only once it is whole."""
    needed_bytes = sum(tensor.nbytes for part in checkpoint.parts.values() for tensor in part.values())
    free_bytes = shutil.disk_usage(path).free
    if needed_bytes > free_bytes:
        raise RunError(
            f"{path}: no space for the checkpoint (step {checkpoint.step} needs {needed_bytes / 1e6:.0f} MB, "
            f"{free_bytes / 1e6:.0f} MB are free); make room, then run the same command again"
        )


def checkpoint_file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def refuse_damaged_part(file: Path, expected: str) -> None:
    """RunError where `file` is missing, or its digest is not the one that was written with it."""
    if not file.is_file() or checkpoint_file_sha256(file) != expected:
        raise RunError(
            f"{file}: damaged (its digest differs); remove {file.parent} to go back to the checkpoint before it"
        )
