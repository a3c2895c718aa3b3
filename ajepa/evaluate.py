"""What a run is worth on a store: a classifier as it was trained, or probes on a frozen encoder, beside baselines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ajepa import attentive
from ajepa.bootstrap import resamples
from ajepa.devices import pick_device
from ajepa.evaluation import PROBES, Evaluation, Score
from ajepa.features import MOST_TOKENS, Views, all_features
from ajepa.learnt import Learnt, held_out, splits_of_run
from ajepa.partition import HELD_SHARE, Partition
from ajepa.pooling import LAST, POOLING, Layer, PoolingName
from ajepa.probe_bench import Bench
from ajepa.probes import L2_GRID, NEIGHBOURS
from ajepa.run import RECIPE, Json, Run
from ajepa.scores import judged, protocol
from ajepa.stamp import place_of, refuse_replacing, stamp
from ajepa.subject import Subject
from ajepa.truth import Kind, Truth
from ajepa.vit import EncoderSpec
from pipeline.errors import RunError
from pipeline.melspec import MelSpec
from pipeline.store import FeatureStore

PROTOCOL = {
    "encoder": "frozen; the whole clip in views of the recipe's length, one after the other",
    "standardised": "with the mean and deviation of the clips that a probe is trained on",
    "choice": "on the val splits, or else on a fifth of the train clips, which then train too (not attentive)",
    "linear": "logistic regression, one per class, of single labels one over all; L2 chosen from l2_grid",
    "knn": f"share of the {NEIGHBOURS} most similar (cosine) train clips that carry a class",
    "attentive": f"{attentive.HEADS} queries over at most {MOST_TOKENS} tokens (all rows by stretches of time), "
    f"AdamW {attentive.PEAK_LR:g}, {attentive.MOST_STEPS} steps of {attentive.CLIPS_PER_STEP} clips at most",
    "labels": "each label set trained and measured on itself",
    "l2_grid": list(L2_GRID),
}


def evaluate(
    store: Path | str | FeatureStore,
    run_path: Path,
    *,
    checkpoint: str | int = "last",
    device: str = "auto",
    train_clips: int = 20_000,
    pooling: PoolingName = POOLING,
    layer: Layer = LAST,
    probes: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    kind: Kind = "auto",
    out: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a checkpoint of a run on a store of its mel spec: its own, or another one.

    A fine-tuned run's classifier, on clips that it was not trained on, by the classes that it and the store share;
    with `probes`, and of a pre-trained run always (all of them, where none is named), a frozen encoder. `checkpoint`
    is `Run.load`'s: last, best or a step. Of `labels` (all sets of the store, where none is named) each is measured,
    and by probes trained, on itself. Labels are `single` where every clip has exactly one, if nothing else is said;
    a classifier's only if it was trained on such. Kept as `out`, else where `stamp.place_of` says, unless another
    protocol's result lies there. RunError or StoreError where run, store and labels do not fit.
    """
    refuse_folds(run_path)
    run = Run.open(run_path)
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    store.refuse_other_front_end(MelSpec.from_json(run.identity["mel"]), f"{run.path} was trained on")
    probed = not run.finetuned or probes is not None
    place = out or place_of(run, store, probed=probed)
    asked = Asked(
        store=store,
        run=run,
        checkpoint=checkpoint,
        device=pick_device(device),
        labels=tuple(labels),
        kind=kind,
        place=None if out else place,
    )
    if not probed:
        if pooling != POOLING or layer != LAST:
            raise RunError(
                f"{run_path}: pooling and layer are the probes' on its encoder; add --probe linear"
            )
        found = classified(asked)
    else:
        names = tuple(PROBES) if probes is None else tuple(probes)
        how = Probing(names=names, pooling=pooling, layer=layer, train_clips=train_clips, progress=progress)
        found = frozen(asked, how)
    found.save(place)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be measured on what; `place`: where a result of another protocol is not to be replaced."""

    store: FeatureStore
    run: Run
    checkpoint: str | int
    device: torch.device
    labels: tuple[str, ...]
    kind: Kind
    place: Path | None

    def refuse(self, protocol: Json) -> None:
        """RunError where that would be lost."""
        if self.place is not None:
            refuse_replacing(self.place, protocol)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probing:
    """Which probes, on which features; RunError where one is none."""

    names: tuple[str, ...]
    pooling: PoolingName
    layer: Layer
    train_clips: int
    progress: bool

    def __post_init__(self) -> None:
        if not self.names or (unknown := [name for name in self.names if name not in PROBES]):
            told = ", ".join(unknown if self.names else ["none"])
            raise RunError(f"probes {told}: expected of {', '.join(PROBES)}")


def classified(asked: Asked) -> Evaluation:
    """The classifier of a fine-tuned run on held-out clips."""
    learnt = Learnt.of(asked.run, asked.checkpoint)
    assignment = held_out(asked.run, asked.store)
    told = protocol(
        asked.run,
        [assignment],
        step=learnt.step,
        weights=learnt.weights,
        part=learnt.part,
        device=asked.device,
        train_clips=learnt.train_clips,
        checkpoint=asked.checkpoint,
        kind=asked.kind,
    )
    asked.refuse(told)
    held = learnt.held(assignment, asked.device)
    return judged(told, [held], kind=asked.kind, label_sets=asked.labels)


def frozen(asked: Asked, how: Probing) -> Evaluation:
    """Probes on a run's frozen encoder, on the same drawn at random, and on log-mel statistics."""
    store, run = asked.store, asked.run
    subject = Subject.of(run, asked.checkpoint)
    whole = partition_of(run, store, subject.seed, how.train_clips)
    partition = whole.labelled(store)
    truths = [
        Truth.of(name, store.labels_BC(partition.rows_N, name), asked.kind, store.place)
        for name in asked.labels or store.label_sets
    ]
    count = resamples(len(partition.eval_N), len(store.classes.mids))
    told = stamp(
        run,
        store,
        step=subject.step,
        weights=subject.weights,
        part=subject.part,
        eval_splits=partition.eval,
        eval_clips=len(partition.eval_N),
        left_out=len(whole.eval_N) - len(partition.eval_N),
        resamples=count,
        device=asked.device.type,
        checkpoint=asked.checkpoint,
        kind=asked.kind,
        folds=len(partition.parts) if len(partition.parts) > 1 else 0,
        probes=probes_told(how, partition, subject.spec),
    )
    asked.refuse(told)
    scores = tuple(probe_scores(asked, how, subject, partition, truths, count))
    classes = tuple(zip(store.classes.mids, store.classes.names, strict=True))
    return Evaluation(protocol=told, classes=classes, scores=scores)


