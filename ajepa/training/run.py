"""Run: one folder with recipe, metrics and checkpoints, from which training carries on exactly."""

import contextlib
import fcntl
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from ajepa.training.checkpoints import (
    BestCheckpoint,
    Checkpoint,
    complete_checkpoints,
    find_best_checkpoint,
    read_checkpoint,
    refuse_full_disk,
    remove_old_checkpoints,
    step_of_folder,
    write_checkpoint,
)
from pipeline.errors import RunError
from pipeline.files import PARTIAL_SUFFIX, replacing_file, sync_to_disk

Json = dict[str, Any]

RUN_FORMAT = 1

RECIPE_FILE, METRICS_FILE, CHECKPOINTS_FOLDER, RUN_LOCK_FILE = (
    "recipe.json",
    "metrics.jsonl",
    "checkpoints",
    "lock",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A folder that says what was trained on what, how it went, and where it stands.

    recipe.json                   recipe; identity of store and features; versions: what `start` compares
    metrics.jsonl                 one JSON object per logged step, ascending
    tensorboard/                  the same for TensorBoard, a file for each time that the run was carried on
    checkpoints/step-00001000/    PART.safetensors for each part, state.json with step, score, sha256 digests
    bad-step-00001000/            what explains a step that ended the run, see `bad_step.py`
    compute.json                  what it has cost up to each checkpoint, see `compute.py`
    evaluation.json               what finetune or evaluate found on its own store, see `stamp.place_of`

    A checkpoint folder is complete or absent; no file needs pickle.
    """

    path: Path
    recipe: Json
    identity: Json
    versions: Json

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run at `path` as it was started; RunError where there is none."""
        if not (path / RECIPE_FILE).is_file():
            raise RunError(
                f"{path}: not a run (no {RECIPE_FILE}); give the --run folder of `ajepa-train pretrain`"
            )
        try:
            told = json.loads((path / RECIPE_FILE).read_text())
        except ValueError:
            raise RunError(
                f"{path / RECIPE_FILE}: damaged (not JSON); restore it, or start another --run"
            ) from None
        if told["format"] != RUN_FORMAT:
            raise RunError(
                f"{path}: run format {told['format']}, this version reads {RUN_FORMAT}; update ajepa"
            )
        return cls(path=path, recipe=told["recipe"], identity=told["identity"], versions=told["versions"])

    @classmethod
    def create_or_open(cls, path: Path, *, recipe: Json, identity: Json) -> Self:
        """Make the run at `path`, or open the one there if recipe and identity are equal to it.

        RunError: another recipe or store (the differences, in one line), or a folder of something else.
        """
        if (path / RECIPE_FILE).is_file():
            run = cls.open(path)
            run.refuse_other_settings({"recipe": recipe, "identity": identity})
            return run
        refuse_foreign_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path=path, recipe=recipe, identity=identity, versions=software_versions())
        told = {"format": RUN_FORMAT, "recipe": recipe, "identity": identity, "versions": run.versions}
        with replacing_file(path / RECIPE_FILE) as scratch:
            scratch.write_text(json.dumps(told, indent=1) + "\n")
        return run

    def refuse_other_settings(self, requested: Json) -> None:
        """RunError naming every value in which `asked` differs from what this run was started with."""
        changes = setting_differences({"recipe": self.recipe, "identity": self.identity}, requested)
        if changes:
            raise RunError(f"{self.path}: is another run ({'; '.join(changes)}); choose another --run")

    @property
    def is_finetuned(self) -> bool:
        """Whether it trained a classifier on a task."""
        return bool(self.recipe["type"] != "Pretrain")

    @contextmanager
    def writing_lock(self) -> Iterator[None]:
        """Keep other processes from writing here; the lock goes with the process, however it ends."""
        with (self.path / RUN_LOCK_FILE).open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another process is training this run; wait for it") from None
            yield

    @property
    def newest_step(self) -> int:
        """Steps behind the newest checkpoint; 0 where there is none."""
        return max((step_of_folder(folder) for folder in self.checkpoint_folders()), default=0)

    @property
    def best_checkpoint(self) -> BestCheckpoint | None:
        """The checkpoint with the highest score of those that were saved with one."""
        return find_best_checkpoint(self.checkpoint_folders())

    @property
    def is_finished(self) -> bool:
        """Whether the newest checkpoint stands at the recipe's last step."""
        return self.newest_step >= self.recipe["steps"]

    def checkpoint_folders(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return complete_checkpoints(self.path / CHECKPOINTS_FOLDER)

    def load_checkpoint(self, *parts: str, at: str | int = "last") -> Checkpoint:
        """A checkpoint (all its parts or those named), on the CPU: `last`, `best`, or that of a step.

        RunError: no such checkpoint, or a damaged one.
        """
        return read_checkpoint(self.checkpoint_folder(at), parts)

    def checkpoint_folder(self, at: str | int) -> Path:
        """Where that checkpoint lies; RunError says which there are."""
        folders = {step_of_folder(folder): folder for folder in self.checkpoint_folders()}
        if not folders:
            raise RunError(f"{self.path}: holds no checkpoint yet; train it first")
        if at == "last":
            return folders[max(folders)]
        if at == "best":
            if self.best_checkpoint is None:
                raise RunError(f"{self.path}: no checkpoint was probed, so none is the best; take last")
            return folders[self.best_checkpoint.step]
        step = int(at) if str(at).isdecimal() else None
        if step not in folders:
            there = ", ".join(map(str, folders))
            raise RunError(f"{self.path}: no checkpoint {at!r}; expected last, best, or a step of {there}")
        return folders[step]

    def save_checkpoint(
        self, checkpoint: Checkpoint, *, keep: int, keep_every: int = 0, score: float | None = None
    ) -> None:
        """Write `checkpoint` whole or not at all, then drop all but the newest `keep`.

        Those at multiples of `keep_every` stay for good, and that with the highest `score` until another has
        a higher one.
        """
        refuse_full_disk(self.path, checkpoint)
        with contextlib.suppress(FileNotFoundError):
            sync_to_disk(self.path / METRICS_FILE)  # its lines must not be younger than the checkpoint
        write_checkpoint(self.path / CHECKPOINTS_FOLDER, checkpoint, score)
        remove_old_checkpoints(self.checkpoint_folders(), keep=keep, keep_every=keep_every)

    def log_metrics(self, line: Json) -> None:
        """Append one line of metrics; it holds at least `step`, and no nan."""
        with (self.path / METRICS_FILE).open("a") as handle:
            handle.write(json.dumps(line, allow_nan=False) + "\n")

    def read_metrics(self) -> list[Json]:
        """Every logged line so far; a last line that a crash cut short does not count."""
        if not (self.path / METRICS_FILE).exists():
            return []
        text = (self.path / METRICS_FILE).read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def rewind_to_checkpoint(self) -> None:
        """Forget what lies past the newest checkpoint, lines and debris, as if it had never been logged."""
        lines = [line for line in self.read_metrics() if line["step"] <= self.newest_step]
        with replacing_file(self.path / METRICS_FILE) as scratch:
            scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for debris in (self.path / CHECKPOINTS_FOLDER).glob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(debris)


def refuse_foreign_folder(path: Path) -> None:
    """RunError where `path` is a file, or a folder that holds anything but a crash's debris."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file; choose another --run")
    held = (
        sorted(file.name for file in path.iterdir() if not file.name.endswith(PARTIAL_SUFFIX))
        if path.exists()
        else []
    )
    if held:
        raise RunError(
            f"{path}: not a run (no {RECIPE_FILE}) and not empty (holds {held[0]}); choose another --run"
        )


def software_versions() -> Json:
    """What computed this run: results are bit for bit only between equal versions."""
    packages = {name: version(name) for name in ("ajepa", "torch", "numpy")}
    return {"python": platform.python_version(), **packages}


def setting_differences(old: Json, new: Json, *, most: int = 4) -> list[str]:
    """What changed from `old` to `new`, each as `path: was X, now Y`; after `most` only how many more."""
    before, after = flatten_to_paths(old), flatten_to_paths(new)
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    told = [f"{key}: was {before.get(key, 'absent')}, now {after.get(key, 'absent')}" for key in keys]
    return told if len(told) <= most else [*told[:most], f"and {len(told) - most} more"]


def flatten_to_paths(value: Any, path: str = "") -> Json:
    """Nested dicts and lists as one dict from dotted path to leaf."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    return {
        leaf: item
        for key, inner in value.items()
        for leaf, item in flatten_to_paths(inner, f"{path}.{key}" if path else key).items()
    }
