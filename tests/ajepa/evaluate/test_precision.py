"""What is reported is fp32 whatever the network computes in, and a result says what that was."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny, tiny_finetune

from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import ClipViews, extract_features
from ajepa.model import jepa
from ajepa.model.classifier import build_classifier
from ajepa.model.cnn6 import Cnn6Spec
from ajepa.model.jepa import Jepa
from ajepa.model.masking import RandomPatches
from ajepa.model.passt import PasstSpec
from ajepa.model.vit import Encoder
from ajepa.pretrain.pretrain import pretrain
from ajepa.training import devices
from ajepa.training.checkpoints import STATE_FILE
from ajepa.training.devices import FP32, PRECISION_VARIABLE, pick_measuring_precision, pick_precision
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun

CPU = torch.device("cpu")

BF16 = pick_precision("bf16", CPU)

SPECS = {
    "vit": tiny_finetune().model,
    "cnn6": Cnn6Spec(frames=64, bands=128, width=8),
    "passt": PasstSpec(frames=64, bands=128, width=32, depth=1, heads=2, drop_rows=0, drop_cols=0),
}


def share_of_bf16_numbers(x: torch.Tensor | np.ndarray) -> float:
    """The share of some float32 numbers that bf16 holds exactly; of numbers of full precision that is 1 in 65,536."""
    x = torch.as_tensor(x)
    return (x == x.bfloat16().float()).float().mean().item()


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_not_rounded_to_bf16(name):
    """256 steps from 1 to 2 tie the scores of many clips: an AudioSet-like mAP fell from .3792 to .3759."""
    model = build_classifier(SPECS[name], 40, 0).train(False)
    mel_BTF = torch.randn(6, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits_BC = model(mel_BTF, torch.full((6,), 64))
    assert logits_BC.dtype == torch.float32
    assert share_of_bf16_numbers(logits_BC) < 0.05


def test_the_loss_and_its_figures_are_computed_outside_autocast(monkeypatch):
    """Products of sums over thousands of tokens had 8 bits: the explained share came out in steps of .004."""
    seen = []
    score = jepa._score_predictions

    def watched(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return score(*arguments)

    monkeypatch.setattr(jepa, "_score_predictions", watched)
    model = Jepa(tiny().model)
    masks = RandomPatches().sample(np.random.default_rng(0), tiny().model.encoder.grid, batch=4)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            torch.randn(4, 64, 128),
            torch.from_numpy(masks.context_BK),
            torch.from_numpy(masks.targets_BGQ),
            torch.full((4,), 64),
        )
    assert seen == [False]
    assert output.explained.dtype == output.target_std.dtype == torch.float32


def test_features_of_a_bf16_encoder_are_pooled_and_kept_in_fp32(store):
    """Moments are differences of sums: in 8 bits they would be noise."""
    encoder = Encoder(tiny().model.encoder).eval()
    views = ClipViews(store=store, frames=64, mean=-9.0, std=4.0)
    rows_N = store.good_rows(["eval"])[:4]
    half, whole = (
        extract_features(views, rows_N, encoder, pooling="moments", precision=precision).vectors_ND
        for precision in (BF16, FP32)
    )
    assert half.dtype == np.float32
    assert share_of_bf16_numbers(half) < 0.05
    assert not np.array_equal(half, whole)
    np.testing.assert_allclose(half, whole, atol=0.1)


@pytest.mark.parametrize(
    ("asked", "trained_in", "variable", "has_bf16", "measured_in"),
    [
        ("auto", "fp32", None, True, "fp32"),
        ("auto", "bf16", None, True, "bf16"),
        ("auto", "bf16", None, False, "fp32"),
        ("auto", "fp16", None, True, "fp32"),
        ("auto", None, None, True, "fp32"),
        ("auto", "fp32", "bf16", True, "bf16"),
        ("bf16", "fp32", None, False, "bf16"),
        ("fp32", "bf16", "bf16", True, "fp32"),
    ],
)
def test_a_run_is_measured_in_what_it_was_trained_in(
    monkeypatch, asked, trained_in, variable, has_bf16, measured_in
):
    """Unless somebody says otherwise, and where the hardware has it; where nothing is known, in fp32."""
    monkeypatch.setattr(devices, "hardware_precision", lambda device: (has_bf16, "of a test"))
    monkeypatch.delenv(PRECISION_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(PRECISION_VARIABLE, variable)
    assert pick_measuring_precision(asked, CPU, trained_in).name == measured_in


def test_a_checkpoint_and_a_result_say_their_precision(store_path, tmp_path, monkeypatch):
    """A run may have been trained in one and measured in another, on purpose; the result tells both apart."""
    run = pretrain(
        store_path, tiny(), tmp_path / "run", steps=2, device="cpu", precision="bf16", say=lambda line: None
    )
    assert TrainedRun.open(run).precision == "bf16"
    options = {"device": "cpu", "probes": ["knn"]}
    by_variable = evaluate_run(store_path, run.path, **options, out=tmp_path / "fp32.json")
    asked_for = evaluate_run(store_path, run.path, **options, out=tmp_path / "bf16.json", precision="bf16")
    assert (by_variable.protocol.precision, asked_for.protocol.precision) == ("fp32", "bf16")
    assert "network computed in bf16, everything after it in fp32" in asked_for.format_table()

    # A checkpoint of before did not say; it is measured in fp32.
    state_path = run.checkpoint_folder("last") / STATE_FILE
    state = json.loads(state_path.read_text())
    del state["precision"], state["scored_on"]
    state_path.write_text(json.dumps(state | {"format": 1}))
    monkeypatch.delenv(PRECISION_VARIABLE)
    old = TrainedRun.open(Run.open(run.path))
    assert old.precision is None
    assert old.pick_precision(CPU).name == "fp32"
