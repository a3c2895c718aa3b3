"""Task: the classes, the train splits and the eval splits of a downstream task; and every task by name."""

from dataclasses import dataclass
from typing import Literal

from pipeline.datasets.speech_commands import SPEECH_COMMANDS_WORDS
from pipeline.errors import RunError
from pipeline.labels.ontology import ClassList, fsd50k_classes, load_class_list
from pipeline.messages import suggest_known

TaskLabelKind = Literal["single", "multi", "any"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A downstream task.

    recipe            name of the task's fine-tuning recipe
    kind              single: each clip has one class, measured by accuracy; multi: any number, measured by mAP;
                      any: single if each clip has exactly one label, else multi
    classes           classes that a store must have, in the order of the head; None: those of its training clips
    distinct_classes  classes that are predicted separately; all other classes of the store are merged into
                      `other_class`; empty: no class is merged
    other_class       name of the merged class
    train_splits      splits to train on; empty: all splits except the measured ones
    eval_splits       splits to measure; empty: `eval`, or else the splits whose names contain eval or test
    fold_count        number of folds (splits fold1, fold2, ...); each fold is measured once, after training on the
                      others; 0: no folds. If `classes` is None, a store that has only folds is cross-validated too
    """

    name: str
    recipe: str
    kind: TaskLabelKind
    classes: ClassList | None = None
    distinct_classes: tuple[str, ...] = ()
    other_class: str = "others"
    train_splits: tuple[str, ...] = ()
    eval_splits: tuple[str, ...] = ()
    fold_count: int = 0


def class_list_from_words(text: str) -> ClassList:
    """The classes named in `text`, separated by spaces; a class's id is its word, with underscores for spaces."""
    words = tuple(text.split())
    return ClassList(mids=words, names=tuple(word.replace("_", " ") for word in words))


# AudioSet (Gemmeke et al. 2017): 527 classes, several per clip. The choice of store and recipe decides whether
# training uses 2M or 20k clips.
AUDIOSET_TASK = Task(
    name="audioset",
    recipe="audioset-20k",
    kind="multi",
    classes=load_class_list(),
    eval_splits=("eval",),
)

# ESC-50 (Piczak 2015): 50 environmental sounds, cross-validated over its own five folds.
ESC50_TASK = Task(
    name="esc50",
    recipe="esc50",
    kind="single",
    classes=class_list_from_words(
        "dog rooster pig cow frog cat hen insects sheep crow "
        "rain sea_waves crackling_fire crickets chirping_birds water_drops wind pouring_water toilet_flush "
        "thunderstorm crying_baby sneezing clapping breathing coughing footsteps laughing brushing_teeth snoring "
        "drinking_sipping door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening "
        "washing_machine vacuum_cleaner clock_alarm clock_tick glass_breaking "
        "helicopter chainsaw siren car_horn engine train church_bells airplane fireworks hand_saw"
    ),
    fold_count=5,
)

# FSD50K (Fonseca et al. 2020, arXiv 2010.00475): 200 of AudioSet's classes, several per clip. Its split val neither
# trains nor measures.
FSD50K_TASK = Task(
    name="fsd50k",
    recipe="fsd50k",
    kind="multi",
    classes=fsd50k_classes(),
    train_splits=("train",),
    eval_splits=("eval",),
)

# Your own labels in any store: one or several per clip; the store has an eval or test split, or folds.
OWN_LABELS_TASK = Task(name="own", recipe="own", kind="any")

# Speech Commands v1 (Warden 2018, arXiv 1804.03209): ten commands, and one class for all other words. The published
# SPC-1 has a twelfth class, silence, cut from recordings of background noise. A store of the words does not contain it,
# so accuracies on these 11 classes are close to the published ones but not the same measure.
SPEECH_COMMANDS_V1_TASK = Task(
    name="speech-commands-v1",
    recipe="speech-commands-v1",
    kind="single",
    classes=class_list_from_words(" ".join(SPEECH_COMMANDS_WORDS["v1"])),
    distinct_classes=("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
    other_class="unknown",
    train_splits=("train",),
    eval_splits=("test",),
)

# Speech Commands v2 (Warden 2018, arXiv 1804.03209): each of the 35 words is a class.
SPEECH_COMMANDS_V2_TASK = Task(
    name="speech-commands-v2",
    recipe="speech-commands-v2",
    kind="single",
    classes=class_list_from_words(" ".join(SPEECH_COMMANDS_WORDS["v2"])),
    train_splits=("train",),
    eval_splits=("test",),
)

# VoxCeleb1 (Nagrani et al. 2017, arXiv 1706.08612): 1,251 speakers, one per clip. Build its store with
# `ajepa-data build-folder` and a table of two columns: `label` is the speaker (id10001 to id11251), `split` is train,
# dev or test for 1, 2 or 3 in the official iden_split.txt.
VOXCELEB1_SID_TASK = Task(
    name="voxceleb1-sid",
    recipe="voxceleb1-sid",
    kind="single",
    classes=class_list_from_words(" ".join(f"id{number}" for number in range(10_001, 11_252))),
    train_splits=("train",),
    eval_splits=("test",),
)

# The names are repeated in ajepa/cli/options.py, `TASK_NAMES`; a test checks that both agree.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        AUDIOSET_TASK,
        ESC50_TASK,
        FSD50K_TASK,
        SPEECH_COMMANDS_V1_TASK,
        SPEECH_COMMANDS_V2_TASK,
        VOXCELEB1_SID_TASK,
        OWN_LABELS_TASK,
    )
}


def find_task(name: str) -> Task:
    """The task of that name; RunError suggests the nearest name and lists all."""
    if name not in TASKS:
        raise RunError(f"task {name!r} is unknown; {suggest_known(name, TASKS)}")
    return TASKS[name]
