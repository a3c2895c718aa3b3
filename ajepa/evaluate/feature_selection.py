"""Feature selection: which pooling of which layer gives a run's encoder the best vectors, by probes on training clips.

The clips that measure are training clips too, of other sounds than those that train the probes, so nothing of the
evaluation splits is used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ajepa.evaluate.features import TO_PROBE, ClipViews
from ajepa.evaluate.linear_probe import linear_probe_scores_NC
from ajepa.evaluate.probes import knn_scores_NC, selection_metric, standardise_features
from ajepa.model.pooling import (
    LAST_LAYER,
    ClipTokens,
    EncoderLayer,
    PoolingName,
    encode_views,
)
from ajepa.model.vit import Encoder, EncoderSpec
from ajepa.training.feature_choice import (
    FALLBACK_BLOCKS,
    FeatureCandidate,
    FeatureChoice,
    vector_width,
)
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import BrokenClipError
from pipeline.messages import print_to_stderr
from pipeline.store.joined_store import AnyStore
from pipeline.store.splits import held_out_mask_N, train_splits

SELECTION_CLIPS = 2_000

# Of the sounds; the second where the first holds back too few clips. It holds back the same sounds and more.
HELD_SHARES = (0.25, 0.4)

SELECTION_DRAW = 4  # the stream of a recipe's seed that draws the clips

# The rare classes of few clips only add noise to the mean over classes, and cost as much as frequent ones.
MAX_CLASSES = 64

# Below this nothing is chosen: 20 clips tell two candidates apart by no less than a tenth.
MIN_HELD_CLIPS = 20

MIN_CLASS_CLIPS = 2  # of each class, both to train on and held back

# Wider vectors are no candidates: 20,000 clips of this width take 2.6 GB in an evaluation.
MAX_WIDTH = 32_768

SELECTION_L2 = 0.1  # as for the probes while training: a fixed penalty

CLIPS_PER_READ = 16

SCORE_DIGITS = 4  # that are stored: the last bits depend on the number of threads


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SelectionClips:
    """Labelled training clips: N rows of the store, which of them are held back, and their labels of C classes.

    single           whether every clip has exactly one label
    labelled         number of labelled training clips that were drawn from
    held_with_label  number of clips that were held back, also of classes that are not probed
    """

    rows_N: np.ndarray
    is_held_N: np.ndarray
    labels_NC: np.ndarray
    single: bool
    labelled: int
    held_with_label: int

    @property
    def held_clips(self) -> int:
        """The number of clips that measure."""
        return int(self.is_held_N.sum())

    def select_clips(self, kept_N: np.ndarray) -> "SelectionClips":
        """Only the clips of a mask."""
        return replace(
            self,
            rows_N=self.rows_N[kept_N],
            is_held_N=self.is_held_N[kept_N],
            labels_NC=self.labels_NC[kept_N],
        )

    @classmethod
    def from_store(cls, store: AnyStore, seed: int, max_clips: int = SELECTION_CLIPS) -> "SelectionClips":
        """Draw labelled clips of the training splits by the seed; there may be too few of them (`shortage`)."""
        for held_share in HELD_SHARES:
            clips = cls._hold_back(store, seed, max_clips, held_share)
            if clips.shortage is None:
                break
        return clips

    @classmethod
    def _hold_back(cls, store: AnyStore, seed: int, max_clips: int, held_share: float) -> "SelectionClips":
        # The rows that have a label.
        rows_N = store.good_rows(train_splits(store))
        _, offsets_N = store.flat_labels()
        label_counts_N = np.diff(offsets_N)
        labelled_N = rows_N[label_counts_N[rows_N] > 0]
        order_N = np.random.default_rng([seed, SELECTION_DRAW]).permutation(labelled_N)
        rows_N = np.sort(order_N[:max_clips])

        # Hold sounds back. A table may name pieces of one file as it likes: none of such a file trains either.
        clips = store.manifest[rows_N]
        is_held_N = held_out_mask_N(clips["clip_id"], held_share, seed)
        sources = clips["source"].to_numpy()
        of_held_sound_N = np.isin(sources.astype(str), sources[is_held_N].astype(str))
        found = cls(
            rows_N=rows_N,
            is_held_N=is_held_N,
            labels_NC=store.labels_BC(rows_N),
            single=bool((label_counts_N[rows_N] == 1).all()),
            labelled=len(labelled_N),
            held_with_label=int(is_held_N.sum()),
        )
        return found.select_clips(is_held_N | ~of_held_sound_N).keep_frequent_classes()

    def keep_frequent_classes(self) -> "SelectionClips":
        """The most frequent classes that both parts have, and the clips that have one of them."""
        fit_C = self.labels_NC[~self.is_held_N].sum(0)
        held_C = self.labels_NC[self.is_held_N].sum(0)
        usable_C = np.minimum(fit_C, held_C) >= MIN_CLASS_CLIPS
        counts_C = np.where(usable_C, fit_C + held_C, 0)
        kept_C = np.sort(np.argsort(-counts_C, kind="stable")[: min(MAX_CLASSES, int(usable_C.sum()))])
        labels_NC = self.labels_NC[:, kept_C]
        return replace(self, labels_NC=labels_NC).select_clips(np.asarray(labels_NC.any(axis=1)))

    @property
    def shortage(self) -> str | None:
        """Why these clips do not suffice; None if they do."""
        if self.held_clips < MIN_HELD_CLIPS:
            return (
                f"of {self.labelled} labelled training clips {self.held_with_label} were held back, in whole sounds, "
                f"and {self.held_clips} of these are of a class with {MIN_CLASS_CLIPS} clips both held back and to "
                f"train on; "
                f"{MIN_HELD_CLIPS} are needed"
            )
        if self.labels_NC.shape[1] < 2:
            return f"fewer than 2 classes have {MIN_CLASS_CLIPS} clips both to train on and held back"
        return None


def choose_features(
    run: Run,
    store: AnyStore,
    device: torch.device,
    *,
    max_clips: int = SELECTION_CLIPS,
    say: Callable[[str], None] = print_to_stderr,
) -> FeatureChoice | None:
    """Probe every candidate on the encoder of a run's last checkpoint; None, with a line, if there are too few labels.

    `store` is the one that the run was trained on. A clip that cannot be read is left out. On one machine the same run
    gives the same choice.
    """
    # The clips: enough of them, or no choice.
    trained = TrainedRun.open(run)
    clips = SelectionClips.from_store(store, trained.recipe.seed, max_clips)
    if clips.shortage is not None:
        say(
            f"{run.path}: no pooling and layer chosen by probes: {clips.shortage}; the fixed default is used: label "
            "more sounds of each class, or choose with ajepa-train evaluate --pooling NAME --layer NAME"
        )
        return None

    # Their vectors by every candidate, from one pass over the clips.
    spec = trained.encoder_spec(TO_PROBE)
    encoder = Encoder(replace(spec, drop_path=0.0))
    encoder.load_state_dict(trained.encoder_weights())
    encoder.to(device).eval()
    identity = run.identity
    views = ClipViews(store=store, frames=spec.grid.frames, mean=identity.mean, std=identity.std)
    clips, vectors_by_candidate = candidate_vectors(views, clips, encoder)

    # Both probes of every candidate.
    candidates = [
        probe_candidate(pooling, layer, vectors_ND, clips)
        for (pooling, layer), vectors_ND in vectors_by_candidate.items()
    ]
    return FeatureChoice(
        step=trained.step,
        store_id=store.store_id,
        metric="accuracy" if clips.single else "mAP",
        fit_clips=len(clips.rows_N) - clips.held_clips,
        held_clips=clips.held_clips,
        classes=clips.labels_NC.shape[1],
        candidates=tuple(candidates),
    )


def candidate_layers(spec: EncoderSpec) -> list[EncoderLayer]:
    """The layers that are probed: the last, the mean of the last four blocks, these side by side, and all of them."""
    blocks = min(FALLBACK_BLOCKS, spec.depth)
    return [
        LAST_LAYER,
        EncoderLayer(last_blocks=blocks),
        EncoderLayer(last_blocks=blocks, concatenated=True),
        EncoderLayer(concatenated=True),
    ]


def candidate_poolings(layer: EncoderLayer, spec: EncoderSpec) -> list[PoolingName]:
    """The poolings of a layer whose vectors are not too wide."""
    poolings: tuple[PoolingName, ...] = ("mean", "moments")
    return [pooling for pooling in poolings if vector_width(pooling, layer, spec) <= MAX_WIDTH]


def candidate_vectors(
    views: ClipViews, clips: SelectionClips, encoder: Encoder
) -> tuple[SelectionClips, dict[tuple[PoolingName, EncoderLayer], np.ndarray]]:
    """The clips that can be read, and a vector for each of them by every candidate, float32 `ND`."""
    parts: dict[tuple[PoolingName, EncoderLayer], list[np.ndarray]] = {}
    read_rows = []
    for start in range(0, len(clips.rows_N), CLIPS_PER_READ):
        # Leave out what cannot be read, one clip at a time.
        rows_B = clips.rows_N[start : start + CLIPS_PER_READ]
        while len(rows_B):
            try:
                mel_BVTF, n_frames_BV = views.read_views(rows_B)
                break
            except BrokenClipError as error:
                rows_B = rows_B[rows_B != error.row]
        if not len(rows_B):
            continue
        read_rows.append(rows_B)

        # One pass, then every pooling of every layer.
        every_layer = encode_views(encoder, mel_BVTF, n_frames_BV, EveryLayer())
        for layer, tokens in layer_tokens(encoder.spec, every_layer):
            for pooling in candidate_poolings(layer, encoder.spec):
                vectors_BD = tokens.pool_per_clip(pooling).numpy()
                parts.setdefault((pooling, layer), []).append(vectors_BD)
    kept_N = np.isin(clips.rows_N, np.concatenate(read_rows))
    return clips.select_clips(kept_N), {key: np.concatenate(vectors) for key, vectors in parts.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class EveryLayer:
    """The encoder's output and, after it, its input and all blocks side by side: one pass serves all candidates."""

    def encode_tokens(self, encoder: Encoder, mel_BTF: Tensor, valid_BP: Tensor | None = None) -> Tensor:
        """Return the vector of every token, `[B, P, (2 + depth) D]`."""
        outputs = encoder.top_block_outputs(mel_BTF, encoder.spec.depth + 1, valid_BP=valid_BP)
        layers = [nnf.layer_norm(x_BPD, x_BPD.shape[-1:]) for x_BPD in outputs]
        return torch.cat([encoder.norm(outputs[-1]), *layers], dim=-1)


