"""Protocols of evaluations that nobody ran, for tests of what is made of them."""

from typing import Any

from ajepa.evaluate.protocol import ClassifierTraining, EvaluationProtocol, ProbeTraining


def classifier_training(**changes: Any) -> ClassifierTraining:
    """A classifier of 50 classes that started from random weights."""
    fields = {
        "task": "esc50",
        "kind": "single",
        "label_set": "raw",
        "start": None,
        "ema": 0.9,
        "clips_per_step": 8,
        "train_splits": ("train",),
        "train_clips": 1_600,
        "class_count": 50,
        "views": "whole clips",
    }
    return ClassifierTraining(**(fields | changes))


def probe_training(**changes: Any) -> ProbeTraining:
    """Nearest neighbours on mean-pooled features."""
    fields = {
        "names": ("knn",),
        "pooling": "mean",
        "layer": "last",
        "grid": {"rows": 8, "cols": 4, "frames": 16, "bands": 16},
        "train_splits": ("train",),
        "val_splits": (),
        "train_clips": 10,
        "val_clips": 2,
        "val_share": 0.2,
        "notes": {"knn": "share of the most similar clips", "l2_grid": [1.0, 0.1]},
    }
    return ProbeTraining(**(fields | changes))


def evaluation_protocol(**changes: Any) -> EvaluationProtocol:
    """A pre-trained run on its own store, with neither a classifier nor probes."""
    fields = {
        "run_path": "runs/a",
        "recipe_name": "tiny",
        "seed": 0,
        "step": 6,
        "checkpoint": "last",
        "chosen_by": "nothing: the last step",
        "weights_name": "target",
        "weights_sha256": "ab" * 32,
        "task": None,
        "training_store_id": "own",
        "training_versions": {"torch": "2"},
        "store_name": "some.zarr",
        "store_id": "own",
        "exclusions": None,
        "eval_splits": ("eval",),
        "eval_clips": 5,
        "unlabelled_clips": 1,
        "folds": 0,
        "kind": "auto",
        "resamples": 50,
        "classifier": None,
        "probes": None,
        "device": "cpu",
        "precision": "fp32",
        "versions": {"torch": "3"},
    }
    return EvaluationProtocol(**(fields | changes))
