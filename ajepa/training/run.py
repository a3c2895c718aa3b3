"""The run folder: recipe, metrics and checkpoints, from which training carries on exactly."""

import contextlib
import json
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from ajepa.recipes.catalogue import upgrade_recipe_json
from ajepa.training.checkpoints import (
    BestCheckpoint,
    Checkpoint,
    CheckpointScore,
    complete_checkpoints,
    find_best_checkpoint,
    read_checkpoint,
    refuse_full_disk,
    remove_old_checkpoints,
    step_of_folder,
    write_checkpoint,
)
from ajepa.training.run_identity import RunIdentity, TaskIdentity
from ajepa.training.run_phases import CHANGEABLE_FIELDS, RunPhase, append_phase
from ajepa.training.trained_stores import TrainedStore
from pipeline.errors import InputError, RunError
from pipeline.files import PARTIAL_SUFFIX, lock_if_free, replacing_file, sync_to_disk

Json = dict[str, Any]

# Format 2 added phases, precision and the provenance of a warm start; a run of format 1 has one phase.
RUN_FORMAT = 2

READABLE_FORMATS = (1, 2)

RECIPE_FILE = "recipe.json"

METRICS_FILE = "metrics.jsonl"

CHECKPOINTS_FOLDER = "checkpoints"

BAD_STEP_PREFIX = "bad-step-"

