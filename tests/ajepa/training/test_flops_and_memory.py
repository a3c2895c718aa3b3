"""The cost of a step by formula: operations as torch counts them, memory as a process really takes it."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import start_forked
from step_memory import (
    CLASSES_MEASURED,
    measured_classifier_recipe,
    measured_pretrain_recipe,
    print_classifier_bytes,
    print_pretrain_bytes,
)
from tiny import tiny, tiny_finetune, tiny_views
from torch.utils.flop_counter import FlopCounterMode

from ajepa.model.classifier import RegularisedMasking, build_classifier
from ajepa.model.cnn6 import Cnn6Spec
from ajepa.model.jepa import Jepa, JepaSpec
from ajepa.model.masking import Fixed, RandomBlocks, RandomPatches
from ajepa.model.passt import PasstSpec
from ajepa.model.patches import PatchGrid
from ajepa.model.sigreg import ClipObjective, Projector
from ajepa.model.transformer import written_out_attention
from ajepa.model.vit import EncoderSpec, PredictorSpec
from ajepa.pretrain.trainer import PretrainTrainer
from ajepa.recipes.catalogue import finetune_recipe
from ajepa.recipes.pretrain import Pretrain, a_jepa_recipe, small_recipe
from ajepa.training.devices import pick_precision
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.flops import StepShape, classifier_step_cost, pretrain_step_flop, transformer_shape
from ajepa.training.memory import (
    BYTES_PER_GB,
    SmallerOptions,
    classifier_memory,
    encoder_weight_count,
    predictor_weight_count,
    pretrain_memory,
    projector_weight_count,
    refuse_large_classifier,
    refuse_large_pretrain,
    suggest_smaller_step,
    transformer_weight_count,
)
from pipeline.errors import RunError
from pipeline.loading.loader import Batch

CLIPS = 6


def count_step_flop(recipe: Pretrain, monkeypatch, *, recompute: bool) -> tuple[int, StepShape]:
    """What torch counts in a step's forward and backward pass, and the step's shape.

    Attention is written out, for torch counts nothing in its fused kernel on CPUs; the signs of health are left
    out, which are products with a vector.
    """
    monkeypatch.setattr(
        "ajepa.model.transformer.choose_attention", lambda device, dtype: written_out_attention
    )
    monkeypatch.setattr(
        "ajepa.model.jepa._weighted_variance_D", lambda x, share: (x.flatten(0, -2) - 1).square().mean(0)
    )
    model, grid = Jepa(recipe.model), recipe.model.encoder.grid
    if recompute:
        model.enable_recompute()
    rng = np.random.default_rng(3)
    masks = recipe.masks.mask_maker_at(0, rng).sample(rng, grid, batch=CLIPS * recipe.mask_sets)
    mel_BTF = torch.randn(CLIPS, grid.frames, grid.bands)
    context_BK, targets_BGQ = torch.from_numpy(masks.context_BK), torch.from_numpy(masks.targets_BGQ)
    with FlopCounterMode(display=False) as counter:
        model(mel_BTF, context_BK, targets_BGQ, torch.full((CLIPS,), grid.frames), rng).loss.backward()
    _, groups, queries = targets_BGQ.shape
    shape = StepShape(
        clips=CLIPS, context_tokens=context_BK.shape[1], target_groups=groups, tokens_per_group=queries
    )
    return counter.get_total_flops(), shape


def options(**changes) -> Pretrain:
    """The tiny recipe, its model changed, of depth 2."""
    model = tiny().model
    encoder = replace(model.encoder, depth=2, **changes.pop("encoder", {}))
    return tiny(model=replace(model, encoder=encoder, **changes))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        options(),
        options(target_layers=2),
        options(encoder={"positions": "rope"}),
        options(encoder={"layer_scale": 0.1}),
        options(encoder={"drop_path": 0.1}),
        replace(options(), mask_sets=3),
        replace(options(), masks=Fixed(masking=RandomPatches())),
        replace(options(), masks=Fixed(masking=RandomBlocks())),
    ],
    ids=["plain", "layers", "rope", "scale", "drop", "sets", "patches", "blocks"],
)
def test_the_formula_counts_what_torch_counts(recipe, recompute, monkeypatch):
    """To the last operation, whatever the options: a cost that is off by a third compares nothing."""
    flop, shape = count_step_flop(recipe, monkeypatch, recompute=recompute)
    assert pretrain_step_flop(recipe, shape, recompute=recompute) == flop


@pytest.mark.parametrize("micro_clips", [None, 3])
def test_the_formula_counts_views_and_the_clip_objective(micro_clips, monkeypatch):
    """A whole step of the trainer; passes see every context twice, once without a gradient, which is not counted."""
    monkeypatch.setattr(
        "ajepa.model.transformer.choose_attention", lambda device, dtype: written_out_attention
    )
    monkeypatch.setattr(
        "ajepa.model.jepa._weighted_variance_D", lambda x, share: (x.flatten(0, -2) - 1).square().mean(0)
    )
    monkeypatch.setattr(Jepa, "context_means", lambda model, *inputs: torch.randn(len(inputs[1]), 32))
    recipe = tiny_views(clips_per_step=CLIPS)
    trainer = PretrainTrainer(recipe, CPU, precision=pick_precision("fp32", CPU), micro_clips=micro_clips)
    frames = recipe.source_frames
    batch = Batch(
        mel_BTF=torch.randn(2 * CLIPS, frames, 128),
        n_frames_B=torch.full((2 * CLIPS,), frames),
        rows_B=np.arange(CLIPS),
        labels_BC=None,
    )
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(0, batch)
    assert pretrain_step_flop(recipe, trainer.step_shape) == counter.get_total_flops()


LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")

CPU = torch.device("cpu")


def measure_bytes(print_bytes: Callable[[list[str]], None], arguments: list[str], output: Path) -> int:
    """What a measurement of `step_memory` prints in a process of its own."""
    process = start_forked(print_bytes, arguments, output=output, environment=os.environ)
    process.join()
    assert process.exitcode == 0, output.read_text()
    return int(output.read_text())


@LINUX
@pytest.mark.parametrize(
    "arguments",
    [[], ["bf16"], ["recompute"], ["micro"], ["masks=patches", "model.target_layers=1"]],
    ids=str,
)
def test_the_estimate_is_near_what_a_process_takes(arguments, tmp_path):
    """`small` in a process of its own: the resident peak of two steps, within a factor of 1.5.

    A pass of a few clips takes some MB, of which glibc has more or less in hand from the steps before, as it happens
    (the ratio went from 1.20 to 1.57): there it is told to give them back, as it does larger ones.
    """
    measured_bytes = measure_bytes(print_pretrain_bytes, arguments, tmp_path / "bytes")
    bf16 = "bf16" in arguments
    estimate = pretrain_memory(
        measured_pretrain_recipe(arguments),
        bf16=bf16,
        written_out=bf16,
        recompute="recompute" in arguments,
        micro_clips=8 if "micro" in arguments else None,
    ).total_bytes
    assert 1 / 1.5 < estimate / measured_bytes < 1.5


@pytest.mark.parametrize(
    "options", [{}, {"layer_scale": 0.1}, {"positions": "rope", "drop_path": 0.1}], ids=str
)
def test_weights_are_counted_to_the_last_one(options):
    """By arithmetic, since building a model to see whether it fits would defeat the purpose."""
    encoder = EncoderSpec(grid=PatchGrid(rows=2, cols=3), width=48, depth=3, heads=4, **options)
    predictor = PredictorSpec(width=24, depth=2, heads=2, **options)
    jepa = Jepa(JepaSpec(encoder=encoder, predictor=predictor))
    assert encoder_weight_count(encoder) == sum(p.numel() for p in jepa.encoder.parameters())
    assert predictor_weight_count(predictor, 48) == sum(p.numel() for p in jepa.predictor.parameters())
    objective = ClipObjective(hidden=20, width=7)
    projector = Projector(48, objective, seed=0)
    assert projector_weight_count(objective, 48) == sum(p.numel() for p in projector.parameters())


def test_the_sizes_of_the_papers_by_arithmetic():
    """Audio-JEPA (arXiv 2507.02915): 85,253,376 and 11,238,912."""
    assert encoder_weight_count(EncoderSpec(grid=PatchGrid.from_size(256, 128))) == 85_253_376
    assert predictor_weight_count(PredictorSpec(), 768) == 11_238_912


def test_activations_grow_with_the_clips_and_the_mask_sets_and_shrink_when_recomputed():
    """What to lower, and what lowers what."""
    recipe = small_recipe()
    one, two = (pretrain_memory(recipe.with_counts(clips_per_step=clips), bf16=False) for clips in (64, 128))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.1)
    assert (two.weights, two.gradients, two.moments) == (one.weights, one.gradients, one.moments)
    twice = replace(recipe.with_counts(clips_per_step=64), mask_sets=2 * recipe.mask_sets)
    sets = pretrain_memory(twice, bf16=False)
    assert 1.6 * one.activations < sets.activations < 2 * one.activations
    assert pretrain_memory(recipe, bf16=False, recompute=True).activations < 0.7 * (
        pretrain_memory(recipe, bf16=False).activations
    )


def test_a_recipe_larger_than_memory_is_refused_with_figures_and_what_to_lower(monkeypatch):
    """Before its first step, and not by the kernel's killer at three in the morning."""
    monkeypatch.setattr("ajepa.training.memory.free_memory_bytes", lambda device: int(20 * BYTES_PER_GB))
    with pytest.raises(RunError) as refused:
        refuse_large_pretrain(a_jepa_recipe(), CPU, half=False)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("recipe a-jepa needs about ")
    assert "activations" in message
    assert "for 512 clips at once, cpu has 20.00 GB free; try --recompute, or --micro-batch " in message
    clips = int(message.split("--micro-batch ")[1].split(",")[0])
    refuse_large_pretrain(a_jepa_recipe(), CPU, half=False, micro_clips=clips)
    with pytest.raises(RunError, match=f"for {2 * clips} clips at once"):
        refuse_large_pretrain(a_jepa_recipe(), CPU, half=False, micro_clips=2 * clips)
    refuse_large_pretrain(small_recipe(), CPU, half=False)


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    """Four processes that each see all that is free would together need four times as much."""
    monkeypatch.setattr("ajepa.training.memory.free_memory_bytes", lambda device: int(20 * BYTES_PER_GB))
    monkeypatch.setattr(World, "wait_for_ranks", lambda world: None)
    clips = a_jepa_recipe().with_counts(clips_per_step=64)
    refuse_large_pretrain(clips, CPU, half=False, micro_clips=1, world=World(size=4, local_size=1))
    with pytest.raises(RunError, match=r"cpu has 5\.00 GB free for each of 4 ranks; try --recompute"):
        refuse_large_pretrain(clips, CPU, half=False, world=World(size=4, local_size=4))


