"""Speech Commands v1 (Warden 2018, arXiv 1804.03209): ten commands told apart from each other and from other words.

The published SPC-1 has a twelfth class, silence, cut from recordings of background noise, which a store of the words
does not hold: accuracies on these 11 classes lie near the published ones and are not the same measure.
"""

from ajepa.tasks.task import Task, named_classes
from pipeline.datasets.speech_commands import WORDS

TASK = Task(
    name="speech-commands-v1",
    recipe="speech-commands-v1",
    kind="single",
    classes=named_classes(" ".join(WORDS["v1"])),
    told_apart=("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
    others="unknown",
    train=("train",),
    measured=("test",),
)