def layer_tokens(spec: EncoderSpec, every_layer: ClipTokens) -> Iterator[tuple[EncoderLayer, ClipTokens]]:
    """The tokens of every layer of `candidate_layers`, from those of `EveryLayer`."""
    tokens_NPLD = every_layer.tokens_NPD.unflatten(-1, (2 + spec.depth, spec.width))
    blocks_NPLD = tokens_NPLD[:, :, 1:]
    for layer in candidate_layers(spec):
        # Of a layer without `last_blocks` that is not the last one, all blocks count.
        if layer == LAST_LAYER:
            layer_NPD = tokens_NPLD[:, :, 0]
        else:
            top_NPLD = blocks_NPLD[:, :, -layer.last_blocks :] if layer.last_blocks else blocks_NPLD
            layer_NPD = top_NPLD.flatten(2) if layer.concatenated else top_NPLD.mean(2)
        yield layer, replace(every_layer, tokens_NPD=layer_NPD)


def probe_candidate(
    pooling: PoolingName, layer: EncoderLayer, vectors_ND: np.ndarray, clips: SelectionClips
) -> FeatureCandidate:
    """Train both probes on the clips that are not held back, and measure them on those that are."""
    fit_N = ~clips.is_held_N
    fit_ND, held_ND = standardise_features(vectors_ND[fit_N], vectors_ND[clips.is_held_N])
    fit_NC = clips.labels_NC[fit_N]
    held_NC = clips.labels_NC[clips.is_held_N]
    knn_NC = knn_scores_NC(fit_ND, fit_NC, held_ND)
    linear_NC = linear_probe_scores_NC(fit_ND, fit_NC, held_ND, l2=SELECTION_L2, single=clips.single)
    knn, linear = (
        round(selection_metric(held_NC, scores_NC, single=clips.single), SCORE_DIGITS)
        for scores_NC in (knn_NC, linear_NC)
    )
    return FeatureCandidate(pooling=pooling, layer=layer, width=vectors_ND.shape[1], knn=knn, linear=linear)
