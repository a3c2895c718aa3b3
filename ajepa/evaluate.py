"""What a frozen encoder is worth: linear probe and kNN beside a random encoder and plain log-mel statistics."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ajepa.metrics import MeanAveragePrecision, mean_average_precision
from ajepa.patches import valid_tokens
from ajepa.pretrain import new_model, open_store, pick_device
from ajepa.recipes import Pretrain, from_json
from ajepa.run import Run
from ajepa.vit import Encoder
from pipeline.errors import InputError, RunError
from pipeline.files import replacing
from pipeline.store import FeatureStore

EVAL_SPLIT = "eval"
CLIPS_PER_READ = 32
NEIGHBOURS = 15
L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4)  # on the mean loss of a clip; chosen on a fifth of the train clips
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
        """mAP of every features by probe and label set, as lines of at most 80 columns."""
        sets = list(dict.fromkeys(score.label_set for score in self.scores))
        columns = [(probe, label_set) for probe in ("linear", "knn") for label_set in sets]
        head = [" " * 20 + "".join(f"{probe + ' ' + name[:11]:>15}"[-15:] for probe, name in columns)]
        rows = [
            f"{features:20}" + "".join(f"{self.of(features, *column).map:15.3f}" for column in columns)
            for features in dict.fromkeys(score.features for score in self.scores)
        ]
        chance = f"{'chance':20}" + "".join(f"{self.of(STATISTICS, *column).chance:15.3f}" for column in columns)
        return "\n".join([self.headline(), *head, *rows, chance, *self.notes(sets)])

    def headline(self) -> str:
        told = self.protocol
        return f"mAP on {told['eval_clips']} eval clips, probes trained on {told['train_clips']}, step {told['step']}"

    def notes(self, sets: list[str]) -> list[str]:
        """What the table leaves out: classes nobody carries, and a label set that is not there."""
        lines = []
        for name in sets:
            score = self.of(STATISTICS, "knn", name)
            lines.append(f"{name}: {score.classes} classes; {score.skipped} without an eval clip are skipped")
        if sets == ["raw"]:
            lines.append("no propagated labels here: add them with `ajepa-data propagate-labels STORE`")
        return lines


def evaluate(
    store_path: Path, run_path: Path, *, device: str = "cpu", train_clips: int = 20_000, progress: bool = False
) -> Evaluation:
    """Probe the newest checkpoint of a run on the store's eval split, and keep the result as RUN/evaluation.json.

    The target (EMA) encoder is what is probed. At most `train_clips` rows of the other splits train the probes,
    drawn with the recipe's seed. RunError or StoreError where run, store or labels do not fit each other.
    """
    run = Run.open(run_path)
    recipe = from_json(run.recipe)
    store = open_store(store_path, recipe)
    train_N, eval_N = probe_rows(store, recipe.seed, train_clips)
    checkpoint = run.load("target")
    views = Views(store=store, frames=recipe.view_frames, mean=run.identity["mean"], std=run.identity["std"])
    scores = []
    for name, encoder in encoders(recipe, checkpoint, pick_device(device)).items():
        train_ND, eval_ND = (features(views, rows_N, encoder, progress) for rows_N in (train_N, eval_N))
        train_ND, eval_ND = standardised(train_ND, eval_ND)
        for label_set in store.label_sets:
            labels = store.labels_BC(train_N, label_set), store.labels_BC(eval_N, label_set)
            scores += probe_scores(name, label_set, train_ND, eval_ND, *labels, seed=recipe.seed)
    protocol = {"run": str(run.path), "step": checkpoint.step, "store_id": store.store_id, "encoder": "target (EMA)"}
    protocol |= {"view_frames": recipe.view_frames, "pooling": "mean over valid tokens", "seed": recipe.seed}
    protocol |= {"train_clips": len(train_N), "eval_clips": len(eval_N), "neighbours": NEIGHBOURS, "l2_grid": L2_GRID}
    evaluation = Evaluation(protocol=protocol, scores=tuple(scores))
    with replacing(run.path / EVALUATION) as scratch:
        scratch.write_text(json.dumps(evaluation.to_json(), indent=1) + "\n")
    return evaluation


def probe_rows(store: FeatureStore, seed: int, train_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Good rows to train probes on (at most `train_clips`, drawn by `seed`) and to measure them on."""
    train_N = store.good_rows(train_splits(store))
    eval_N = store.good_rows([EVAL_SPLIT])
    if not len(eval_N):
        raise RunError(f"{store.path}: split {EVAL_SPLIT} has no good clip to measure on")
    drawn_N = np.random.default_rng([seed, 0]).permutation(train_N)[:train_clips]
    return np.sort(drawn_N), eval_N


