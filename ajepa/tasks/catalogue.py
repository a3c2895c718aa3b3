"""Every task by name."""

import difflib

from ajepa.tasks import audioset, esc50, fsd50k, own, speech_commands_v1, speech_commands_v2, voxceleb1_sid
from ajepa.tasks.task import Task
from pipeline.errors import RunError

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        audioset.TASK,
        esc50.TASK,
        fsd50k.TASK,
        speech_commands_v1.TASK,
        speech_commands_v2.TASK,
        voxceleb1_sid.TASK,
        own.TASK,
    )
}


def task(name: str) -> Task:
    """The task of that name; RunError names the nearest and all there are."""
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
    raise RunError(f"task {name!r} is unknown; did you mean {nearest!r}? There are: {', '.join(TASKS)}")