RUN_LOCK_FILE = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A folder that says what was trained on which data, how training went, and where it stands.

    recipe.json                   recipe, identity of the data, versions; `create_or_open` compares the first two;
                                  every earlier phase, with its recipe, precision and first step
    metrics.jsonl                 one JSON object per logged step, ascending
    tensorboard/                  the same for TensorBoard, a file for each time that the run was carried on
    checkpoints/step-00001000/    PART.safetensors for each part; state.json with step, precision, score, the clips that
                                  the score was measured on, and SHA-256 digests
    bad-step-00001000/            the clips and draws of a step that was not taken, see `BadStep`
    features.json                 the pooling and layer that probes found best, see `FeatureChoice`
    compute.json                  the cost of the run up to each checkpoint, see `ComputeMeter`
    evaluation.json               scores on the run's own store, written by finetune or evaluate

    A checkpoint folder is complete or absent; no file needs pickle.

    recipe, precision, versions  of the phase that began after `first_step`: the last one
    earlier_phases               those before it, oldest first
    warm_start                   where the first weights come from, as plain values; None: drawn by the recipe's seed
    trained_stores               stores that trained the weights, those of an earlier run first; empty: not recorded
    run_format                   of the recipe.json
    """

    path: Path
    recipe: Json
    identity: RunIdentity
    versions: Json
    precision: str | None = None
    first_step: int = 0
    earlier_phases: tuple[RunPhase, ...] = ()
    warm_start: Json | None = None
    trained_stores: tuple[TrainedStore, ...] = ()
    run_format: int = RUN_FORMAT

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run at `path` as it was started; RunError where there is none."""
        # A folder is a run if it holds a recipe.
        recipe_path = path / RECIPE_FILE
        if not recipe_path.is_file():
            raise RunError(
                f"{path}: not a run (no {RECIPE_FILE}); give the --run folder of `ajepa-train pretrain`"
            )

        # Read the recipe file.
        try:
            record = json.loads(recipe_path.read_text())
        except ValueError:
            raise RunError(f"{recipe_path}: damaged (not JSON); restore it, or start another --run") from None

        # Refuse what this version does not understand.
        if record["format"] not in READABLE_FORMATS:
            readable = " and ".join(map(str, READABLE_FORMATS))
            raise RunError(
                f"{path}: run format {record['format']}, this version reads {readable}; update ajepa"
            )
        try:
            identity = RunIdentity.from_json(record["identity"])
        except InputError as error:
            raise RunError(f"{recipe_path}: {error}") from None
        return cls(
            path=path,
            recipe=upgrade_recipe_json(record["recipe"]),
            identity=identity,
            versions=record["versions"],
            precision=record.get("precision"),
            first_step=record.get("first_step", 0),
            earlier_phases=tuple(RunPhase.from_json(phase) for phase in record.get("earlier_phases", ())),
            warm_start=record.get("warm_start"),
            trained_stores=tuple(TrainedStore.from_json(store) for store in record.get("trained_stores", ())),
            run_format=record["format"],
        )

    @classmethod
    def create_or_open(
        cls,
        path: Path,
        *,
        recipe: Json,
        identity: RunIdentity,
        precision: str | None = None,
        warm_start: Json | None = None,
        trained_stores: Sequence[TrainedStore] = (),
    ) -> Self:
        """Make the run at `path`, or open the run that is there if it may be carried on with this recipe and identity.

        RunError: another recipe or store (the differences, in one line), or a folder of something else.
        """
        # Carry on with the run that is there.
        if (path / RECIPE_FILE).is_file():
            run = cls.open(path)
            run.refuse_other_settings(recipe, identity)
            return run

        # Start a new one.
        refuse_foreign_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(
            path=path,
            recipe=recipe,
            identity=identity,
            versions=software_versions(),
            precision=precision,
            warm_start=warm_start,
            trained_stores=tuple(trained_stores),
        )
        run.write_record()
        return run

    def write_record(self) -> None:
        """Write recipe.json, whole or not at all."""
        record = {"format": RUN_FORMAT, **self.settings(), "versions": self.versions}
        record |= {"precision": self.precision, "first_step": self.first_step}
        record["earlier_phases"] = [phase.to_json() for phase in self.earlier_phases]
        if self.warm_start is not None:
            record["warm_start"] = self.warm_start
        if self.trained_stores:
            record["trained_stores"] = [store.to_json() for store in self.trained_stores]
        with replacing_file(self.path / RECIPE_FILE) as scratch:
            scratch.write_text(json.dumps(record, indent=1) + "\n")

    def settings(self) -> Json:
        """Recipe and identity as plain values, as they stand in recipe.json."""
        return {"recipe": self.recipe, "identity": self.identity.to_json()}

    def refuse_other_settings(self, recipe: Json, identity: RunIdentity) -> None:
        """RunError, naming the differences, where this run may not be carried on with this recipe and identity.

        After a bad step that is not passed yet, the CHANGEABLE_FIELDS may differ.
        """
        old = self.settings()
        new = {"recipe": recipe, "identity": identity.to_json()}
        changed = changed_paths(old, new)
        changeable = {f"recipe.{field}" for field in CHANGEABLE_FIELDS}
        if not changed or (self.stopping_step and changeable.issuperset(changed)):
            return
        changes = "; ".join(setting_differences(old, new))
        advice = "choose another --run"
        if self.recipe.get("type") == "Pretrain":
            advice += f", which may begin from this one: --from {self.path}"
        raise RunError(f"{self.path}: is another run ({changes}); {advice}")

    def begin_phase(self, recipe: Json, precision: str | None) -> Self:
        """The run with the recipe and precision that train it from its newest checkpoint on, recorded if they changed.

        A run of format 1 did not record its precision, and a change of that alone does not rewrite it.
        """
        is_same_precision = precision is None or self.precision in (None, precision)
        if recipe == self.recipe and is_same_precision:
            return self

        # Record the phases, of which the last is the run's own.
        new = RunPhase(
            first_step=self.newest_step,
            recipe=recipe,
            precision=precision or self.precision,
            versions=software_versions(),
        )
        *earlier, last = append_phase(self.phases, new)
        run = replace(
            self,
            recipe=last.recipe,
            precision=last.precision,
            versions=last.versions,
            first_step=last.first_step,
            earlier_phases=tuple(earlier),
            run_format=RUN_FORMAT,
        )
        run.write_record()
        return run

    @property
    def phases(self) -> tuple[RunPhase, ...]:
        """Every phase of the run, oldest first."""
        last = RunPhase(
            first_step=self.first_step, recipe=self.recipe, precision=self.precision, versions=self.versions
        )
        return (*self.earlier_phases, last)

    def describe_phase(self) -> str | None:
        """What the last phase has that the phase before it had not, in words; None where there is but one."""
        if not self.earlier_phases:
            return None
        before, now = ({"recipe": phase.recipe, "precision": phase.precision} for phase in self.phases[-2:])
        return f"from step {self.first_step} on with {'; '.join(setting_differences(before, now))}"

    @property
    def stopping_step(self) -> int | None:
        """The number of the bad step that lies past the newest checkpoint; None where there is none."""
        steps = [int(folder.name.removeprefix(BAD_STEP_PREFIX)) for folder in self.bad_step_folders()]
        return max((step for step in steps if step > self.newest_step), default=None)

    def bad_step_folders(self) -> list[Path]:
        """Folders of steps that were not taken, oldest first."""
        return sorted(self.path.glob(f"{BAD_STEP_PREFIX}*"))

    @property
    def is_finetuned(self) -> bool:
        """Whether the run trained a classifier on a task."""
        return bool(self.recipe["type"] != "Pretrain")

    @property
    def task_identity(self) -> TaskIdentity:
        """The task of a fine-tuned run; RunError where the run was pre-trained."""
        if self.identity.task_identity is None:
            raise RunError(f"{self.path}: was pre-trained and has no task; fine-tune it first")
        return self.identity.task_identity

    @contextmanager
    def writing_lock(self) -> Iterator[None]:
        """Keep other processes from writing here; the lock goes with the process, however it ends."""
        with lock_if_free(self.path / RUN_LOCK_FILE) as is_locked:
            if not is_locked:
                raise RunError(f"{self.path}: another process is training this run; wait for it")
            yield

    @property
    def newest_step(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        return max((step_of_folder(folder) for folder in self.checkpoint_folders()), default=0)

    @property
    def best_checkpoint(self) -> BestCheckpoint | None:
        """The checkpoint with the highest score of all that were saved with one."""
        return find_best_checkpoint(self.checkpoint_folders())

    def checkpoint_folders(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return complete_checkpoints(self.path / CHECKPOINTS_FOLDER)

    def load_checkpoint(self, *parts: str, at: str | int = "last") -> Checkpoint:
        """A checkpoint on the CPU, all its parts or the named ones; `at` is `last`, `best`, or a step.

        RunError: there is no such checkpoint, or it is damaged.
        """
        return read_checkpoint(self.checkpoint_folder(at), parts)

    def checkpoint_folder(self, at: str | int) -> Path:
        """The folder of a checkpoint; RunError, with the steps that there are, where it does not exist."""
        # All complete checkpoints, by their step.
        folders = {step_of_folder(folder): folder for folder in self.checkpoint_folders()}
        if not folders:
            raise RunError(f"{self.path}: holds no checkpoint yet; train it first")

        # The newest, or the one with the best score.
        if at == "last":
            return folders[max(folders)]
        if at == "best":
            if self.best_checkpoint is None:
                raise RunError(f"{self.path}: no checkpoint was probed, so none is the best; take last")
            return folders[self.best_checkpoint.step]

        # The one of a step, which the command line gives as text.
        step = int(at) if str(at).isdecimal() else None
        if step not in folders:
            steps = ", ".join(map(str, folders))
            raise RunError(f"{self.path}: no checkpoint {at!r}; expected last, best, or a step of {steps}")
        return folders[step]

    def save_checkpoint(
        self, checkpoint: Checkpoint, *, keep: int, keep_every: int = 0, score: CheckpointScore | None = None
    ) -> None:
        """Write `checkpoint` whole or not at all, then remove all but the newest `keep`.

        Checkpoints at multiples of `keep_every` stay for good; the one with the highest `score` stays until another
        has a higher one.
        """
        # The older checkpoints stay until the new one is whole, so all of them must fit.
        refuse_full_disk(self.path, checkpoint)

        # The logged lines must not reach the disk after the checkpoint. A run may not have logged any yet.
        with contextlib.suppress(FileNotFoundError):
            sync_to_disk(self.path / METRICS_FILE)

        # Write the new one, then remove old ones.
        write_checkpoint(self.path / CHECKPOINTS_FOLDER, checkpoint, score)
        remove_old_checkpoints(self.checkpoint_folders(), keep=keep, keep_every=keep_every)

    def log_metrics(self, line: Json) -> None:
        """Append one line of metrics; it holds at least `step`, and no nan."""
        with (self.path / METRICS_FILE).open("a") as handle:
            handle.write(json.dumps(line, allow_nan=False) + "\n")

    def read_metrics(self) -> list[Json]:
        """Every logged line so far, without a last line that a crash cut short."""
        if not (self.path / METRICS_FILE).exists():
            return []

        # A line without its newline was cut short.
        text = (self.path / METRICS_FILE).read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def rewind_to_checkpoint(self) -> None:
        """Remove logged lines past the newest checkpoint, and half-written checkpoints."""
        # Steps past the checkpoint will be taken, and logged, again.
        lines = [line for line in self.read_metrics() if line["step"] <= self.newest_step]
        with replacing_file(self.path / METRICS_FILE) as scratch:
            scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))

        # What a kill left of a checkpoint that was being written or removed.
        for debris in (self.path / CHECKPOINTS_FOLDER).glob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(debris)


