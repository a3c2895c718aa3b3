"""Speech Commands v2 (Warden 2018, arXiv 1804.03209): all 35 words told apart."""

from ajepa.tasks.task import Task, named_classes
from pipeline.datasets.speech_commands import WORDS

TASK = Task(
    name="speech-commands-v2",
    recipe="speech-commands-v2",
    kind="single",
    classes=named_classes(" ".join(WORDS["v2"])),
    train=("train",),
    measured=("test",),
)
