"""Stamp: what every evaluation says of itself, and where it is kept: enough to tell whether two may be compared."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ajepa.evaluate.metrics import CONFIDENCE_LEVEL
from ajepa.evaluate.result import EVALUATION_FILE, EVALUATION_FORMAT
from ajepa.training.run import Json, Run, software_versions
from pipeline.errors import RunError
from pipeline.store.feature_store import FeatureStore

METRIC_NOTES = {
    "map": "macro, classes without an eval clip skipped",
    "accuracy": "share of the clips whose highest score is that of their class",
    "clips": "good clips of the eval splits that have a label of the classes measured",
    "folds_mean": "every metric is computed within a fold, then averaged",
    "intervals": "clips drawn again within each fold; percentiles moved to lie about the value",
    "confidence": CONFIDENCE_LEVEL,
}

PROTOCOL_SETTINGS = (
    "store_id",
    "excluded",
    "checkpoint",
    "eval_splits",
    "folds",
    "kind",
    "classifier",
    "probes",
)

PROBE_NAMES_KEY = "names"  # of probes: a result may hold more of them than the one whose place it takes


def protocol_of(
    run: Run,
    store: FeatureStore,
    *,
    step: int,
    weights: dict[str, Tensor],
    weights_name: str,
    eval_splits: Sequence[str],
    eval_clips: int,
    unlabelled_clips: int,
    resamples: int,
    device: str,
    checkpoint: str | int = "last",
    kind: str = "auto",
    folds: int = 0,
    classifier: Json | None = None,
    probes: Json | None = None,
) -> Json:
    """The protocol of an evaluation, the same keys whatever was measured.

    weights      what was measured: its digest is told; `part` is what it is called in a checkpoint
    left_out     good clips of the eval splits that have no label of the classes measured
    classifier   how a classifier was trained, as it is measured; None: only probes are
    probes       what was trained on frozen features, and on which clips; None: only a classifier is measured
    task         what the run was fine-tuned on, None of a pre-trained one
    """
    identity = run.identity
    return {
        "run": str(run.path),
        "recipe": run.recipe["name"],
        "seed": run.recipe["seed"],
        "step": step,
        "checkpoint": str(checkpoint),
        "weights": weights_name,
        "weights_sha256": weights_digest(weights),
        "task": identity.get("task"),
        "trained_on": identity["store_id"],
        "trained_with": run.versions,
        "store": Path(store.location).name,
        "store_id": store.store_id,
        "excluded": store.exclusions.digest,
        "eval_splits": list(eval_splits),
        "eval_clips": eval_clips,
        "left_out": unlabelled_clips,
        "folds": folds,
        "kind": kind,
        **METRIC_NOTES,
        "resamples": resamples,
        "classifier": classifier,
        "probes": probes,
        "device": device,
        "versions": software_versions(),
    }


def weights_digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors, whatever file they lay in."""
    told = hashlib.sha256()
    for name in sorted(weights):
        told.update(f"{name} {tuple(weights[name].shape)} ".encode())
        told.update(weights[name].contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return told.hexdigest()


def is_training_store(run: Run, store: FeatureStore) -> bool:
    """Whether the run was trained on this store, alone or among others."""
    return store.store_id in {run.identity["store_id"], *run.identity.get("stores", [])}


def result_path(run: Run, store: FeatureStore, *, probed: bool) -> Path:
    """Where an evaluation is kept, one rule for all runs.

    What a run is measured by on its own store lies in evaluation.json, on another one in evaluation-STORE.json. A
    fine-tuned run is measured by its classifier: probes on its frozen encoder (`probed`) lie beside that, in
    evaluation-probes.json and evaluation-STORE-probes.json.
    """
    more = "" if is_training_store(run, store) else f"-{Path(store.location).stem}"
    beside = "-probes" if probed and run.is_finetuned else ""
    return run.path / f"{Path(EVALUATION_FILE).stem}{more}{beside}.json"


def read_protocol(file: Path) -> Json | None:
    """The stamp of the evaluation in a file; None: there is none, or of a format that is not read any more."""
    told = json.loads(file.read_text()) if file.is_file() else {}
    found: Json | None = told["protocol"] if told.get("format") == EVALUATION_FORMAT else None
    return found


def refuse_overwriting(file: Path, protocol: Json) -> None:
    """RunError where `file` holds what was measured otherwise than `asked`, a stamp, says: it would be lost.

    A later step of the run, other versions, another device, or more probes are no reason; nor is a result of a
    format that is not read any more.
    """
    held = read_protocol(file)
    if held is None:
        return
    before, now = ({key: told[key] for key in PROTOCOL_SETTINGS} for told in (held, protocol))
    changes = [
        f"{name}: {describe_setting(old)}, now {describe_setting(new)}"
        for name, old, new in protocol_differences(before, now)
    ]
    if changes:
        raise RunError(
            f"{file}: holds what was measured otherwise ({'; '.join(changes[:3])}); "
            "keep this one elsewhere with --out FILE, or replace that one by naming it there"
        )


def protocol_differences(
    stored: Json, requested: Json, key_prefix: str = ""
) -> list[tuple[str, object, object]]:
    """Every setting in which two stamps differ, with both values; what `asked` has more of `names` is none."""
    found: list[tuple[str, object, object]] = []
    for key in dict.fromkeys([*stored, *requested]):
        old, new = stored.get(key), requested.get(key)
        old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            found += protocol_differences(old, new, f"{key_prefix}{key}.")
        elif old != new and not (key == PROBE_NAMES_KEY and set(old or ()) <= set(new or ())):
            found.append((f"{key_prefix}{key}", old, new))
    return found


def describe_setting(value: object) -> str:
    """A setting in a few words."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "some" if isinstance(value, dict) else "none" if value is None else str(value)
