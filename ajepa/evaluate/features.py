"""Frozen features: each clip as one vector and, for the attentive probe, as at most 64 tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ajepa.model.pooling import (
    DEFAULT_POOLING,
    LAST_LAYER,
    ClipTokens,
    EncoderLayer,
    PoolingName,
    encode_views,
)
from ajepa.model.vit import Encoder
from ajepa.training.devices import FP32, Precision
from ajepa.training.trained_run import TrainedRun, build_initial_encoder
from pipeline.progress import open_progress
from pipeline.store.joined_store import AnyStore

CLIPS_PER_READ = 32

# End of the error message about a run without an encoder.
TO_PROBE = "to probe; leave out --probe to measure the classifier itself"

# The kinds of features that are compared.
TRAINED, RANDOM, STATISTICS = "encoder", "random init", "log-mel statistics"

# Tokens per clip for the attentive probe: 20,000 clips of ViT-B then take 2 GB of memory.
MAX_CLIP_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipViews:
    """The whole clips of a store, each cut into consecutive views of `frames`, normalised by `mean` and `std`."""

    store: AnyStore
    frames: int
    mean: float
    std: float

    def read_views(self, rows_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """The views of some rows, `mel_BVTF`, and their valid frames, `n_frames_BV`.

        Frames past a clip's end are 0. Encoders do not see these zeros (`pooling.encode_views`).
        """
        # Whole clips, normalised
        n_frames_B = torch.from_numpy(self.store.n_frames_N[rows_B].astype(np.int64))
        log_mel_BTF = torch.from_numpy(self.store.to_log_mel(self.store.read(rows_B)))
        mel_BTF = (log_mel_BTF - self.mean) / self.std
        mel_BTF[torch.arange(self.store.frames) >= n_frames_B[:, None]] = 0.0

        # Cut into views, the last of them padded
        count = -(-self.store.frames // self.frames)
        padded_BTF = nnf.pad(mel_BTF, (0, 0, 0, count * self.frames - self.store.frames))
        starts_V = torch.arange(count) * self.frames
        n_frames_BV = (n_frames_B[:, None] - starts_V).clamp(0, self.frames)
        return padded_BTF.reshape(len(rows_B), count, self.frames, -1), n_frames_BV


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFeatures:
    """The features of N clips: a float32 vector per clip and, if requested, M tokens per clip.

    tokens_NMD  float16, one token for each grid row and segment of time: the mean over the segment's valid tokens
    valid_NM    False where a token is padding
    """

    vectors_ND: np.ndarray
    tokens_NMD: np.ndarray | None = None
    valid_NM: np.ndarray | None = None

    def select_clips(self, clips_N: np.ndarray) -> "ClipFeatures":
        """The features of some of the clips."""
        if self.tokens_NMD is None or self.valid_NM is None:
            return ClipFeatures(vectors_ND=self.vectors_ND[clips_N])
        return ClipFeatures(
            vectors_ND=self.vectors_ND[clips_N],
            tokens_NMD=self.tokens_NMD[clips_N],
            valid_NM=self.valid_NM[clips_N],
        )


def compared_encoders(trained: TrainedRun, device: torch.device) -> dict[str, Encoder | None]:
    """The encoder of each kind of features: the run's own, one of random weights, and None for log-mel statistics.

    The random encoder is a pre-trained run's encoder before its first step (`at="init"`). It standardises mel bands as
    the trained encoder does.
    """
    spec = replace(trained.encoder_spec(TO_PROBE), drop_path=0.0)
    encoder = Encoder(spec)
    encoder.load_state_dict(trained.encoder_weights())
    random_encoder = build_initial_encoder(spec, trained.recipe.seed, encoder.bands_2F)
    return {
        TRAINED: encoder.to(device).eval(),
        RANDOM: random_encoder.to(device).eval(),
        STATISTICS: None,
    }


def clip_vectors(
    views: ClipViews,
    rows_N: np.ndarray,
    encoder: Encoder | None,
    *,
    pooling: PoolingName = DEFAULT_POOLING,
    layer: EncoderLayer = LAST_LAYER,
) -> np.ndarray:
    """One vector per clip, float32 `[N, D]`: its pooled tokens, or its log-mel statistics if `encoder` is None.

    Everything is computed in fp32.
    """
    return extract_features(views, rows_N, encoder, pooling=pooling, layer=layer).vectors_ND


def extract_features(
    views: ClipViews,
    rows_N: np.ndarray,
    encoder: Encoder | None,
    *,
    pooling: PoolingName = DEFAULT_POOLING,
    layer: EncoderLayer = LAST_LAYER,
    tokens: bool = False,
    precision: Precision = FP32,
    progress_label: str | None = None,
) -> ClipFeatures:
    """The vector of every clip and, with `tokens`, at most `MAX_CLIP_TOKENS` tokens, from one pass of the encoder.

    The encoder computes in `precision`; its tokens are pooled, and kept as vectors, in fp32. `progress_label` is the
    name of the progress that is shown; None: it is not shown.
    """
    vectors = []
    merged_tokens = []
    valid = []
    for mel_BVTF, n_frames_BV in iterate_views(views, rows_N, progress_label):
        if encoder is None:
            vectors.append(mel_statistics(mel_BVTF, n_frames_BV).numpy())
            continue

        # Tokens are merged after each read: keeping all of them would take many times the memory
        with precision.autocast(next(encoder.parameters()).device):
            clip_tokens = encode_views(encoder, mel_BVTF, n_frames_BV, layer)
        vectors.append(clip_tokens.pool_per_clip(pooling).numpy())
        if tokens:
            merged_BMD, valid_BM = merge_tokens(clip_tokens)
            merged_tokens.append(merged_BMD.half().numpy())
            valid.append(valid_BM.numpy())

    vectors_ND = np.concatenate(vectors)
    if not merged_tokens:
        return ClipFeatures(vectors_ND=vectors_ND)
    return ClipFeatures(
        vectors_ND=vectors_ND, tokens_NMD=np.concatenate(merged_tokens), valid_NM=np.concatenate(valid)
    )


def iterate_views(
    views: ClipViews, rows_N: np.ndarray, progress_label: str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the views of CLIPS_PER_READ rows after the other (`read_views`); clips are counted as the label says."""
    with open_progress(
        len(rows_N), label=progress_label or "", unit="clip", shown=progress_label is not None, leave=False
    ) as progress:
        for start in range(0, len(rows_N), CLIPS_PER_READ):
            rows_B = rows_N[start : start + CLIPS_PER_READ]
            yield views.read_views(rows_B)
            progress.update(len(rows_B))


def merge_tokens(tokens: ClipTokens) -> tuple[Tensor, Tensor]:
    """At most `MAX_CLIP_TOKENS` tokens of each clip, `BMD`, and which of them are valid, `BM`.

    Every row of the grid keeps its own tokens; neighbours in time are averaged.
    """
    merged_BKRD, valid_BK = tokens.segment_means(max(1, MAX_CLIP_TOKENS // tokens.rows))
    valid_BM = valid_BK[..., None].expand(merged_BKRD.shape[:3]).flatten(1)
    return merged_BKRD.flatten(1, 2).nan_to_num(0.0), valid_BM


def mel_statistics(mel_BVTF: Tensor, n_frames_BV: Tensor) -> Tensor:
    """Mean and standard deviation of each mel band over a clip's valid frames, `[B, 2F]`."""
    mel_BTF = mel_BVTF.flatten(1, 2)
    n_frames_B1 = n_frames_BV.sum(1, keepdim=True)
    mean_BF = mel_BTF.sum(1) / n_frames_B1  # frames past the end are 0
    square_BF = mel_BTF.square().sum(1) / n_frames_B1
    return torch.cat([mean_BF, (square_BF - mean_BF.square()).clamp(min=0).sqrt()], dim=1)
