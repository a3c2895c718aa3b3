"""Task: what is to be told apart in a store's clips, on which of them it is learnt, and how it is measured."""

from dataclasses import dataclass
from typing import Literal

from pipeline.ontology import ClassList

Kind = Literal["single", "multi", "any"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A downstream task; its file in this folder says where it is from and what it is comparable with.

    recipe      its own among the fine-tuning recipes
    kind        single: each clip has one class, measured by accuracy; multi: any number, measured by mAP;
                any: single where each clip has exactly one label, else multi
    classes     what the store must hold, in the order of the head; None: those that its training clips have
    told_apart  only these are classes of the task, all others are one more; none given: each is its own
    others      the name of that one more
    train       splits that are trained on; none given: all but those named eval or test
    measured    splits that are measured; none given: eval, or else those so named
    folds       splits fold1 to foldN, each measured once after training on the others; 0: no such. With classes
                None a store whose splits are all folds is cross-validated too
    """

    name: str
    recipe: str
    kind: Kind
    classes: ClassList | None = None
    told_apart: tuple[str, ...] = ()
    others: str = "others"
    train: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()
    folds: int = 0


def named_classes(names: str) -> ClassList:
    """The classes of some words, whose ids are their names."""
    words = tuple(names.split())
    return ClassList(mids=words, names=tuple(word.replace("_", " ") for word in words))
