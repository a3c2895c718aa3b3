"""Frozen features: every clip of some rows as one vector, and as a few tokens to attend to."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from ajepa.model.pooling import (
    DEFAULT_POOLING,
    LAST_LAYER,
    ClipTokens,
    EncoderLayer,
    PoolingName,
    encode_views,
)
from ajepa.model.vit import Encoder
from ajepa.training.trained_run import TrainedRun
from pipeline.store.joined_store import AnyStore

CLIPS_PER_READ = 32

TO_PROBE = "to probe; leave out --probe to measure the classifier itself"

TRAINED, RANDOM, STATISTICS = "encoder", "random init", "log-mel statistics"  # kinds of features compared

MAX_CLIP_TOKENS = 64  # of a clip, for what attends to them: 20,000 clips of ViT-B are then 2 GB


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipViews:
    """A store's clips whole, cut one after the other into normalised views of `frames`."""

    store: AnyStore
    frames: int
    mean: float
    std: float

    def read_views(self, rows_B: np.ndarray) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFeatures:
    """What is known of N clips: a vector each, float32, and without need no tokens.

    tokens_NMD  float16: the grid's rows by stretches of time, each the mean over its valid tokens
    valid_NM    which of these hold sound
    """

    vectors_ND: np.ndarray
    tokens_NMD: np.ndarray | None = None
    valid_NM: np.ndarray | None = None

    def select_clips(self, clips_N: np.ndarray) -> "ClipFeatures":
        """Those of some of the clips."""
        if self.tokens_NMD is None or self.valid_NM is None:
            return ClipFeatures(vectors_ND=self.vectors_ND[clips_N])
        return ClipFeatures(
            vectors_ND=self.vectors_ND[clips_N],
            tokens_NMD=self.tokens_NMD[clips_N],
            valid_NM=self.valid_NM[clips_N],
        )


def clip_vectors(
    views: ClipViews,
    rows_N: np.ndarray,
    encoder: Encoder | None,
    *,
    pooling: PoolingName = DEFAULT_POOLING,
    layer: EncoderLayer = LAST_LAYER,
) -> np.ndarray:
    """One vector per clip, float32 `[N, D]`: its tokens, pooled, or without encoder its log-mel statistics."""
    return extract_features(views, rows_N, encoder, pooling=pooling, layer=layer).vectors_ND


def extract_features(
    views: ClipViews,
    rows_N: np.ndarray,
    encoder: Encoder | None,
    *,
    pooling: PoolingName = DEFAULT_POOLING,
    layer: EncoderLayer = LAST_LAYER,
    tokens: bool = False,
    progress_label: str | None = None,
) -> ClipFeatures:
    """The vectors, and with `tokens` at most `MOST_TOKENS` of each clip, from one pass of the encoder.

    `progress` is what a bar is called that shows how far it is, on a terminal.
    """
    vectors, kept, valid = [], [], []
    starts, told = (
        range(0, len(rows_N), CLIPS_PER_READ),
        {"unit": f" x {CLIPS_PER_READ} clips", "leave": False},
    )
    for start in tqdm(starts, desc=progress_label, disable=True if progress_label is None else None, **told):
        mel_BVTF, n_frames_BV = views.read_views(rows_N[start : start + CLIPS_PER_READ])
        if encoder is None:
            vectors.append(mel_statistics(mel_BVTF, n_frames_BV).numpy())
            continue
        said = encode_views(encoder, mel_BVTF, n_frames_BV, layer)
        vectors.append(said.pool_per_clip(pooling).numpy())
        if tokens:
            merged_BMD, valid_BM = merge_tokens(said)
            kept.append(merged_BMD.half().numpy())
            valid.append(valid_BM.numpy())
    if not kept:
        return ClipFeatures(vectors_ND=np.concatenate(vectors))
    return ClipFeatures(
        vectors_ND=np.concatenate(vectors), tokens_NMD=np.concatenate(kept), valid_NM=np.concatenate(valid)
    )


def merge_tokens(tokens: ClipTokens) -> tuple[Tensor, Tensor]:
    """All rows by as many stretches of time as `MOST_TOKENS` allow, `BMD`, and which of them hold sound, `BM`."""
    merged_BKRD, valid_BK = tokens.segment_means(max(1, MAX_CLIP_TOKENS // tokens.rows))
    valid_BM = valid_BK[..., None].expand(merged_BKRD.shape[:3]).flatten(1)
    return merged_BKRD.flatten(1, 2).nan_to_num(0.0), valid_BM


def mel_statistics(mel_BVTF: Tensor, n_frames_BV: Tensor) -> Tensor:
    """Mean and standard deviation of each mel band over a clip's valid frames, `[B, 2F]`."""
    mel_BTF, n_frames_B1 = mel_BVTF.flatten(1, 2), n_frames_BV.sum(1, keepdim=True)
    mean_BF = mel_BTF.sum(1) / n_frames_B1  # frames past the end are 0
    square_BF = mel_BTF.square().sum(1) / n_frames_B1
    return torch.cat([mean_BF, (square_BF - mean_BF.square()).clamp(min=0).sqrt()], dim=1)


def compared_encoders(trained: TrainedRun, device: torch.device) -> dict[str, Encoder | None]:
    """What is compared: the run's encoder, one of its shape with random weights, and none at all.

    The random one is that of a pre-trained run before its first step, and standardises bands as the trained one does.
    """
    spec = replace(trained.encoder_spec(TO_PROBE), drop_path=0.0)
    encoder = Encoder(spec, seed=trained.recipe.seed)
    random = Encoder(spec, seed=trained.recipe.seed)
    encoder.load_state_dict(trained.encoder_weights())
    if encoder.bands_2F is not None:
        random.set_band_statistics(*encoder.bands_2F)
    return {TRAINED: encoder.to(device).eval(), RANDOM: random.to(device).eval(), STATISTICS: None}
