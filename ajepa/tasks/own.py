"""Your own labels in any store: one or several to a clip, with an eval or test split, or in folds."""

from ajepa.tasks.task import Task

TASK = Task(name="own", recipe="own", kind="any")