def probe_scores(
    asked: Asked,
    how: Probing,
    subject: Subject,
    partition: Partition,
    truths: Sequence[Truth],
    count: int,
) -> Iterator[Score]:
    """Every probe on every kind of features under every label set."""
    identity, seed = asked.run.identity, subject.seed
    views = Views(
        store=asked.store, frames=subject.spec.grid.frames, mean=identity["mean"], std=identity["std"]
    )
    for name, encoder in subject.encoders(asked.device).items():
        found = all_features(
            views,
            partition.rows_N,
            encoder,
            pooling=how.pooling,
            layer=how.layer,
            tokens="attentive" in how.names,
            progress=name if how.progress else None,
        )
        used = [probe for probe in how.names if probe != "attentive" or encoder is not None]
        pairs = [(truth, probe) for truth in truths for probe in used]
        bar = {"desc": f"{name}: probes", "unit": "probes", "leave": False}
        for truth, probe in tqdm(pairs, disable=None if how.progress else True, **bar):
            bench = Bench(found=found, partition=partition, truth=truth, seed=seed, device=asked.device)
            yield bench.score(name, probe, count)


def partition_of(run: Run, store: FeatureStore, seed: int, train_clips: int) -> Partition:
    """What trains, chooses and measures; of a fine-tuned run's own clips those that it held out measure."""
    mine = splits_of_run(run, store) if run.finetuned else None
    if mine is None:
        return Partition.of(store, seed, train_clips)
    return Partition.of_splits(store, *mine, seed, train_clips)


def probes_told(how: Probing, partition: Partition, spec: EncoderSpec) -> Json:
    """How probes are trained, on what."""
    part, grid = partition.parts[0], spec.grid
    return {
        "names": list(how.names),
        "pooling": how.pooling,
        "layer": str(how.layer),
        "grid": {
            "rows": grid.rows,
            "cols": grid.cols,
            "frames": grid.patch_frames,
            "bands": grid.patch_bands,
        },
        "train_splits": list(partition.train),
        "val_splits": list(partition.val),
        "train_clips": len(part.fit_N),
        "val_clips": len(part.val_N),
        "val_share": HELD_SHARE if part.drawn else None,
        **PROTOCOL,
    }


def refuse_folds(path: Path) -> None:
    """RunError where this is the folder of a cross-validated task."""
    if not (path / RECIPE).is_file() and (path / "fold1" / RECIPE).is_file():
        told = f"give one of them, such as {path / 'fold1'}; all together: ajepa-train compare {path}"
        raise RunError(f"{path}: holds a run for each fold; {told}")
