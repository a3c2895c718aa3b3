"""Identities of runs that nobody trained, for tests of run folders and of what is read from them."""

from typing import Any

from ajepa.training.run_identity import RunIdentity, TaskIdentity
from pipeline.audio.mel_spec import preset_mel_spec


def run_identity(**changes: Any) -> RunIdentity:
    """A pre-trained run on one store, `own`."""
    mel = preset_mel_spec("a-jepa")
    fields = {"store_id": "own", "spec_id": mel.spec_id, "mel": mel, "mean": -9.25, "std": 4.5}
    return RunIdentity(**(fields | changes))


def task_identity(**changes: Any) -> TaskIdentity:
    """A classifier of one class, of clips of a single label, that starts from random weights."""
    fields = {
        "task": "own",
        "kind": "single",
        "label_set": "raw",
        "train_splits": ("train",),
        "eval_splits": ("eval",),
        "classes": ("a",),
    }
    return TaskIdentity(**(fields | changes))
