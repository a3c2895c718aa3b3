"""A GPU trains, fine-tunes, measures, embeds and exports what the CPU does, within the rounding of float32."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sounds import babble
from tiny import tiny, tiny_finetune, tiny_views

import ajepa
from ajepa.embed.export import export_encoder
from ajepa.evaluate.evaluate import evaluate_run
from ajepa.evaluate.features import TRAINED, ClipViews, clip_vectors, compared_encoders
from ajepa.evaluate.tasks import TASKS
from ajepa.finetune.finetune import finetune
from ajepa.pretrain.pretrain import pretrain
from ajepa.training.run import Run
from ajepa.training.trained_run import TrainedRun
from pipeline.loading.dali import DaliLoader
from pipeline.loading.loader import PlainLoader, View
from pipeline.loading.sampling import RowOrder
from pipeline.store.feature_store import FeatureStore

pytestmark = pytest.mark.gpu

STEPS = 6

LOGGED_TOLERANCE = 2e-3  # relative, of loss and gradient norm over STEPS steps in fp32

BF16_TOLERANCE = 3e-2  # the same in bf16

RATE_HZ = 32_000

CLIP_VECTOR_TOLERANCE = 1e-3  # of values about 1


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def run(store_path, tmp_path_factory) -> Run:
    """A run of the CPU, for what comes after training."""
    path = tmp_path_factory.mktemp("cpu") / "run"
    return pretrain(store_path, tiny(), path, steps=STEPS, device="cpu", precision="fp32", say=quiet)


def assert_same_course(on_gpu: Run, on_cpu: Run, tolerance: float) -> None:
    """Equal losses and gradients, step by step: a wrong update would show in the next step's loss."""
    lines = on_cpu.read_metrics()
    assert [line["step"] for line in on_gpu.read_metrics()] == [line["step"] for line in lines]
    for gpu_line, line in zip(on_gpu.read_metrics(), lines, strict=True):
        for name in ("loss", "gradient_norm"):
            assert gpu_line[name] == pytest.approx(line[name], rel=tolerance), (line["step"], name)


@pytest.mark.parametrize("recipe", [tiny(max_gradient_norm=1.0), tiny_views()], ids=["papers", "views"])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", LOGGED_TOLERANCE), ("bf16", BF16_TOLERANCE)], ids=["fp32", "bf16"]
)
def test_pretraining_takes_the_steps_of_the_cpu(store_path, tmp_path, gpu, recipe, precision, tolerance):
    """Masks, views, drop path and clips are the same; only the order of sums differs."""
    runs = [
        pretrain(store_path, recipe, tmp_path / name, steps=STEPS, say=quiet, **options)
        for name, options in {
            "gpu": {"device": gpu, "precision": precision},
            "cpu": {"device": "cpu", "precision": "fp32", "loader": "plain"},
        }.items()
    ]
    assert_same_course(*runs, tolerance)


def test_passes_and_recomputation_take_the_same_steps(store_path, tmp_path, gpu):
    """The options for large models change memory and speed, and nothing of the result."""
    recipe = replace(tiny(), mask_sets=2)
    options = [{}, {"micro_batch": 3}, {"recompute": True}]
    whole, *others = (
        pretrain(
            store_path,
            recipe,
            tmp_path / str(number),
            steps=3,
            device=gpu,
            precision="fp32",
            say=quiet,
            **each,
        )
        for number, each in enumerate(options)
    )
    for other in others:
        assert_same_course(other, whole, LOGGED_TOLERANCE)


def test_finetuning_takes_the_steps_of_the_cpu(store_path, tmp_path, gpu, run):
    """With every augmentation, drop path, masking, layer-wise rates and the average of the weights."""
    start = TrainedRun.open(run.path)
    recipe = start.adapt_recipe(tiny_finetune(steps=STEPS))
    runs = [
        finetune(
            store_path,
            TASKS["own"],
            recipe,
            tmp_path / device,
            start=start,
            device=device,
            precision="fp32",
            say=quiet,
        )
        for device in dict.fromkeys((gpu, "cpu"))
    ]
    assert_same_course(runs[0], runs[-1], LOGGED_TOLERANCE)


def test_frozen_features_and_their_scores_are_those_of_the_cpu(store, tmp_path, gpu, run):
    """Features agree closely; scores of a few clips may jump where two of them change places."""
    trained = TrainedRun.open(run.path)
    views = ClipViews(store=store, frames=64, mean=-5.0, std=3.0)
    rows_N = store.good_rows()[:12]
    encoders = [compared_encoders(trained, torch.device(device))[TRAINED] for device in (gpu, "cpu")]
    on_gpu_ND, on_cpu_ND = (clip_vectors(views, rows_N, encoder) for encoder in encoders)
    torch.testing.assert_close(on_gpu_ND, on_cpu_ND, rtol=CLIP_VECTOR_TOLERANCE, atol=CLIP_VECTOR_TOLERANCE)
    evaluations = [
        evaluate_run(store, run.path, device=device, probes=("knn",), out=tmp_path / f"{device}.json")
        for device in (gpu, "cpu")
    ]
    for one, other in zip(*(evaluation.scores for evaluation in evaluations), strict=True):
        assert one.primary_estimate.value == pytest.approx(other.primary_estimate.value, abs=0.05)


def test_embeddings_of_a_run_and_of_its_export_are_those_of_the_cpu(tmp_path, gpu, run):
    """From the wave to the vector: front end, windows and encoder."""
    export_encoder(run.path, tmp_path / "model", licence="cc-by-4.0")
    wave_S = babble(3.0, RATE_HZ)
    expected_D = ajepa.load(run.path, device="cpu").embed_audio(wave_S, RATE_HZ).clips_BD
    for location in (run.path, tmp_path / "model"):
        actual_D = ajepa.load(location, device=gpu).embed_audio(wave_S, RATE_HZ).clips_BD.cpu()
        torch.testing.assert_close(
            actual_D, expected_D, rtol=CLIP_VECTOR_TOLERANCE, atol=CLIP_VECTOR_TOLERANCE
        )


def test_dali_makes_the_plain_batches_however_late_they_are_used(store: FeatureStore, gpu):
    """Uploads are read from pinned buffers that are written again: none may be overwritten on its way."""
    order = RowOrder(rows_N=store.good_rows(), clips=8, seed=0)
    view = View(frames=998, mean=-5.0, std=3.0)
    plain = PlainLoader(store, order, view)
    kept = []
    with DaliLoader(store, order, view, device=gpu) as loader:
        for batch in loader.batches(0, 12):
            if gpu == "cuda":
                torch.cuda._sleep(50_000_000)  # the device is behind, the loader ahead
            kept.append(batch.mel_BTF.clone())
    for step, mel_BTF in enumerate(kept):
        expected = plain.make_batch(step)
        torch.testing.assert_close(mel_BTF.cpu(), expected.mel_BTF, rtol=1e-6, atol=2e-6)
        assert np.array_equal(order.rows_at_step(step), expected.rows_B)
