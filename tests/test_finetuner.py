"""A step of fine-tuning: rates by depth, losses, the moving average, labels of the task."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_finetune

from ajepa.finetuner import Finetuner, follow, layered_adamw
from ajepa.models import built
from ajepa.optimiser import AdamW
from pipeline.loader import Batch

CPU = torch.device("cpu")


def batch(classes: int = 3, clips: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        mel_BTF=torch.randn(clips, 64, 128, generator=generator),
        n_frames_B=torch.full((clips,), 64),
        rows_B=np.arange(clips),
        labels_BC=torch.eye(classes)[torch.arange(clips) % classes],
        weights_B=torch.ones(clips),
    )


def trainer(classes: int = 3, *, single: bool = True, **changes) -> Finetuner:
    return Finetuner(tiny_finetune(**changes), torch.eye(classes), CPU, single=single)


def test_the_rate_falls_with_the_distance_from_the_head():
    """Embedding, two blocks, head with norm: each layer's rate is 0.75 of that above it."""
    made = trainer()
    made.step(10, batch())
    lr = made.recipe.lr(10)
    rate_of = {id(w): group["lr"] for group in made.optimiser.param_groups for w in group["params"]}
    for depth, layer in enumerate(made.model.layers()):
        assert [rate_of[id(weight)] for weight in layer] == pytest.approx(
            [lr * 0.75 ** (3 - depth)] * len(layer)
        )


def test_every_weight_is_trained_and_only_matrices_decay():
    """A weight in no group would stay as it was drawn."""
    made = trainer(optimiser=AdamW(weight_decay=0.3))
    held = [weight for group in made.optimiser.param_groups for weight in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, made.model.parameters()))
    for group in made.optimiser.param_groups:
        assert {group["weight_decay"]} == {0.3 if weight.ndim > 1 else 0.0 for weight in group["params"]}
    before = [weight.detach().clone() for weight in held]
    for step in (5, 6, 7):
        made.step(step, batch())
    assert not [w.shape for w, old in zip(held, before, strict=True) if torch.equal(w, old)]


def test_the_average_follows_the_weights_slower_and_is_what_is_measured():
    """In the first steps it forgets its random start: (1 + step) / (10 + step) at most is kept."""
    made = trainer(ema=0.9)
    for step in (0, 1, 200):
        old = {name: value.clone() for name, value in made.average.named_parameters()}
        made.step(step, batch())
        kept = min(0.9, (1 + step) / (10 + step))
        new = dict(made.model.named_parameters())
        for name, value in made.average.named_parameters():
            torch.testing.assert_close(value, kept * old[name] + (1 - kept) * new[name])
    assert made.measured is made.average
    assert trainer(ema=0.0).measured is not None
    assert "average" not in trainer(ema=0.0).checkpoint(1).parts


def test_buffers_that_count_are_copied_into_the_average():
    """Batch norms count their batches; a mean of whole numbers is none."""
    average, model = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    for _ in range(3):
        model(torch.randn(4, 2))
    follow(average, model, 0.5)
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
    made = Finetuner(tiny_finetune(), merge_SC, CPU, single=True)
    mixed = replace(batch(), labels_BC=torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5], [0.0, 1.0, 1.0]]))
    assert made.labels_BC(mixed).tolist() == [[0.25, 0.75], [0.0, 1.0], [0.0, 1.0]]


def test_a_step_is_a_function_of_the_seed_the_step_and_the_batch():
    """torch's own generator is never drawn from."""
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append([trainer().step(step, batch())["loss"] for step in (0, 0, 1)])
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[0][1] != losses[0][2]


def test_what_is_restored_goes_on_as_what_was_kept():
    """Weights, moments, average."""
    first, second = trainer(), trainer(seed=9)
    for step in range(3):
        first.step(step, batch())
    second.restore(copy.deepcopy(first.checkpoint(3)))
    second.recipe = first.recipe
    assert first.step(3, batch()) == second.step(3, batch())
    for name, value in first.average.state_dict().items():
        assert torch.equal(value, second.average.state_dict()[name])


def test_layers_that_are_empty_make_no_group():
    model = built(tiny_finetune().model, 2, 0)
    groups = layered_adamw([[], *model.layers()], AdamW(), 1.0).param_groups
    assert {group["share"] for group in groups} == {1.0}
