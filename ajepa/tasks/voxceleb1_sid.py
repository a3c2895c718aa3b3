"""VoxCeleb1 (Nagrani et al. 2017, arXiv 1706.08612): whose voice is it, of 1,251 speakers.

Build its store with `ajepa-data build-folder` and a table: `label` the speaker (id10001 to id11251), `split` train,
dev or test after the official iden_split.txt (1, 2, 3).
"""

from ajepa.tasks.task import Task, named_classes

TASK = Task(
    name="voxceleb1-sid",
    recipe="voxceleb1-sid",
    kind="single",
    classes=named_classes(" ".join(f"id{number}" for number in range(10_001, 11_252))),
    train=("train",),
    measured=("test",),
)
