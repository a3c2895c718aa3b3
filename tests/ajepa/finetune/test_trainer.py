"""A step of fine-tuning: rates by depth, losses, the moving average, labels of the task."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_finetune

from ajepa.finetune.trainer import (
    FinetuneTrainer,
    layerwise_adamw,
    refuse_unsplittable_model,
    update_weight_average,
)
from ajepa.model.classifier import RegularisedMasking, VitSpec, build_classifier, classifier_kind_name
from ajepa.model.passt import PasstSpec
from ajepa.model.randomness import MicroBatchRng, step_rng
from ajepa.recipes.catalogue import FINETUNE_RECIPES, finetune_recipe
from ajepa.recipes.optimiser import AdamW
from ajepa.training.devices import Precision, pick_precision
from ajepa.training.distributed import SINGLE_PROCESS, World
from ajepa.training.trainer import BadStep
from pipeline.errors import RunError
from pipeline.loading.loader import Batch

CPU = torch.device("cpu")

FP32 = pick_precision("fp32", CPU)


def batch(classes: int = 3, clips: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        mel_BTF=torch.randn(clips, 64, 128, generator=generator),
        n_frames_B=torch.full((clips,), 64),
        rows_B=np.arange(clips),
        labels_BC=torch.eye(classes)[torch.arange(clips) % classes],
    )


def trainer(classes: int = 3, *, single: bool = True, **changes) -> FinetuneTrainer:
    options = {
        name: changes.pop(name) for name in ("micro_clips", "precision", "recompute") if name in changes
    }
    return FinetuneTrainer(tiny_finetune(**changes), torch.eye(classes), CPU, single_label=single, **options)


def test_the_rate_falls_with_the_distance_from_the_head():
    """Embedding, two blocks, head with norm: each layer's rate is 0.75 of that above it."""
    made = trainer()
    made.train_step(10, batch())
    lr = made.recipe.learning_rate(10)
    rate_of = {id(w): group["lr"] for group in made.optimiser.param_groups for w in group["params"]}
    for depth, layer in enumerate(made.model.weights_by_depth()):
        assert [rate_of[id(weight)] for weight in layer] == pytest.approx(
            [lr * 0.75 ** (3 - depth)] * len(layer)
        )


def test_every_weight_is_trained_and_only_matrices_decay():
    """A weight in no group would stay as it was drawn."""
    made = trainer(optimiser=AdamW(weight_decay=0.3))
    weights = [weight for group in made.optimiser.param_groups for weight in group["params"]]
    assert sorted(map(id, weights)) == sorted(map(id, made.model.parameters()))
    for group in made.optimiser.param_groups:
        assert {group["weight_decay"]} == {0.3 if weight.ndim > 1 else 0.0 for weight in group["params"]}
    before = [weight.detach().clone() for weight in weights]
    for step in (5, 6, 7):
        made.train_step(step, batch())
    assert not [w.shape for w, old in zip(weights, before, strict=True) if torch.equal(w, old)]


def test_the_average_follows_the_weights_slower_and_is_what_is_measured():
    """In the first steps it forgets its random start: (1 + step) / (10 + step) at most is kept."""
    made = trainer(ema=0.9)
    for step in (0, 1, 200):
        old = {name: value.clone() for name, value in made.weight_average.named_parameters()}
        made.train_step(step, batch())
        momentum = min(0.9, (1 + step) / (10 + step))
        new = dict(made.model.named_parameters())
        for name, value in made.weight_average.named_parameters():
            torch.testing.assert_close(value, momentum * old[name] + (1 - momentum) * new[name])
    assert made.evaluated_model is made.weight_average
    assert trainer(ema=0.0).evaluated_model is not None
    assert "average" not in trainer(ema=0.0).make_checkpoint(1).parts


def test_buffers_that_count_are_copied_into_the_average():
    """Batch norms count their batches; a mean of whole numbers is none."""
    average, model = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    for _ in range(3):
        model(torch.randn(4, 2))
    update_weight_average(average, model, 0.5)
    assert average.num_batches_tracked == 3
    torch.testing.assert_close(average.running_mean, model.running_mean / 2)