def refuse_foreign_folder(path: Path) -> None:
    """RunError where `path` is a file, or a folder that holds anything but a crash's debris."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path}: is a file; choose another --run")

    # A kill may have left a recipe half-written: such a folder is still a new one.
    names = sorted(file.name for file in path.iterdir() if not file.name.endswith(PARTIAL_SUFFIX))
    if names:
        raise RunError(
            f"{path}: not a run (no {RECIPE_FILE}) and not empty (holds {names[0]}); choose another --run"
        )


def software_versions() -> Json:
    """The versions that a run depends on: results are equal bit for bit only between equal versions."""
    packages = {name: version(name) for name in ("ajepa", "torch", "numpy")}
    return {"python": platform.python_version(), **packages}


def setting_differences(old: Json, new: Json, *, most: int = 4) -> list[str]:
    """The changes from `old` to `new`, each as `path: was X, now Y`; past `most` of them only how many more."""
    # Say what changed, but not everything of another recipe.
    old_values = flatten_to_paths(old)
    new_values = flatten_to_paths(new)
    lines = [
        f"{key}: was {old_values.get(key, 'absent')}, now {new_values.get(key, 'absent')}"
        for key in changed_paths(old, new)
    ]
    if len(lines) > most:
        return [*lines[:most], f"and {len(lines) - most} more"]
    return lines


def changed_paths(old: Json, new: Json) -> list[str]:
    """The dotted path of every leaf that differs."""
    # `|` keeps the order of the old values, new keys come after them.
    old_values = flatten_to_paths(old)
    new_values = flatten_to_paths(new)
    return [key for key in old_values | new_values if old_values.get(key) != new_values.get(key)]


def flatten_to_paths(value: Any, path: str = "") -> Json:
    """Nested dicts and lists as one dict from dotted path to leaf."""
    # An index is the key of a list's item.
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    leaves: Json = {}
    for key, inner in value.items():
        leaves |= flatten_to_paths(inner, f"{path}.{key}" if path else key)
    return leaves
