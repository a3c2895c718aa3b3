"""What a frozen encoder is worth: probes on it, on a random encoder and on plain log-mel statistics."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from ajepa.devices import pick_device
from ajepa.jepa import Jepa
from ajepa.metrics import MeanAveragePrecision, mean_average_precision
from ajepa.patches import valid_tokens
from ajepa.probes import L2_GRID, NEIGHBOURS, chosen_l2, knn_NC, linear_NC, standardised
from ajepa.recipes import Pretrain, from_json
from ajepa.run import Checkpoint, Run
from ajepa.training_set import eval_splits, open_store, train_splits
from ajepa.vit import Encoder
from pipeline.errors import RunError
from pipeline.files import replacing
from pipeline.store import FeatureStore

EVALUATION = "evaluation.json"
CLIPS_PER_READ = 32
PROTOCOL = {
    "encoder": "target (EMA), frozen; the whole clip in views of the recipe's length, one after the other",
    "pooling": "mean over valid tokens, then standardised with the train clips' mean and deviation",
    "linear": f"one logistic regression per class, L2 of {L2_GRID} chosen on a fifth of the train clips",
    "knn": f"share of the {NEIGHBOURS} most similar (cosine) train clips that carry a class",
    "map": "macro, classes without an eval clip skipped; each label set trained and measured on itself",
}
TRAINED, RANDOM, STATISTICS = "encoder", "random init", "log-mel statistics"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One probe on one kind of features, trained and measured on one label set."""

    features: str
    probe: str
    label_set: str
    map: float
    chance: float
    classes: int
    skipped: int
    l2: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Every score, with the protocol that produced it."""

    protocol: dict[str, Any]
    scores: tuple[Score, ...]

    def of(self, features: str, probe: str, label_set: str) -> Score:
        """The one score of that name."""
        wanted = (features, probe, label_set)
        return next(s for s in self.scores if (s.features, s.probe, s.label_set) == wanted)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Evaluation":
        return cls(protocol=told["protocol"], scores=tuple(Score(**score) for score in told["scores"]))

    def table(self) -> str:
        """mAP by features and probe, a block for each label set, in lines of at most 80 columns."""
        told = self.protocol
        clips = f"{told['eval_clips']} eval clips, probes trained on {told['train_clips']}"
        sets = list(dict.fromkeys(score.label_set for score in self.scores))
        blocks = [line for label_set in sets for line in self.block(label_set)]
        return "\n".join([f"mAP on {clips}; run at step {told['step']}", *blocks])

    def block(self, label_set: str) -> list[str]:
        """The table of one label set, chance and skipped classes included."""
        one = self.of(STATISTICS, "knn", label_set)
        names = list(dict.fromkeys(score.features for score in self.scores))
        return [
            f"{label_set} labels: {one.classes} classes ({one.skipped} without an eval clip are skipped)",
            f"  {'':20}{'linear':>8}{'kNN':>8}",
            *(
                f"  {name:20}{self.cell(name, 'linear', label_set)}{self.cell(name, 'knn', label_set)}"
                for name in names
            ),
            f"  {'chance':20}{one.chance:8.3f}{one.chance:8.3f}",
        ]

    def cell(self, features: str, probe: str, label_set: str) -> str:
        return f"{self.of(features, probe, label_set).map:8.3f}"


def evaluate(
    store: Path | str | FeatureStore,
    run_path: Path,
    *,
    checkpoint: str | int = "last",
    device: str = "auto",
    train_clips: int = 20_000,
    progress: bool = False,
) -> Evaluation:
    """Probe a checkpoint of a run on the split eval, or else on those held out; kept as RUN/evaluation.json.

    `checkpoint` is `Run.load`'s: last, best or a step. The target (EMA) encoder is what is probed. At most
    `train_clips` rows of the other splits train the probes, drawn with the recipe's seed. RunError or
    StoreError where run, store and labels do not fit.
    """
    run = Run.open(run_path)
    recipe = from_json(run.recipe)
    store = open_store(store, recipe)
    train_N, eval_N = probe_rows(store, recipe.seed, train_clips)
    loaded, on = run.load("target", at=checkpoint), pick_device(device)
    views = Views(store=store, frames=recipe.view_frames, mean=run.identity["mean"], std=run.identity["std"])
    scores = []
    compared = encoders(recipe, loaded, on)
    for name, encoder in tqdm(compared.items(), unit="features", disable=None if progress else True):
        train_ND, eval_ND = standardised(features(views, train_N, encoder), features(views, eval_N, encoder))
        for label_set in store.label_sets:
            labels = store.labels_BC(train_N, label_set), store.labels_BC(eval_N, label_set)
            scores += probe_scores(name, label_set, train_ND, eval_ND, *labels, seed=recipe.seed)
    protocol = {
        "run": str(run.path),
        "step": loaded.step,
        "store_id": store.store_id,
        "train_clips": len(train_N),
        "eval_splits": eval_splits(store),
        "eval_clips": len(eval_N),
        **({} if store.excluded.digest is None else {"excluded": store.excluded.digest}),
        **PROTOCOL,
    }
    evaluation = Evaluation(protocol=protocol, scores=tuple(scores))
    with replacing(run.path / EVALUATION) as scratch:
        scratch.write_text(json.dumps(evaluation.to_json(), indent=1) + "\n")
    return evaluation


def probe_rows(store: FeatureStore, seed: int, train_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Good rows to train probes on (at most `train_clips`, drawn by `seed`) and to measure them on."""
    train_N = store.good_rows(train_splits(store))
    eval_N = store.good_rows(measured := eval_splits(store))
    if not len(eval_N):
        raise RunError(
            f"{store.place}: split {' + '.join(measured)} has no good clip to measure on; see: ajepa-data report"
        )
    drawn_N = np.random.default_rng([seed, 0]).permutation(train_N)[:train_clips]
    return np.sort(drawn_N), eval_N