@pytest.mark.parametrize(
    ("loss", "single", "expected"),
    [("auto", True, "ce"), ("auto", False, "bce"), ("bce", True, "bce"), ("ce", True, "ce")],
)
def test_the_loss_is_cross_entropy_where_clips_have_one_class(loss, single, expected):
    """And what the recipe says where it says one: the papers learn some single-label tasks with BCE."""
    made = trainer(single=single, loss=loss)
    logits_BC, labels_BC = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    ce = -torch.log_softmax(logits_BC, dim=1)[0, 0]
    bce = torch.nn.functional.softplus(torch.tensor([-2.0, 0.0, -1.0])).mean()
    torch.testing.assert_close(made.loss(logits_BC, labels_BC), {"ce": ce, "bce": bce}[expected])


def test_classes_are_merged_as_their_clips_are_mixed():
    """Half of one word and half of another unknown one are wholly unknown; several labels are not counted twice."""
    merge_SC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    made = FinetuneTrainer(tiny_finetune(), merge_SC, CPU, single_label=True)
    mixed = replace(batch(), labels_BC=torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5], [0.0, 1.0, 1.0]]))
    assert made.labels_BC(mixed).tolist() == [[0.25, 0.75], [0.0, 1.0], [0.0, 1.0]]


def test_a_step_is_a_function_of_the_seed_the_step_and_the_batch():
    """torch's own generator is never drawn from."""
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append([trainer().train_step(step, batch())["loss"] for step in (0, 0, 1)])
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[0][1] != losses[0][2]


def test_what_is_restored_goes_on_as_what_was_kept():
    """Weights, moments, average."""
    first, second = trainer(), trainer(seed=9)
    for step in range(3):
        first.train_step(step, batch())
    second.restore_checkpoint(copy.deepcopy(first.make_checkpoint(3)))
    second.recipe = first.recipe
    assert first.train_step(3, batch()) == second.train_step(3, batch())
    for name, value in first.weight_average.state_dict().items():
        assert torch.equal(value, second.weight_average.state_dict()[name])


PASST = PasstSpec(frames=64, bands=128, width=32, depth=2, heads=2, drop_rows=2, drop_cols=1)

TOKENS = VitSpec(
    encoder=tiny_finetune().model.encoder, masking=RegularisedMasking(share=0.2, reading="tokens")
)

MODELS = {"keys": tiny_finetune().model, "tokens": TOKENS, "passt": PASST}


