"""Run: one folder with recipe, metrics and checkpoints, from which training carries on exactly."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import RunError
from pipeline.files import PARTIAL, fsync, replacing

Json = dict[str, Any]
FORMAT = 1
RECIPE, METRICS, CHECKPOINTS, STATE, LOCK = (
    "recipe.json",
    "metrics.jsonl",
    "checkpoints",
    "state.json",
    "lock",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What training stands on after `step` steps: named tensors, one safetensors file per part."""

    step: int
    parts: dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A folder that says what was trained on what, how it went, and where it stands.

    recipe.json                   recipe; identity of store and features; versions: what `start` compares
    metrics.jsonl                 one JSON object per logged step, ascending
    checkpoints/step-00001000/    PART.safetensors for each part, state.json with step and sha256 digests
    evaluation.json               what `ajepa-train evaluate` found, where it was run

    A checkpoint folder is complete or absent; no file needs pickle.
    """

    path: Path
    recipe: Json
    identity: Json
    versions: Json

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run at `path` as it was started; RunError where there is none."""
        if not (path / RECIPE).is_file():
            raise RunError(
                f"{path}: not a run (no {RECIPE}); give the --run folder of `ajepa-train pretrain`"
            )
        told = json.loads((path / RECIPE).read_text())
        if told["format"] != FORMAT:
            raise RunError(f"{path}: run format {told['format']}, this version reads {FORMAT}; update ajepa")
        return cls(path=path, recipe=told["recipe"], identity=told["identity"], versions=told["versions"])

    @classmethod
    def start(cls, path: Path, *, recipe: Json, identity: Json) -> Self:
        """Make the run at `path`, or open the one there if recipe and identity are equal to it.

        RunError: another recipe or store (the differences, in one line), or a folder of something else.
        """
        if (path / RECIPE).is_file():
            run = cls.open(path)
            run.refuse_change({"recipe": recipe, "identity": identity})
            return run
        refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path=path, recipe=recipe, identity=identity, versions=versions())
        told = {"format": FORMAT, "recipe": recipe, "identity": identity, "versions": run.versions}
        with replacing(path / RECIPE) as scratch:
            scratch.write_text(json.dumps(told, indent=1) + "\n")
        return run

    def refuse_change(self, asked: Json) -> None:
        """RunError naming every value in which `asked` differs from what this run was started with."""
        changes = differences({"recipe": self.recipe, "identity": self.identity}, asked)
        if changes:
            raise RunError(f"{self.path}: is another run ({'; '.join(changes)}); choose another --run")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here; the lock goes with the process, however it ends."""
        with (self.path / LOCK).open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another process is training this run; wait for it") from None
            yield

    @property
    def step(self) -> int:
        """Steps behind the newest checkpoint; 0 where there is none."""
        return max((step_of(folder) for folder in self.checkpoints()), default=0)

    @property
    def finished(self) -> bool:
        """Whether the newest checkpoint stands at the recipe's last step."""
        return self.step >= self.recipe["steps"]

    def checkpoints(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return sorted((self.path / CHECKPOINTS).glob("step-" + "[0-9]" * 8))

    def load(self, *parts: str) -> Checkpoint:
        """The newest checkpoint (all its parts or those named), on the CPU. RunError: none, or damaged."""
        if not self.checkpoints():
            raise RunError(f"{self.path}: holds no checkpoint yet; run `ajepa-train pretrain` on it first")
        folder = self.checkpoints()[-1]
        state = json.loads((folder / STATE).read_text())
        names = parts or tuple(state["sha256"])
        for name in names:
            refuse_damage(folder / f"{name}.safetensors", state["sha256"][name])
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in names}
        return Checkpoint(step=state["step"], parts=tensors)

    def save(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Write `checkpoint` whole or not at all, then drop all but the newest `keep`."""
        refuse_full_disk(self.path, checkpoint)
        fsync_if_there(self.path / METRICS)  # its lines must not be younger than the checkpoint
        place = self.path / CHECKPOINTS / f"step-{checkpoint.step:08d}"
        place.parent.mkdir(exist_ok=True)
        scratch = place.with_name(f"{place.name}.{os.getpid()}{PARTIAL}")
        scratch.mkdir()
        write_parts(scratch, checkpoint)
        scratch.rename(place)
        fsync(place.parent)
        for folder in self.checkpoints()[:-keep]:
            # renamed first: a crash halfway through must not leave a folder that looks like a checkpoint
            shutil.rmtree(folder.rename(folder.with_name(folder.name + PARTIAL)))

    def log(self, line: Json) -> None:
        """Append one line of metrics; it holds at least `step`, and no nan."""
        with (self.path / METRICS).open("a") as handle:
            handle.write(json.dumps(line, allow_nan=False) + "\n")

    def metrics(self) -> list[Json]:
        """Every logged line so far; a last line that a crash cut short does not count."""
        if not (self.path / METRICS).exists():
            return []
        text = (self.path / METRICS).read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def rewind(self) -> None:
        """Forget what lies past the newest checkpoint, lines and debris, as if it had never been logged."""
        lines = [line for line in self.metrics() if line["step"] <= self.step]
        with replacing(self.path / METRICS) as scratch:
            scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for debris in (self.path / CHECKPOINTS).glob(f"*{PARTIAL}"):
            shutil.rmtree(debris)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def refuse_full_disk(path: Path, checkpoint: Checkpoint) -> None:
    """RunError where `checkpoint` does not fit beside the older ones, which go only once it is whole."""
    needed = sum(tensor.nbytes for part in checkpoint.parts.values() for tensor in part.values())
    free = shutil.disk_usage(path).free
    if needed > free:
        told = f"step {checkpoint.step} needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise RunError(
            f"{path}: no space for the checkpoint ({told}); make room, then run the same command again"
        )


def write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    """Every part and then `state.json` with their digests, each forced to the disk."""
    digests = {}
    for name, tensors in checkpoint.parts.items():
        file = folder / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)
        fsync(file)
        digests[name] = digest(file)
    (folder / STATE).write_text(json.dumps({"format": FORMAT, "step": checkpoint.step, "sha256": digests}))
    fsync(folder / STATE)
    fsync(folder)


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def refuse_damage(file: Path, expected: str) -> None:
    """RunError where the bytes of `file` are not those that were written."""
    if not file.is_file() or digest(file) != expected:
        raise RunError(
            f"{file}: damaged (its digest differs); remove {file.parent} to go back to the one before"
        )


def refuse_foreign(path: Path) -> None:
    """RunError where `path` is a file, or a folder that holds anything but a crash's debris."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file; choose another --run")
    held = (
        sorted(file.name for file in path.iterdir() if not file.name.endswith(PARTIAL))
        if path.exists()
        else []
    )
    if held:
        raise RunError(
            f"{path}: not a run (no {RECIPE}) and not empty (holds {held[0]}); choose another --run"
        )


def fsync_if_there(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        fsync(path)


def versions() -> Json:
    """What computed this run: results are bit for bit only between equal versions."""
    packages = {name: version(name) for name in ("ajepa", "torch", "numpy")}
    return {"python": platform.python_version(), **packages}


def differences(old: Json, new: Json, *, most: int = 4) -> list[str]:
    """What changed from `old` to `new`, each as `path: was X, now Y`; after `most` only how many more."""
    before, after = flat(old), flat(new)
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    told = [f"{key}: was {before.get(key, 'absent')}, now {after.get(key, 'absent')}" for key in keys]
    return told if len(told) <= most else [*told[:most], f"and {len(told) - most} more"]


def flat(value: Any, path: str = "") -> Json:
    """Nested dicts and lists as one dict from dotted path to leaf."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    return {
        leaf: item
        for key, inner in value.items()
        for leaf, item in flat(inner, f"{path}.{key}" if path else key).items()
    }
