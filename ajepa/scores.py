"""Scores of a classifier on held-out clips, whole clips at once: on the way of a run, and kept at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ajepa.assignment import Assignment
from ajepa.bootstrap import resamples
from ajepa.classifier import Classifier
from ajepa.evaluation import CLASSIFIER, EVALUATION, HEAD, PRIMARY, Evaluation
from ajepa.features import CLIPS_PER_READ, Views
from ajepa.run import Json, Run
from ajepa.stamp import is_own, protocol_in, stamp
from ajepa.truth import Kind, Truth

CLIPS = "the whole clip in views of the model's length; logits are means over them, weighted by valid frames"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Held:
    """Clips of a store that are held out, what is true of them, and what a classifier says: `logits_NC`."""

    assignment: Assignment
    logits_NC: np.ndarray

    def truths(self, kind: Kind = "auto", label_sets: Sequence[str] = ()) -> list[Truth]:
        """By the label set that was trained, then by every other that the store has, or by those named.

        `auto`: single where the classifier was trained on single labels and these are, else multi.
        """
        made, place = self.assignment, self.assignment.store.place
        names = label_sets or dict.fromkeys((made.label_set, *made.store.label_sets))
        kind = "multi" if kind == "auto" and not made.single else kind
        return [Truth.of(name, made.labels_NC(made.eval_N, name), kind, place) for name in names]

    def logged(self) -> Json:
        """The first metric on each label set, as it is called in the metrics of a run."""
        return {
            f"eval_{PRIMARY[truth.kind]}_{truth.label_set}": truth.value(self.logits_NC)
            for truth in self.truths()
        }


def protocol(
    run: Run,
    assignments: Sequence[Assignment],
    *,
    step: int,
    weights: dict[str, Tensor],
    part: str,
    device: torch.device,
    train_clips: int | None = None,
    checkpoint: str | int = "last",
    kind: Kind = "auto",
) -> Json:
    """How a classifier is measured on the clips of an assignment, or one for each fold on that fold's.

    Of folds, run, weights and step are those of the first. `train_clips`: how many it was trained on, where the
    assignment is of another store and that is known.
    """
    made, folds = assignments[0], len(assignments) if len(assignments) > 1 else 0
    clips = sum(len(one.eval_N) for one in assignments)
    own = is_own(run, made.store)
    return stamp(
        run,
        made.store,
        step=step,
        weights=weights,
        part=part,
        eval_splits=[split for one in assignments for split in one.eval_splits],
        eval_clips=clips,
        left_out=sum(one.left_out for one in assignments),
        resamples=resamples(clips, len(made.classes)),
        device=device.type,
        checkpoint=checkpoint,
        kind=kind,
        folds=folds,
        classifier=trained_as(run, folds=folds, train_clips=len(made.train_N) if own else train_clips),
    )


def judged(
    protocol: Json, held: Sequence[Held], *, kind: Kind = "auto", label_sets: Sequence[str] = ()
) -> Evaluation:
    """The evaluation that a protocol promises, of what the classifier says of each fold's held-out clips."""
    scores = []
    for of_folds in zip(*(one.truths(kind, label_sets) for one in held), strict=True):
        measured = [
            truth.measured(
                np.arange(len(one.logits_NC)), one.logits_NC, protocol["resamples"], protocol["seed"] + place
            )
            for place, (truth, one) in enumerate(zip(of_folds, held, strict=True))
        ]
        scores.append(of_folds[0].score(CLASSIFIER, HEAD, measured))
    classes = held[0].assignment.classes
    named = tuple(zip(classes.mids, classes.names, strict=True))
    return Evaluation(protocol=protocol, classes=named, scores=tuple(scores))


def trained_as(run: Run, *, folds: int, train_clips: int | None) -> Json:
    """How a classifier was trained that is measured."""
    told = {name: run.identity[name] for name in ("task", "kind", "label_set", "from")}
    splits = ["all folds but the one measured"] if folds else run.identity["train_splits"]
    return told | {
        "ema": run.recipe["ema"],
        "clips_per_step": run.recipe["clips_per_step"],
        "train_splits": splits,
        "train_clips": train_clips,
        "classes": len(run.identity["classes"]),
        "views": CLIPS,
    }


def measured_at_its_end(run: Run) -> bool:
    """Whether RUN/evaluation.json is of the run's last step."""
    held = protocol_in(run.path / EVALUATION)
    return held is not None and held["step"] == run.step


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
