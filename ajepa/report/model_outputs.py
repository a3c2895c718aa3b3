"""What a trained model says of held-out clips: a vector for each, and how well it predicts each patch."""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from ajepa.evaluate.classifier_scores import held_out_scores, held_out_task_data
from ajepa.evaluate.features import TRAINED, ClipViews, clip_vectors, compared_encoders
from ajepa.evaluate.probe_splits import good_eval_rows
from ajepa.evaluate.probes import standardise_features
from ajepa.model.jepa import Jepa, normalise_features
from ajepa.recipes.finetune import Finetune
from ajepa.recipes.pretrain import Pretrain
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.report.spectrograms import label_title
from pipeline.store.feature_store import FeatureStore
from pipeline.store.summary import read_label_table

MAX_MAP_CLIPS = 300  # each with its spectrogram on the page

MAX_TITLE_LETTERS = 60

HIDING_ROUNDS = 4  # a quarter of the patches is hidden at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class PageData:
    """A run, the store that it is shown on, and the model's vectors of some clips that it never saw."""

    run: Run
    recipe: Pretrain | Finetune
    store: FeatureStore
    labels: pl.DataFrame
    rows_N: np.ndarray  # eval clips
    features_ND: (
        np.ndarray
    )  # of these clips, standardised: features of the encoder, or logits of the classifier

    @classmethod
    def from_run(cls, store: FeatureStore, run: Run) -> "PageData":
        """Compute the vectors; RunError where the run has no checkpoint, or where it or the store has no such clips."""
        # The clips, and the vectors of a kind that the run has: logits, or features.
        cpu = torch.device("cpu")
        trained = TrainedRun.open(run)
        recipe = trained.recipe
        if isinstance(recipe, Finetune):
            task_data = held_out_task_data(run, store)
            rows_N = draw_map_rows(task_data.eval_N, recipe.seed)
            vectors_ND = held_out_scores(trained, replace(task_data, eval_N=rows_N), cpu).logits_NC
        else:
            rows_N = draw_map_rows(good_eval_rows(store), recipe.seed)
            encoder = compared_encoders(trained, cpu)[TRAINED]
            vectors_ND = clip_vectors(pretrained_views(store, run, recipe), rows_N, encoder)

        # Standardised by themselves: no dimension of a vector outweighs the others.
        features_ND = standardise_features(vectors_ND, vectors_ND)[0].numpy()
        labels = read_label_table(store)[0]
        return cls(run=run, recipe=recipe, store=store, labels=labels, rows_N=rows_N, features_ND=features_ND)

    @property
    def vector_description(self) -> str:
        """The kind of the vectors, in words."""
        return "classifier's logits" if self.run.is_finetuned else "frozen encoder's features"

    def clip_title(self, row: int) -> str:
        """The labels of a clip, shortened."""
        return label_title(self.store, self.labels, row, max_letters=MAX_TITLE_LETTERS)


def draw_map_rows(rows_N: np.ndarray, seed: int) -> np.ndarray:
    """As many of the rows as a map can show, drawn at random, in their order."""
    return np.sort(np.random.default_rng([seed, 2]).permutation(rows_N)[:MAX_MAP_CLIPS])


def pretrained_views(store: FeatureStore, run: Run, recipe: Pretrain) -> ClipViews:
    """The clips of a store as a pre-trained run saw those that it learnt from."""
    mean = run.identity["mean"]
    std = run.identity["std"]
    return ClipViews(store=store, frames=recipe.view_frames, mean=mean, std=std)


def load_pretrained_model(run: Run, recipe: Pretrain) -> Jepa:
    """The whole model of a pre-trained run: encoder, predictor and teacher of its last checkpoint."""
    # The parts of a checkpoint are named as the model's modules.
    model = Jepa(recipe.model, seed=recipe.seed).eval()
    parts = run.load_checkpoint("encoder", "predictor", "target").parts
    for name, tensors in parts.items():
        getattr(model, name).load_state_dict(tensors)
    return model


@torch.inference_mode()
def prediction_distance_BP(
    model: Jepa, mel_BTF: Tensor, n_frames_B: Tensor, *, hiding_rounds: int = HIDING_ROUNDS, seed: int = 0
) -> Tensor:
    """Cosine distance of prediction and target of every token, `BP` in [0, 2]; nan where a token holds no sound.

    In each round one share of the tokens is hidden and predicted from the others; `seed` draws the shares.
    """
    # The targets, from the whole clip.
    grid = model.spec.encoder.grid
    device = mel_BTF.device
    valid_BP = model.valid_mask_if_padded(n_frames_B, device)
    target_BPD = normalise_features(model.target_features(mel_BTF, valid_BP).float())

    # The predictions, a share of the tokens at a time.
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
    """The same tokens for every clip of a batch, `BN`, on its device."""
    return torch.from_numpy(tokens_N).to(mel_BTF.device).expand(len(mel_BTF), -1).contiguous()