def test_a_model_too_large_for_one_clip_is_not_told_to_take_fewer(monkeypatch):
    """`--batch 0` would be no advice."""
    needed = pretrain_memory(a_jepa_recipe(), bf16=False)
    advice = suggest_smaller_step(512, needed, int(1.0 * BYTES_PER_GB), SmallerOptions(recompute=False))
    assert (
        advice
        == "not one clip would fit: try a smaller model (--set model.encoder.width, model.encoder.depth)"
    )


def test_a_device_that_does_not_say_what_is_free_refuses_nothing(monkeypatch, tmp_path):
    """Not every system has /proc/meminfo; a guess would stop runs that fit."""
    monkeypatch.setattr("ajepa.training.memory.PROC_MEMINFO", tmp_path / "none")
    refuse_large_pretrain(a_jepa_recipe(), CPU, half=False)


def test_free_memory_is_what_linux_calls_available(monkeypatch, tmp_path):
    """Caches count as free, what others use does not."""
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemFree: 5 kB\nMemAvailable:     300 kB\n")
    monkeypatch.setattr("ajepa.training.memory.PROC_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(RunError, match=r"cpu has 0\.00 GB free; not one clip would fit"):
        refuse_large_pretrain(small_recipe(), CPU, half=False)


CLASSES = 7

PASST = PasstSpec(frames=64, bands=64, width=32, depth=2, heads=2, drop_rows=1, drop_cols=1)

CNN6 = Cnn6Spec(frames=64, bands=32, width=4)


@LINUX
@pytest.mark.parametrize(
    "arguments",
    [
        ["vit"],
        ["vit", "bf16"],
        ["vit", "recompute"],
        ["vit", "micro"],
        ["passt"],
        ["cnn6"],
        ["cnn6", "bf16"],
        ["convnext"],
    ],
    ids=str,
)
def test_the_estimate_is_near_what_training_a_classifier_takes(arguments, tmp_path):
    """In a process of its own: the resident peak of two steps, within a factor of 1.5.

    Recomputed blocks and filters come and go in pieces of some MB, which glibc keeps for the process: up to twice of
    what is in use. There it is told to give them back, as it does larger ones, such as those of larger models.
    """
    measured_bytes = measure_bytes(print_classifier_bytes, arguments, tmp_path / "bytes")
    needed = classifier_memory(
        measured_classifier_recipe(arguments),
        CLASSES_MEASURED,
        bf16="bf16" in arguments,
        written_out="bf16" in arguments,
        recompute="recompute" in arguments,
        micro_clips=4 if "micro" in arguments else None,
    )
    assert 1 / 1.5 < needed.total_bytes / measured_bytes < 1.5, (str(needed), measured_bytes / BYTES_PER_GB)


def test_weights_are_counted_by_arithmetic():
    """All but some single vectors of a PaSST, its positions."""
    for recipe in (tiny_finetune(), replace(tiny_finetune(), model=PASST)):
        counted = sum(weight.numel() for weight in build_classifier(recipe.model, CLASSES, 0).parameters())
        shape = transformer_shape(recipe)
        assert shape is not None
        assert transformer_weight_count(shape, CLASSES) == pytest.approx(counted, rel=0.02)


TOKENS_MASKED = RegularisedMasking(share=0.2, reading="tokens")

VIT = tiny_finetune().model

PLAIN = replace(VIT, encoder=replace(VIT.encoder, drop_path=0.0))

COUNTED = {
    "vit": (VIT, False),
    "recomputed": (VIT, True),
    "plain": (PLAIN, True),
    "tokens": (replace(PLAIN, masking=TOKENS_MASKED), True),
    "passt": (PASST, False),
    "cnn6": (CNN6, False),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_the_formula_counts_what_torch_counts_of_a_classifier(kind, monkeypatch):
    """To the last operation. Attention is written out, for torch counts nothing in its fused kernel on CPUs."""
    monkeypatch.setattr(
        "ajepa.model.transformer.choose_attention", lambda device, dtype: written_out_attention
    )
    model, recompute = COUNTED[kind]
    recipe = replace(tiny_finetune(), model=model, clips_per_step=5)
    classifier = build_classifier(model, CLASSES, 0)
    if recompute:
        classifier.encoder.recompute = True
    mel_BTF, n_frames_B = torch.randn(5, model.frames, model.bands), torch.full((5,), model.frames)
    with FlopCounterMode(display=False) as counter:
        classifier(mel_BTF, n_frames_B, np.random.default_rng(0)).sum().backward()
    cost = classifier_step_cost(recipe, CLASSES, recompute=recompute)
    assert cost.flop == counter.get_total_flops()
    assert (cost.step, cost.clips, cost.predicted_tokens) == (1, 5, 0)
    tokens = {"passt": 4 * 4 + 2, "cnn6": 0}.get(kind, 4 * 8)
    assert cost.context_tokens == 5 * tokens


@pytest.mark.parametrize(
    ("model", "gb", "advice"),
    [
        ("audioset-20k", 8, "try --recompute, or --micro-batch "),
        (
            "audioset-20k",
            1,
            "not one clip would fit: try --recompute, or a smaller model (--set model.encoder.width",
        ),
        ("passt", 3, "try --micro-batch "),
        ("cnn6-small", 0.02, "try --batch "),
    ],
)
def test_a_recipe_larger_than_memory_is_refused_with_what_to_lower(monkeypatch, model, gb, advice):
    """What is offered fits; batch norms cannot do with fewer clips at once, but with fewer a step."""
    monkeypatch.setattr("ajepa.training.memory.free_memory_bytes", lambda device: int(gb * BYTES_PER_GB))
    recipe = finetune_recipe(model)
    options = {"half": False, "recompute": False, "world": SINGLE_PROCESS}
    with pytest.raises(RunError) as refused:
        refuse_large_classifier(recipe, 527, CPU, micro_clips=None, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"recipe {model} needs about ")
    assert advice in message
    assert f"for {recipe.clips_per_step} clips at once, cpu has {gb:.2f} GB free; " in message
    if advice.endswith("batch "):
        fewer = int(message.split(advice)[1].split(",")[0])
        changed = replace(recipe, clips_per_step=fewer) if "--batch" in advice else recipe
        refuse_large_classifier(changed, 527, CPU, micro_clips=fewer, **options)


def test_ranks_of_one_machine_share_its_memory_for_a_classifier(monkeypatch):
    """As in pre-training: each has its own copy of everything but the clips."""
    monkeypatch.setattr("ajepa.training.memory.free_memory_bytes", lambda device: int(12 * BYTES_PER_GB))
    monkeypatch.setattr(World, "wait_for_ranks", lambda world: None)
    options = {"half": False, "recompute": False, "micro_clips": 1}
    refuse_large_classifier(
        finetune_recipe("audioset-20k"), 527, CPU, world=World(size=4, local_size=1), **options
    )
    with pytest.raises(RunError, match=r"free for each of 8 ranks; not one clip"):
        refuse_large_classifier(
            finetune_recipe("audioset-20k"), 527, CPU, world=World(size=8, local_size=8), **options
        )