def shortened(whole: Batch) -> Batch:
    """Clips of all lengths: what is drawn must not depend on what the others are."""
    n_frames_B = torch.tensor([64, 5, 40, 64, 17, 33, 64, 50])
    return replace(
        whole,
        mel_BTF=whole.mel_BTF * (torch.arange(64) < n_frames_B[:, None])[..., None],
        n_frames_B=n_frames_B,
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("micro_clips", [1, 3, 4])
@pytest.mark.parametrize("single", [True, False])
def test_a_step_in_several_passes_is_that_in_one(kind, micro_clips, single):
    """Masking, drop path and patchout are drawn for all clips, and every loss is divided by all of them."""
    whole = trainer(single=single, model=MODELS[kind], precision=FP32)
    parts = trainer(single=single, model=MODELS[kind], precision=FP32, micro_clips=micro_clips)
    for step in (3, 4, 5):
        one, several = (each.train_step(step, shortened(batch())) for each in (whole, parts))
        assert several == pytest.approx(one, rel=2e-4)
    for weight, other in zip(
        whole.weight_average.parameters(), parts.weight_average.parameters(), strict=True
    ):
        torch.testing.assert_close(other, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_ranks_draw_what_one_process_draws_for_their_clips(kind):
    """The logits of each half, in training, are those of the whole; with draws of their own they would not be."""
    classifier, whole = build_classifier(MODELS[kind], 3, 0).train(), shortened(batch())
    logits_BC = classifier(whole.mel_BTF, whole.n_frames_B, step_rng(0, 7))
    for first in (0, 4):
        clips = slice(first, first + 4)
        rank_logits_BC = classifier(
            whole.mel_BTF[clips], whole.n_frames_B[clips], MicroBatchRng(step_rng(0, 7), first, 8)
        )
        torch.testing.assert_close(rank_logits_BC, logits_BC[clips], rtol=1e-4, atol=1e-5)
    own_BC = classifier(whole.mel_BTF[4:], whole.n_frames_B[4:], step_rng(0, 7))
    assert not torch.allclose(own_BC, logits_BC[4:], rtol=1e-2)


def test_of_a_passes_generator_comes_what_comes_of_the_whole_steps():
    """One number after the other, whatever their shapes; whoever holds all clips has the plain generator."""
    plain = np.random.default_rng(5)
    of_all = [plain.random((8, 3)), plain.random((8,)), plain.random((8, 2, 5))]
    for first, clips in ((0, 8), (0, 3), (3, 4), (7, 1)):
        pass_rng = MicroBatchRng(np.random.default_rng(5), first, 8)
        for shape, whole in zip(((3,), (), (2, 5)), of_all, strict=True):
            assert np.array_equal(pass_rng.random((clips, *shape)), whole[first : first + clips])


def test_recomputing_changes_nothing_but_memory():
    """To the bit, with everything on that is random."""
    first, second = trainer(), trainer(recompute=True)
    for step in (0, 1):
        assert first.train_step(step, batch()) == second.train_step(step, batch())
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["cnn6", "convnext"])
def test_batch_norms_are_trained_whole_or_not_at_all(name):
    """Their statistics are those of all clips of a step; a part has others, and another gradient."""
    recipe, options = finetune_recipe(name), {"world": SINGLE_PROCESS, "recompute": False}
    refuse_unsplittable_model(recipe, micro_clips=None, **options)
    refuse_unsplittable_model(recipe, micro_clips=recipe.clips_per_step, **options)
    with pytest.raises(RunError, match=f"--micro-batch 4: a {name} normalises each clip by all"):
        refuse_unsplittable_model(recipe, micro_clips=4, **options)
    with pytest.raises(RunError, match=f"2 ranks: a {name} normalises each clip by all .* use one process"):
        refuse_unsplittable_model(recipe, micro_clips=None, world=World(size=2), recompute=False)
    with pytest.raises(RunError, match=f"--recompute: a {name} keeps what its blocks compute"):
        refuse_unsplittable_model(recipe, micro_clips=None, world=SINGLE_PROCESS, recompute=True)


@pytest.mark.parametrize(
    "name", [name for name in FINETUNE_RECIPES if name not in ("cnn6", "convnext", "cnn6-small")]
)
def test_what_may_be_trained_in_parts_has_no_batch_norm(name):
    """Of every other recipe's kind, by looking at the modules."""
    refuse_unsplittable_model(finetune_recipe(name), world=World(size=2), micro_clips=1, recompute=False)
    spec = finetune_recipe(name).model
    small = {"vit": tiny_finetune().model, "passt": PASST}[classifier_kind_name(spec)]
    assert not [
        m
        for m in build_classifier(small, 3, 0).modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
    ]


def test_a_scaled_loss_that_overflows_costs_its_step_and_lowers_the_scale():
    """As in pre-training; neither weights nor their average move, and the scale is carried on with."""
    fp16 = Precision(dtype=torch.float16, description="fp16")
    made, again = trainer(precision=fp16), trainer(precision=fp16)
    made.scaler.load_state_dict(made.scaler.state_dict() | {"scale": 2.0**60})
    before = copy.deepcopy(made.make_checkpoint(3).parts)
    metrics = made.train_step(3, batch())
    assert metrics["overflowed"] == 1
    assert "gradient_norm" not in metrics
    for part in ("classifier", "average"):
        tensors = made.make_checkpoint(4).parts[part]
        assert all(torch.equal(value, tensors[name]) for name, value in before[part].items())
    again.restore_checkpoint(made.make_checkpoint(4))
    assert again.scaler.get_scale() == made.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_step_keeps_what_computes_its_loss_again(precision):
    """Clips, labels as they were mixed, and where its draws begin; the weights are those before it."""
    made = trainer(precision=pick_precision(precision, CPU))
    with torch.no_grad():
        made.model.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(
        BadStep, match=r"step 5: gradient_norm is .*its clips are finite: lower the learning"
    ) as bad:
        made.train_step(4, batch())
    record, tensors = bad.value.record, bad.value.tensors
    rng = MicroBatchRng(
        step_rng(record["seed"], record["step"] - 1), record["first_clip"], record["clips_per_step"]
    )
    with made.precision.autocast(CPU):
        logits_BC = made.model(tensors["mel_BTF"], tensors["n_frames_B"], rng)
        loss = made.loss(logits_BC, tensors["labels_BC"])
    assert loss.item() == record["loss"]


def test_layers_that_are_empty_make_no_group():
    model = build_classifier(tiny_finetune().model, 2, 0)
    groups = layerwise_adamw([[], *model.weights_by_depth()], AdamW(), 1.0).param_groups
    assert {group["share"] for group in groups} == {1.0}
