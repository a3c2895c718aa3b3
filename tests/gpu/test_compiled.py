"""Compiled blocks compute what eager ones do; a file of its own, because compiling takes most of a minute."""

from dataclasses import replace

import pytest
from tiny import tiny

from ajepa.pretrain.pretrain import pretrain

pytestmark = pytest.mark.gpu

TOLERANCE = 2e-3  # relative, of the loss over the steps


def test_compiled_blocks_take_the_same_steps(store_path, tmp_path, gpu):
    """With masks of another size in every step, as a curriculum has them."""
    recipe = replace(tiny(), mask_sets=2, health_every=0)
    runs = [
        pretrain(
            store_path,
            recipe,
            tmp_path / name,
            steps=4,
            device=gpu,
            precision="fp32",
            compiled=compiled,
            say=lambda line: None,
        )
        for name, compiled in {"eager": False, "compiled": gpu == "cuda"}.items()
    ]
    eager, compiled = (run.read_metrics() for run in runs)
    for line, other in zip(eager, compiled, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=TOLERANCE)