def encoders(recipe: Pretrain, checkpoint: Checkpoint, device: torch.device) -> dict[str, Encoder | None]:
    """What is compared: the run's target encoder, the same one before its first step, and no encoder at all."""
    trained, random = new_model(recipe).target, new_model(recipe).target
    trained.load_state_dict(checkpoint.parts["target"])
    return {TRAINED: trained.to(device).eval(), RANDOM: random.to(device).eval(), STATISTICS: None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """A store's clips whole, cut one after the other into views of `frames`, normalised by `mean` and `std`."""

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


def features(views: Views, rows_N: np.ndarray, encoder: Encoder | None, progress: bool = False) -> np.ndarray:
    """One vector per clip, float32 `[N, D]`: the mean over its valid tokens, or its log-mel statistics."""
    pieces = []
    with tqdm(total=len(rows_N), unit="clip", disable=not progress, leave=False) as bar:
        for start in range(0, len(rows_N), CLIPS_PER_READ):
            mel_BVTF, n_frames_BV = views.of(rows_N[start : start + CLIPS_PER_READ])
            pooled_BD = statistics(mel_BVTF, n_frames_BV) if encoder is None else pooled(encoder, mel_BVTF, n_frames_BV)
            pieces.append(pooled_BD.cpu().numpy())
            bar.update(len(mel_BVTF))
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


def standardised(train_ND: np.ndarray, eval_ND: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both with the train rows' mean and deviation taken out; a constant feature becomes 0, not nan."""
    mean_D, std_D = train_ND.mean(0), train_ND.std(0)
    scale_D = np.where(std_D > 1e-6, 1 / np.maximum(std_D, 1e-6), 0).astype(np.float32)
    train, evaluated = ((split_ND - mean_D) * scale_D for split_ND in (train_ND, eval_ND))
    return torch.from_numpy(train), torch.from_numpy(evaluated)


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


def chosen_l2(train_ND: Tensor, train_NC: np.ndarray, seed: int) -> float:
    """The penalty of `L2_GRID` whose probe, trained on 80 % of the train clips, ranks the other 20 % best."""
    order_N = np.random.default_rng([seed, 1]).permutation(len(train_ND))
    held_N, kept_N = np.split(order_N, [len(order_N) // 5])
    maps = [
        mean_average_precision(
            train_NC[held_N], linear_NC(train_ND[kept_N], train_NC[kept_N], train_ND[held_N], l2=l2)
        ).value
        for l2 in L2_GRID
    ]
    return L2_GRID[int(np.argmax(maps))]


def linear_NC(train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, l2: float) -> np.ndarray:
    """Scores of one logistic regression per class, fitted to all clips at once by L-BFGS; deterministic.

    Minimises the mean over clips of the summed binary cross-entropies plus `l2`/2 times the squared weights (in
    scikit-learn's terms C = 1/(l2 N)). A class without a train clip scores 0 everywhere: it cannot rank.
    """
    seen_C = np.flatnonzero(train_NC.any(axis=0))
    labels_NC = torch.from_numpy(train_NC[:, seen_C])
    weight_DC = torch.zeros(train_ND.shape[1], len(seen_C), requires_grad=True)
    bias_C = torch.zeros(len(seen_C), requires_grad=True)
    solver = torch.optim.LBFGS([weight_DC, bias_C], max_iter=200, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        entropy = nnf.binary_cross_entropy_with_logits(train_ND @ weight_DC + bias_C, labels_NC, reduction="sum")
        value = entropy / len(train_ND) + l2 / 2 * weight_DC.square().sum()
        value.backward()
        return value

    solver.step(loss)
    scores_NC = np.zeros((len(eval_ND), train_NC.shape[1]), np.float32)
    scores_NC[:, seen_C] = (eval_ND @ weight_DC + bias_C).detach().numpy()
    return scores_NC


def knn_NC(train_ND: Tensor, train_NC: np.ndarray, eval_ND: Tensor, *, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Share of the most similar train clips (cosine of standardised features) that carry each class."""
    known_ND, count = nnf.normalize(train_ND, dim=1), min(neighbours, len(train_ND))
    scores = []
    for asked_ND in nnf.normalize(eval_ND, dim=1).split(1024):  # 20 k train clips: 80 MB of similarities at a time
        nearest_NK = (asked_ND @ known_ND.T).topk(count, dim=1).indices
        scores.append(train_NC[nearest_NK.numpy()].mean(axis=1))
    return np.concatenate(scores)
