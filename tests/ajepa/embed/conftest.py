"""A fine-tuned run of two classes of tones, for everything that predicts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sounds import write
from tiny import tiny, tiny_finetune

from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.pretrain.pretrain import pretrain
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.folder import folder_corpus

RATE_HZ = 16_000


def tone(label: str, seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    hz = {"low": 300.0, "high": 3_000.0}[label] * rng.uniform(0.8, 1.2)
    wave_S = 0.2 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ)
    return (wave_S + 0.02 * rng.standard_normal(len(wave_S))).astype(np.float32)


@pytest.fixture(scope="package")
def tones(tmp_path_factory) -> SimpleNamespace:
    """Forty sounds of 1 s in two folders, their store with a fifth held out, a pre-trained and a fine-tuned run."""
    home: Path = tmp_path_factory.mktemp("tones")
    for number in range(40):
        label = ("low", "high")[number % 2]
        (home / "sounds" / label).mkdir(parents=True, exist_ok=True)
        write(home / "sounds" / label / f"{number}.wav", tone(label, 1.0, number), RATE_HZ)
    corpus = folder_corpus(home / "sounds", clip_seconds=1.0, label_from="parent", holdout=0.2)
    spec = replace(preset_mel_spec("a-jepa"), clip_seconds=1.0)
    build_store(corpus, StoreOutput(path=home / "tones.zarr", spec=spec), BuildOptions(workers=0))

    quiet = {"device": "cpu", "say": lambda line: None}
    pretrained = pretrain(home / "tones.zarr", tiny(), home / "pretrained", steps=2, **quiet).path
    start = TrainedRun.open(pretrained)
    recipe = tiny_finetune(base_lr=0.3)
    recipe = replace(recipe, model=replace(recipe.model, pooling="moments"))
    tuned = finetune(
        home / "tones.zarr", TASKS["own"], start.adapt_recipe(recipe), home / "tuned", start=start, **quiet
    ).path
    return SimpleNamespace(
        home=home,
        sounds=home / "sounds",
        store=home / "tones.zarr",
        pretrained=pretrained,
        tuned=tuned,
    )
