"""FSD50K (Fonseca et al. 2020, arXiv 2010.00475): 200 of AudioSet's classes, several to a clip; val is left alone."""

from ajepa.tasks.task import Task
from pipeline.vocabularies import fsd50k_classes

TASK = Task(
    name="fsd50k",
    recipe="fsd50k",
    kind="multi",
    classes=fsd50k_classes(),
    train=("train",),
    measured=("eval",),
)
