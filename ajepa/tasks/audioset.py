"""AudioSet (Gemmeke et al. 2017): 527 classes, several to a clip; 2M or 20k is a matter of the store and the recipe."""

from ajepa.tasks.task import Task
from pipeline.ontology import load_class_list

TASK = Task(
    name="audioset",
    recipe="audioset-20k",
    kind="multi",
    classes=load_class_list(),
    measured=("eval",),
)
