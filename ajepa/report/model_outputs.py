"""Outputs of a trained model for held-out clips: a vector for each clip, and the prediction error of each patch."""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from ajepa.evaluate.classifier_scores import HeldOutScores, held_out_scores, held_out_task_data
from ajepa.evaluate.features import TRAINED, ClipViews, clip_vectors, compared_encoders
from ajepa.evaluate.probe_splits import good_eval_rows
from ajepa.evaluate.probes import standardise_features
from ajepa.model.jepa import Jepa
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.report.spectrograms import label_title
from pipeline.store.feature_store import FeatureStore
from pipeline.store.splits import evaluation_splits
from pipeline.store.summary import read_label_table

MAX_MAP_CLIPS = 300  # clips on the map; the page holds a spectrogram of each

MAX_TITLE_LETTERS = 60

HIDING_ROUNDS = 4  # each round hides another quarter of the patches


@dataclass(frozen=True, kw_only=True, slots=True)
class PageData:
    """A run, a store, and the model's vectors of eval clips of the store, on which the run was not trained."""

    run: Run
    recipe: Pretrain | Finetune
    store: FeatureStore
    labels: pl.DataFrame
    rows_N: np.ndarray  # eval clips
    # Standardised vectors of these clips: features of the encoder, or logits of the classifier.
    features_ND: np.ndarray
    # The logits and true labels of these clips; None for a pre-trained run, which has no classifier.
    task_scores: HeldOutScores | None = None

    @classmethod
    def from_run(cls, store: FeatureStore, run: Run) -> "PageData":
        """Compute the vectors; RunError if the run has no checkpoint, or if the run or the store has no eval clips."""
        # The clips and their vectors: logits of a fine-tuned run, else features.
        cpu = torch.device("cpu")
        trained = TrainedRun.open(run)
        recipe = trained.recipe
        task_scores = None
        if isinstance(recipe, Finetune):
            task_data = held_out_task_data(run, store)
            rows_N = draw_map_rows(task_data.eval_N, recipe.seed)
            task_scores = held_out_scores(trained, replace(task_data, eval_N=rows_N), cpu)
            vectors_ND = task_scores.logits_NC
        else:
            # All clips of a store that has folds, or only splits to train on.
            eval_N = good_eval_rows(store) if evaluation_splits(store) else store.good_rows()
            rows_N = draw_map_rows(eval_N, recipe.seed)
            encoder = compared_encoders(trained, cpu)[TRAINED]
            vectors_ND = clip_vectors(pretrained_views(store, run, recipe), rows_N, encoder)

        # Standardise the vectors by their own statistics, so that no dimension outweighs the others.
        features_ND = standardise_features(vectors_ND, vectors_ND)[0].numpy()
        labels = read_label_table(store)[0]
        return cls(
            run=run,
            recipe=recipe,
            store=store,
            labels=labels,
            rows_N=rows_N,
            features_ND=features_ND,
            task_scores=task_scores,
        )

    @property
    def vector_description(self) -> str:
        """The kind of the vectors, as text."""
        return "classifier's logits" if self.run.is_finetuned else "frozen encoder's features"

    def clip_id(self, row: int) -> str:
        """Return the id of a clip."""
        return str(self.store.manifest_columns("clip_id")["clip_id"][row])

    def clip_title(self, row: int) -> str:
        """Return the labels of a clip as a short text."""
        return label_title(self.store, self.labels, row, max_letters=MAX_TITLE_LETTERS)


def draw_map_rows(rows_N: np.ndarray, seed: int) -> np.ndarray:
    """Return at most MAX_MAP_CLIPS of the rows, drawn at random, in their original order."""
    return np.sort(np.random.default_rng([seed, 2]).permutation(rows_N)[:MAX_MAP_CLIPS])


def pretrained_views(store: FeatureStore, run: Run, recipe: Pretrain) -> ClipViews:
    """Return views of the store's clips, with the frames, mean and std of the run's training views."""
    mean = run.identity.mean
    std = run.identity.std
    return ClipViews(store=store, frames=recipe.view_frames, mean=mean, std=std)


def load_pretrained_model(run: Run, recipe: Pretrain) -> Jepa:
    """Return the whole model of a pre-trained run: encoder, predictor and teacher of its last checkpoint."""
    # The parts of a checkpoint have the names of the model's modules.
    model = Jepa(recipe.model, seed=recipe.seed).eval()
    parts = run.load_checkpoint("encoder", "predictor", "target").parts
    for name, tensors in parts.items():
        getattr(model, name).load_state_dict(tensors)
    return model


@torch.inference_mode()
def prediction_distance_BP(
    model: Jepa, mel_BTF: Tensor, n_frames_B: Tensor, *, hiding_rounds: int = HIDING_ROUNDS, seed: int = 0
) -> Tensor:
    """Return the cosine distance of prediction and target of every token, `BP` in [0, 2]; nan for padding tokens.

    Each round hides one share of the tokens and predicts them from the others; `seed` draws the shares.
    """
    # The targets, computed from the whole clip.
    grid = model.spec.encoder.grid
    device = mel_BTF.device
    valid_BP = model.valid_mask_if_padded(n_frames_B, device)
    target_BPD = model.compute_targets(mel_BTF, valid_BP).target_BPD

    # The predictions, one share of the tokens in each round.
    order_P = np.random.default_rng([seed, grid.tokens]).permutation(grid.tokens)
    distance_BP = torch.full((len(mel_BTF), grid.tokens), float("nan"), device=device)
    for hidden_Q in np.array_split(order_P, hiding_rounds):
        targets_BGQ = repeat_tokens_BN(np.sort(hidden_Q), mel_BTF)[:, None]
        context_BK = repeat_tokens_BN(np.setdiff1d(order_P, hidden_Q), mel_BTF)
        context_BKD = model.encoder(mel_BTF, context_BK, valid_BP)
        prediction_BQD = model.predictor(context_BKD, context_BK, targets_BGQ, valid_BP)[:, 0].float()
        tokens_Q = targets_BGQ[0, 0]
        distance_BP[:, tokens_Q] = 1 - F.cosine_similarity(prediction_BQD, target_BPD[:, tokens_Q], dim=-1)

    if valid_BP is not None:
        distance_BP = distance_BP.masked_fill(~valid_BP, float("nan"))
    return distance_BP


def repeat_tokens_BN(tokens_N: np.ndarray, mel_BTF: Tensor) -> Tensor:
    """Return the token numbers repeated for every clip of a batch, `BN`, on the device of the batch."""
    return torch.from_numpy(tokens_N).to(mel_BTF.device).expand(len(mel_BTF), -1).contiguous()
