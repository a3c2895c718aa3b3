"""A store in folds for the tests of fine-tuning."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.audio.mel_spec import preset_mel_spec
from pipeline.build.build import build_store
from pipeline.build.plan import BuildOptions, StoreOutput
from pipeline.datasets.folder import folder_corpus


@pytest.fixture(scope="package")
def folds_path(tmp_path_factory) -> Path:
    """Forty sounds of one second in the shape of ESC-50: low and high tones in noise, in two folds."""
    home, rng = tmp_path_factory.mktemp("folds"), np.random.default_rng(0)
    lines = ["path,label,split"]
    (home / "sounds").mkdir()
    for number in range(40):
        label, hz = ("low", 300.0) if number % 2 else ("high", 3_000.0)
        wave_S = 0.2 * np.sin(2 * np.pi * hz * rng.uniform(0.8, 1.2) * np.arange(16_000) / 16_000)
        soundfile.write(
            home / "sounds" / f"{number}.wav", wave_S + 0.02 * rng.standard_normal(16_000), 16_000
        )
        lines.append(f"{number}.wav,{label},fold{1 + number // 20}")
    (home / "table.csv").write_text("\n".join(lines) + "\n")
    corpus = folder_corpus(home / "sounds", home / "table.csv", clip_seconds=1.0)
    spec = replace(preset_mel_spec("a-jepa"), clip_seconds=1.0)
    build_store(corpus, StoreOutput(path=home / "folds.zarr", spec=spec), BuildOptions(workers=0))
    return home / "folds.zarr"