def encoders(recipe: Pretrain, checkpoint: Checkpoint, device: torch.device) -> dict[str, Encoder | None]:
    """What is compared: the run's target encoder, the same before its first step, and none at all."""
    trained, random = (Jepa(recipe.model, seed=recipe.seed).target for _ in range(2))
    trained.load_state_dict(checkpoint.parts["target"])
    return {TRAINED: trained.to(device).eval(), RANDOM: random.to(device).eval(), STATISTICS: None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """A store's clips whole, cut one after the other into normalised views of `frames`."""

    store: FeatureStore
    frames: int
    mean: float
    std: float

    def of(self, rows_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """`mel_BVTF` (zeros past a clip's end, as in training) and valid frames `n_frames_BV`."""
        n_frames_B = torch.from_numpy(self.store.n_frames_N[rows_B].astype(np.int64))
        count = -(-self.store.frames // self.frames)
        stored_BTF = torch.from_numpy(self.store.read(rows_B)).float()
        mel_BTF = (self.store.offset + self.store.scale * stored_BTF - self.mean) / self.std
        mel_BTF[torch.arange(self.store.frames) >= n_frames_B[:, None]] = 0.0
        padded_BTF = nnf.pad(mel_BTF, (0, 0, 0, count * self.frames - self.store.frames))
        starts_V = torch.arange(count) * self.frames
        n_frames_BV = (n_frames_B[:, None] - starts_V).clamp(0, self.frames)
        return padded_BTF.reshape(len(rows_B), count, self.frames, -1), n_frames_BV


def features(views: Views, rows_N: np.ndarray, encoder: Encoder | None) -> np.ndarray:
    """One vector per clip, float32 `[N, D]`: the mean over its valid tokens, or its log-mel statistics."""
    pieces = []
    for start in range(0, len(rows_N), CLIPS_PER_READ):
        mel_BVTF, n_frames_BV = views.of(rows_N[start : start + CLIPS_PER_READ])
        if encoder is None:
            pieces.append(statistics(mel_BVTF, n_frames_BV).numpy())
        else:
            pieces.append(pooled(encoder, mel_BVTF, n_frames_BV).numpy())
    return np.concatenate(pieces)


@torch.inference_mode()
def pooled(encoder: Encoder, mel_BVTF: Tensor, n_frames_BV: Tensor) -> Tensor:
    """Mean of a clip's valid tokens over all its views; a view past the clip's end is never encoded."""
    device = next(encoder.parameters()).device
    clip_N, view_N = torch.nonzero(n_frames_BV, as_tuple=True)
    valid_NP = valid_tokens(n_frames_BV[clip_N, view_N], encoder.spec.grid)
    tokens_NPD = encoder(mel_BVTF[clip_N, view_N].to(device), valid_BP=valid_NP.to(device)).float().cpu()
    sums_ND = (tokens_NPD * valid_NP[..., None]).sum(1)
    sums_BD = torch.zeros(len(mel_BVTF), sums_ND.shape[1]).index_add_(0, clip_N, sums_ND)
    counts_B = torch.zeros(len(mel_BVTF)).index_add_(0, clip_N, valid_NP.sum(1).float())
    return sums_BD / counts_B[:, None]


def statistics(mel_BVTF: Tensor, n_frames_BV: Tensor) -> Tensor:
    """Mean and standard deviation of each mel band over a clip's valid frames, `[B, 2F]`."""
    mel_BTF, n_frames_B1 = mel_BVTF.flatten(1, 2), n_frames_BV.sum(1, keepdim=True)
    mean_BF = mel_BTF.sum(1) / n_frames_B1  # frames past the end are 0
    square_BF = mel_BTF.square().sum(1) / n_frames_B1
    return torch.cat([mean_BF, (square_BF - mean_BF.square()).clamp(min=0).sqrt()], dim=1)


def probe_scores(
    features: str,
    label_set: str,
    train_ND: Tensor,
    eval_ND: Tensor,
    train_NC: np.ndarray,
    eval_NC: np.ndarray,
    *,
    seed: int,
) -> list[Score]:
    """Linear probe and kNN on standardised features, each trained and measured on this label set."""
    l2 = chosen_l2(train_ND, train_NC, seed)
    linear = mean_average_precision(eval_NC, linear_NC(train_ND, train_NC, eval_ND, l2=l2))
    nearest = mean_average_precision(eval_NC, knn_NC(train_ND, train_NC, eval_ND))
    return [
        score_of(linear, features=features, probe="linear", label_set=label_set, l2=l2),
        score_of(nearest, features=features, probe="knn", label_set=label_set, l2=None),
    ]


def score_of(
    result: MeanAveragePrecision, *, features: str, probe: str, label_set: str, l2: float | None
) -> Score:
    return Score(
        features=features,
        probe=probe,
        label_set=label_set,
        map=result.value,
        chance=result.chance,
        classes=result.counted,
        skipped=result.skipped,
        l2=l2,
    )
