"""Metrics to the services that people watch: TensorBoard always, W&B and MLflow on request; their only user.

Both are optional: `pip install 'ajepa[wandb]'`, `pip install 'ajepa[mlflow]'`. Address, project and credentials are
found as these libraries find them (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ...). A run
that is carried on goes on in the same place, whose ids RUN/loggers.json keeps.
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Self

from ajepa.training.run import Json, Run, flatten_to_paths
from ajepa.training.tensorboard import open_event_writer, write_scalars
from pipeline.errors import RunError
from pipeline.files import replacing_file
from pipeline.messages import suggest_known

EVENTS_FOLDER = "tensorboard"

# The ids of the run in each service, by the name of the logger.
LOGGER_IDS_FILE = "loggers.json"

# The name of project and experiment where the environment names none.
DEFAULT_PROJECT = "ajepa"

# MLflow takes at most this many settings at a time, each with at most so many letters.
MLFLOW_PARAMS_PER_CALL = 100
MLFLOW_PARAM_LETTERS = 500


class MetricLogger(Protocol):
    """A service, or a library, that is given the metrics of a run."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Take the numbers of a step; a step may come again after a kill, with the same numbers."""

    def close(self) -> None:
        """Send what is still held in memory."""


class WandbLogger:
    """Weights & Biases: project WANDB_PROJECT or `ajepa`, with the recipe as configuration."""

    def __init__(self, run: Run, run_id: str | None) -> None:
        wandb = import_logger("wandb")
        self.run_id = run_id or uuid.uuid4().hex[:16]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
                name=run.path.name,
                id=self.run_id,
                resume="allow",
                dir=str(run.path),
                config=run.settings(),
            )
        except wandb.Error as error:
            raise RunError(
                f"--logger wandb: {first_line(error)}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger:
    """MLflow: experiment MLFLOW_EXPERIMENT_NAME or `ajepa`, with the recipe's fields as parameters."""

    def __init__(self, run: Run, run_id: str | None) -> None:
        self._mlflow = import_logger("mlflow")
        try:
            self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_PROJECT))
            started = self._mlflow.start_run(run_id=run_id, run_name=None if run_id else run.path.name)
        except self._mlflow.MlflowException as error:
            raise RunError(
                f"--logger mlflow: {first_line(error)}; check MLFLOW_TRACKING_URI, or delete "
                f"{run.path / LOGGER_IDS_FILE} to begin a new one there"
            ) from None
        self.run_id = str(started.info.run_id)

        # Parameters are written once: MLflow refuses to change them.
        if run_id is None:
            params = {
                key: str(value)[:MLFLOW_PARAM_LETTERS] for key, value in flatten_to_paths(run.recipe).items()
            }
            names = sorted(params)
            for start in range(0, len(names), MLFLOW_PARAMS_PER_CALL):
                chosen = names[start : start + MLFLOW_PARAMS_PER_CALL]
                self._mlflow.log_params({name: params[name] for name in chosen})

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


LOGGERS: dict[str, Callable[[Run, str | None], Any]] = {"wandb": WandbLogger, "mlflow": MlflowLogger}

# TensorBoard files are always written.
LOGGER_NAMES = (*LOGGERS, "tensorboard")


def refuse_missing_loggers(names: Sequence[str]) -> None:
    """Raise RunError for an unknown logger, and for one whose library is not installed, with the command to run."""
    for name in names:
        if name not in LOGGER_NAMES:
            raise RunError(f"logger {name!r} is unknown; {suggest_known(name, LOGGER_NAMES)}")
        if name in LOGGERS:
            import_logger(name)


def import_logger(name: str) -> ModuleType:
    """Import a library; RunError with the command that installs it if it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise RunError(f"--logger {name} needs {name}; run: pip install 'ajepa[{name}]'") from None


class MetricWriters:
    """The TensorBoard file of a run and its other loggers, for the steps after `first_step`; use it in a `with`."""

    def __init__(self, run: Run, first_step: int, names: Sequence[str] = ()) -> None:
        refuse_missing_loggers(names)
        self._run = run
        self._names = [name for name in dict.fromkeys(names) if name in LOGGERS]
        self._events = open_event_writer(run.path / EVENTS_FOLDER, first_step + 1)
        self._loggers: list[MetricLogger] = []
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            opened.enter_context(self._events)
            ids = read_logger_ids(self._run.path)
            for name in self._names:
                logger = LOGGERS[name](self._run, ids.get(name))
                opened.callback(logger.close)
                self._loggers.append(logger)
                ids[name] = logger.run_id
                with replacing_file(self._run.path / LOGGER_IDS_FILE) as scratch:
                    scratch.write_text(json.dumps(ids, indent=1) + "\n")

            # All are open: they are closed at the end of the block that uses this.
            self._exit = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def write(self, step: int, line: Json) -> None:
        """Write the numbers of a line of metrics, each under its name."""
        write_scalars(self._events, step, line)
        numbers = {
            name: float(value)
            for name, value in line.items()
            if isinstance(value, int | float) and name != "step"
        }
        for logger in self._loggers:
            logger.log(step, numbers)

    def flush(self) -> None:
        """Write the events still held in memory: a kill after it loses none of them."""
        self._events.flush()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without the point at its end."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def read_logger_ids(run_path: Path) -> dict[str, str]:
    """Return the ids of a run in each service, by the name of the logger; empty if it has none."""
    file = run_path / LOGGER_IDS_FILE
    ids: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    return ids
