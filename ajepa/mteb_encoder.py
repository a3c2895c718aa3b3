"""An encoder for MTEB's audio tasks, MAEB: `mteb.evaluate(MtebEncoder("RUN"), mteb.get_tasks(modalities=["audio"]))`.

https://github.com/embeddings-benchmark/mteb asks of a model for `encode`, similarities and its metadata. Tasks with
texts are not for this encoder.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ajepa.embed.embedder import load
from ajepa.embed.pretrained import LAST_CHECKPOINT
from ajepa.embed.sound_inputs import read_array
from ajepa.model.pooling import PoolingName
from pipeline.errors import RunError


class MtebEncoder:
    """The vectors of `Embedder.embed` under the names of MTEB's protocol for encoders.

    `model_name` is a run, an export, or ORG/NAME on the hub, of which `revision` is a branch, tag or commit; the other
    options are those of `ajepa.load`.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        at: str | int = LAST_CHECKPOINT,
        device: str | None = None,
        pooling: PoolingName | None = None,
        layer: str | None = None,
        **other: Any,
    ) -> None:
        location = f"{model_name}@{revision}" if revision else model_name
        self.embedder = load(location, at=at, device=device or "auto", pooling=pooling, layer=layer)
        self.name = model_name

    def encode(self, inputs: Iterable[Mapping[str, Any]], **task_options: Any) -> np.ndarray:
        """One vector a sound, float32 `[N, D]`, of batches whose `audio` is a list of `array` and `sampling_rate`.

        A sound shorter than a frame of the spectrogram is padded with silence to it. RunError for a batch without
        audio, AudioError for a sound that cannot be used.
        """
        vectors = []
        for batch in inputs:
            if "audio" not in batch:
                raise RunError(
                    f"a batch of {', '.join(batch)}: this encoder is for audio alone; leave the task out"
                )
            sounds = [self._padded_sound(value) for value in batch["audio"]]
            vectors.append(self.embedder.embed(sounds, errors="raise").clips_BD)
        return torch.cat(vectors or [torch.zeros(0, self.embedder.width)]).numpy()

    def _padded_sound(self, value: Any) -> dict[str, Any]:
        """The sound, mono and at least a frame long."""
        sound = read_array(value, None, "audio")
        mel = self.embedder.mel
        shortest = -(-mel.window_samples * sound.rate_hz // mel.sample_rate_hz) + 1
        wave_S = np.pad(sound.wave_S, (0, max(0, shortest - len(sound.wave_S))))
        return {"array": wave_S, "sampling_rate": sound.rate_hz}

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """The cosine of every vector of the first with every one of the second, `[N, M]`."""
        return unit_rows(embeddings1) @ unit_rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """The cosine of vectors at the same place, `[N]`."""
        return (unit_rows(embeddings1) * unit_rows(embeddings2)).sum(-1)

    @property
    def mteb_model_meta(self) -> Any:
        """MTEB's description of the model; needs mteb."""
        from mteb.models import ModelMeta

        pretrained = self.embedder.pretrained
        return ModelMeta.create_empty(
            overwrites={
                "name": f"ajepa/{pretrained.recipe_name}",
                "revision": pretrained.model_id,
                "modalities": ["audio"],
                "embed_dim": self.embedder.width,
                "n_parameters": sum(weight.numel() for weight in pretrained.weights.values()),
                "license": pretrained.licence,
                "framework": ["PyTorch"],
                "similarity_fn_name": "cosine",
            }
        )


def unit_rows(vectors: Any) -> Tensor:
    """Vectors scaled to length 1, `[N, D]`; one vector is a batch of one."""
    return nnf.normalize(torch.atleast_2d(torch.as_tensor(vectors).float()), dim=-1)
