"""A script of somebody who uses both packages, for mypy to check as strictly as it can; it is never run."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import ajepa
import pipeline


def embed_sounds(run: Path) -> torch.Tensor:
    """Vectors, errors, times, and the encoder as a network."""
    model = ajepa.load(run, device="cpu", pooling="moments", layer="concat-all")
    found = model.embed(["a.wav", np.zeros(44_100, np.int16)], rate_hz=44_100, errors="row")
    for number, error in found.errors.items():
        print(number, error.reason, str(error))
    seconds: float = found[0].seconds
    reason: str = model.features.reason
    print(f"ajepa {ajepa.__version__}", seconds, reason, found[0].frames_TD.shape, found[0].times_ms_T.shape)
    module = model.module.requires_grad_(True).train()
    clips_BD: torch.Tensor = module.clip_vectors(torch.zeros(1, 64, 128))
    return clips_BD


def read_store(path: str) -> int:
    """Rows, datasets and batches."""
    store = pipeline.FeatureStore.open(path)
    for batch in DataLoader(store.dataset("train", labels="raw"), batch_size=4):
        print(batch["mel"].shape)
    for clip in DataLoader(store):
        print(clip["row"])
    with pipeline.open_batches(store, "train", labels="raw") as batches:
        for made in batches:
            print(made.mel_BTF.shape)
    rows: int = len(store.good_rows("train"))
    return rows
