"""Scores of a classifier on held-out clips: logits over whole clips, mAP or accuracy, class by class."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, recall_score
from torch import Tensor

from ajepa.assignment import Assignment
from ajepa.classifier import Classifier
from ajepa.evaluation import EVALUATION
from ajepa.features import CLIPS_PER_READ, Views
from ajepa.metrics import mean_average_precision
from ajepa.run import Json
from pipeline.files import replacing

PROTOCOL = {
    "clips": "the whole clip in views of the model's length; logits are means over them, weighted by valid frames",
    "map": "macro, classes without a measured clip skipped; per class: average precision",
    "accuracy": "share of the clips whose largest logit is their class's; per class: recall",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScores:
    """One metric on one label set; `per_class` by class id, None where no clip has the class.

    chance  mAP of random scores in expectation; accuracy of always guessing the commonest class
    """

    label_set: str
    metric: str
    value: float
    chance: float
    classes: int
    skipped: int
    per_class: dict[str, float | None]


def scores(assignment: Assignment, logits_NC: np.ndarray) -> list[ClassScores]:
    """Those of the clips to measure: on the label set that was trained, then on every other the store has."""
    sets = [assignment.label_set]
    if not assignment.single:
        sets += [name for name in assignment.store.label_sets if name != assignment.label_set]
    told = []
    for label_set in sets:
        labels_NC = assignment.labels_NC(assignment.eval_N, label_set)
        values = accuracy(labels_NC, logits_NC) if assignment.single else precision(labels_NC, logits_NC)
        value, chance, per_class_C = values
        named = zip(assignment.classes.mids, per_class_C.tolist(), strict=True)
        counted = int(np.isfinite(per_class_C).sum())
        told.append(
            ClassScores(
                label_set=label_set,
                metric=assignment.metric,
                value=value,
                chance=chance,
                classes=counted,
                skipped=len(per_class_C) - counted,
                per_class={mid: score if np.isfinite(score) else None for mid, score in named},
            )
        )
    return told


def precision(labels_NC: np.ndarray, logits_NC: np.ndarray) -> tuple[float, float, np.ndarray]:
    """mAP, what chance reaches, and each class's; nan where no clip has it."""
    result = mean_average_precision(labels_NC, logits_NC)
    return result.value, result.chance, result.per_class_C


def accuracy(labels_NC: np.ndarray, logits_NC: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Accuracy, what always guessing the commonest class reaches, and each class's recall; nan as above."""
    true_N, guess_N = labels_NC.argmax(axis=1), logits_NC.argmax(axis=1)
    count_C = labels_NC.sum(axis=0)
    recall_C = recall_score(
        true_N, guess_N, labels=np.arange(len(count_C)), average=None, zero_division=np.nan
    )
    recall_C[count_C == 0] = np.nan
    return float(accuracy_score(true_N, guess_N)), float(count_C.max() / len(true_N)), recall_C


def logits_of(
    model: Classifier, views: Views, rows_N: np.ndarray, device: torch.device, *, bf16: bool
) -> np.ndarray:
    """One logit per class for each clip, float32 `NC`, the model in evaluation mode: nothing of it is random."""
    model.train(False)
    pieces = []
    for start in range(0, len(rows_N), CLIPS_PER_READ):
        mel_BVTF, n_frames_BV = views.of(rows_N[start : start + CLIPS_PER_READ])
        pieces.append(clip_logits(model, mel_BVTF, n_frames_BV, device, bf16=bf16).numpy())
    return np.concatenate(pieces)


@torch.inference_mode()
def clip_logits(
    model: Classifier, mel_BVTF: Tensor, n_frames_BV: Tensor, device: torch.device, *, bf16: bool
) -> Tensor:
    """Mean of the logits of a clip's views, weighted by their valid frames; a view past its end is never seen."""
    clip_N, view_N = torch.nonzero(n_frames_BV, as_tuple=True)
    frames_N = n_frames_BV[clip_N, view_N]
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits_NC = model(mel_BVTF[clip_N, view_N].to(device), frames_N)
    logits_NC = logits_NC.float().cpu() * frames_N[:, None]
    sums_BC = torch.zeros(len(mel_BVTF), logits_NC.shape[1]).index_add_(0, clip_N, logits_NC)
    return sums_BC / n_frames_BV.sum(dim=1, keepdim=True)


def table(told: list[ClassScores]) -> str:
    """A line for each label set, in at most 80 columns."""
    lines = []
    for score in told:
        skipped = f", {score.skipped} skipped" if score.skipped else ""
        where = f"{score.label_set} labels ({score.classes} classes{skipped})"
        lines.append(f"  {where:44} {score.metric:>8} {score.value:.3f} (chance {score.chance:.3f})")
    return "\n".join(lines)


def keep(run_path: Path, protocol: Json, told: list[ClassScores]) -> None:
    """Write the scores, with how they came about, to RUN/evaluation.json."""
    kept: dict[str, Any] = {"protocol": PROTOCOL | protocol, "scores": [asdict(score) for score in told]}
    with replacing(run_path / EVALUATION) as scratch:
        scratch.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")


def kept_scores(run_path: Path) -> list[ClassScores]:
    """The scores in RUN/evaluation.json."""
    told = json.loads((run_path / EVALUATION).read_text())
    return [ClassScores(**score) for score in told["scores"]]
