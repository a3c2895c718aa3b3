"""CNN6, ConvNeXt and PaSST: the sizes in their papers, and the promises of every classifier."""

import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from ajepa.model.cnn6 import Cnn6, Cnn6Spec, pool_mean_and_max
from ajepa.model.convnext import ConvNext, ConvNextSpec
from ajepa.model.passt import Passt, PasstSpec
from ajepa.model.randomness import apply_dropout, fork_seeded_rng
from pipeline.errors import RunError

FRAMES = 160
BANDS = 32
CLASSES = 7

SMALL = {
    Cnn6: Cnn6Spec(frames=FRAMES, bands=BANDS, width=4),
    ConvNext: ConvNextSpec(frames=FRAMES, bands=BANDS, size="atto", drop_path=0.3),
    Passt: PasstSpec(frames=FRAMES, bands=BANDS, width=32, depth=2, heads=2, drop_rows=1, drop_cols=5),
}

EACH = pytest.mark.parametrize("model", list(SMALL))


@dataclass
class Clips:
    """Three clips of noise, the middle one of half the length."""

    mel_BTF: torch.Tensor
    n_frames_B: torch.Tensor


@pytest.fixture(scope="module")
def clips() -> Clips:
    mel_BTF = torch.randn(3, FRAMES, BANDS, generator=torch.Generator().manual_seed(0))
    mel_BTF[1, FRAMES // 2 :] = 0
    return Clips(mel_BTF, torch.tensor([FRAMES, FRAMES // 2, FRAMES]))


def build(model, seed: int = 0):
    return model(SMALL[model], CLASSES, seed)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def size(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_a_cnn6_has_the_weights_of_the_papers():
    """PANNs print 4.8 M. By layer, with what norms learn: bands 128; blocks 1,728, 205,056, 819,712, 3,277,824;
    head 262,656 and 270,351."""
    model = Cnn6(Cnn6Spec(), 527, 0)
    assert [sum(w.numel() for w in layer) for layer in model.weights_by_depth()] == [
        2 * 64,
        *(25 * a * b + 2 * b for a, b in ((1, 64), (64, 128), (128, 256), (256, 512))),
        512 * 512 + 512 + 512 * 527 + 527,
    ]
    assert size(model) == 4_837_455


@pytest.mark.parametrize(
    ("model_size", "weights"),
    [
        ("tiny", 28_222_767),
        ("nano", 15_288_255),
        ("pico", 8_801_423),
        ("femto", 5_034_591),
        ("atto", 3_542_855),
    ],
)
def test_a_convnext_has_the_weights_of_the_published_model(model_size, weights):
    """ConvNeXt-Tiny-AT's model card says 28,222,767 parameters; the others are timm's, and 448 for 224 bands."""
    assert size(ConvNext(ConvNextSpec(size=model_size), 527, 0)) == weights


def test_the_stem_of_a_convnext_has_the_columns_of_the_published_model():
    """1,000 frames x 224 bands leave its stem as 252 x 56."""
    model = ConvNext(ConvNextSpec(frames=1000, size="atto"), 2, 0)
    shapes = []
    model.network.stem.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape[2:]))
    )
    model.eval()(torch.zeros(1, 1000, 224), torch.tensor([1000]))
    assert shapes == [(252, 56)]


def test_a_passt_has_the_weights_of_the_published_model():
    """The published PaSST-S has 86,153,758 parameters, 405,263 of them in a head that it never uses."""
    unused = 768 * 527 + 527
    assert size(Passt(PasstSpec(), 527, 0)) == 86_153_758 - unused == 85_748_495


@pytest.mark.parametrize("frames", [998, 1000])
def test_a_passt_cuts_ten_seconds_as_the_published_model_does(frames):
    """12 rows and 99 columns of patches: 1,188 tokens, of which structured patchout leaves 8 x 59."""
    spec = PasstSpec(frames=frames)
    assert (spec.rows, spec.cols) == (12, 99)
    assert (spec.rows - spec.drop_rows, spec.cols - spec.drop_cols) == (8, 59)


@EACH
def test_weights_are_a_function_of_the_seed_alone(model):
    """Torch's global generator has no influence, and is left as it was."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(model).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = build(model).state_dict()
    other = build(model, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@EACH
def test_a_forward_pass_is_a_function_of_the_generator_handed_in(model, clips):
    """Otherwise a resumed run could not draw the numbers of the undisturbed one."""
    classifier = build(model).train()
    before = torch.get_rng_state()
    first, again, other = (classifier(clips.mel_BTF, clips.n_frames_B, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="give `rng`"):
        classifier(clips.mel_BTF, clips.n_frames_B)


@EACH
def test_evaluation_draws_nothing(model, clips):
    """The same clip has the same logits, with any generator or none."""
    classifier = build(model).eval()
    generator = rng()
    with torch.inference_mode():
        without = classifier(clips.mel_BTF, clips.n_frames_B)
        assert torch.equal(without, classifier(clips.mel_BTF, clips.n_frames_B, generator))
    assert generator.random() == rng().random()


@EACH
def test_every_weight_lies_in_one_layer_and_is_trained(model, clips):
    """Rates that fall with depth must reach every weight once; a weight without a gradient is dead."""
    classifier = build(model).train()
    listed = [weight for layer in classifier.weights_by_depth() for weight in layer]
    assert len(listed) == len({id(weight) for weight in listed})
    assert {id(weight) for weight in listed} == {id(weight) for weight in classifier.parameters()}
    classifier(clips.mel_BTF, clips.n_frames_B, rng()).square().sum().backward()
    without_gradient = {
        name
        for name, weight in classifier.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    }
    # Drop path may skip a block of a ConvNeXt for all three clips.
    if model is ConvNext:
        without_gradient = {name for name in without_gradient if not name.startswith("network.stages")}
    assert not without_gradient


@EACH
@pytest.mark.parametrize("n_frames", [2, 64, 96])
def test_a_padded_clip_has_the_logits_of_the_clip_alone(model, n_frames):
    """Padding is no sound: otherwise short clips would be recognised by their length."""
    shown = max(n_frames, 64)
    sound_BTF = torch.randn(2, shown, BANDS, generator=torch.Generator().manual_seed(1))
    sound_BTF[:, n_frames:] = 0
    padded_BTF = torch.nn.functional.pad(sound_BTF, (0, 0, 0, FRAMES - shown))
    longer = build(model).eval()
    spec = replace(SMALL[model], frames=shown, **({"drop_cols": 0} if model is Passt else {}))
    shorter = model(spec, CLASSES, 0).eval()
    weights = longer.state_dict()
    if model is Passt:
        weights["col_positions_ND"] = weights["col_positions_ND"][: spec.cols]
    shorter.load_state_dict(weights)
    n_frames_B = torch.tensor([n_frames, n_frames])
    with torch.inference_mode():
        alone, padded = shorter(sound_BTF, n_frames_B), longer(padded_BTF, n_frames_B)
        whole = longer(padded_BTF, torch.tensor([FRAMES, FRAMES]))
    assert torch.allclose(alone, padded, atol=1e-5)
    assert (whole - alone).abs().max() > 1e-3


@EACH
def test_clips_of_another_size_are_refused(model):
    """A batch that does not fit the spec is a bug of the caller, to be named."""
    with pytest.raises(ValueError, match=f"expected {FRAMES} frames x {BANDS} bands, got {FRAMES} x 16"):
        build(model)(torch.zeros(1, FRAMES, 16), torch.tensor([FRAMES]), rng())


@EACH
def test_a_model_learns_its_training_clips(model):
    """Two kinds of clip, loud below or loud above: after some steps it tells them apart, in evaluation too."""
    generator = torch.Generator().manual_seed(0)
    mel_BTF = torch.randn(16, FRAMES, BANDS, generator=generator)
    label_B = torch.arange(16) % 2
    mel_BTF[label_B == 0, :, : BANDS // 2] += 1
    mel_BTF[label_B == 1, :, BANDS // 2 :] += 1
    classifier = build(model).train()
    n_frames_B = torch.full((16,), FRAMES)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    for step in range(10):
        loss = torch.nn.functional.cross_entropy(classifier(mel_BTF, n_frames_B, rng(step)), label_B)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.inference_mode():
        assert (classifier.eval()(mel_BTF, n_frames_B).argmax(1) == label_B).all()


def test_a_short_clip_keeps_a_column_with_sound_through_patchout(clips):
    """However many columns are left out: otherwise the model would get nothing but zeros."""
    spec = replace(SMALL[Passt], drop_cols=14)
    model, n_frames_B = Passt(spec, CLASSES, 0).train(), torch.tensor([3, 16, 26, 160])
    assert spec.cols - spec.drop_cols == 1
    for seed in range(20):
        cols_BT, rows_BF = model._draw_patchout(n_frames_B, spec.cols, rng(seed))
        assert (cols_BT[:, 0] <= torch.tensor([0, 0, 1, 14])).all()
        assert rows_BF.shape == (4, 1)
        assert (rows_BF < 2).all()


def test_patchout_leaves_out_every_column_equally_often():
    """The column that is kept for its sound takes no place from the others."""
    model, n_frames_B = build(Passt).train(), torch.full((4000,), FRAMES)
    cols_BT, _ = model._draw_patchout(n_frames_B, 15, rng())
    assert cols_BT.shape == (4000, 10)
    share = torch.bincount(cols_BT.flatten(), minlength=15) / 4000
    assert (share - 10 / 15).abs().max() < 0.03


def test_pooling_over_time_knows_no_padding():
    """Mean and maximum of the valid frames, also where all of them are negative."""
    x_BDT = torch.tensor([[[-3.0, -1.0, 9.0, 9.0]], [[1.0, 2.0, 3.0, 6.0]]])
    assert pool_mean_and_max(x_BDT, torch.tensor([2, 4])).flatten().tolist() == [-3.0, 9.0]


def test_dropout_keeps_the_mean():
    """A share becomes 0, the rest grows; without a generator nothing happens."""
    x = torch.ones(100_000)
    output = apply_dropout(x, 0.2, torch.Generator().manual_seed(0))
    assert set(output.unique().tolist()) == {0.0, 1.25}
    assert abs(output.mean() - 1) < 0.01
    assert apply_dropout(x, 0.2, None) is x


def test_lent_generators_are_given_back_after_an_error():
    """A seed that leaked would change every later draw."""
    before = torch.get_rng_state()
    with pytest.raises(IndexError), fork_seeded_rng(1):
        torch.rand(3)[3]
    assert torch.equal(torch.get_rng_state(), before)


def test_timm_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    """One line with the command that brings it."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RunError, match=r"pip install 'ajepa\[supervised\]'"):
        build(ConvNext)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: Cnn6Spec(frames=15), "16 frames and bands"),
        (lambda: Cnn6Spec(head_dropout=1.0), "dropout"),
        (lambda: ConvNextSpec(size="huge"), "size must be one of atto"),
        (lambda: ConvNextSpec(frames=23), "24 frames"),
        (lambda: ConvNextSpec(drop_path=1.0), "drop_path"),
        (lambda: PasstSpec(width=30, heads=4), "multiple of heads"),
        (lambda: PasstSpec(bands=15), "not one patch of 16"),
        (lambda: PasstSpec(drop_rows=12), "cannot be left out of 12 and 99"),
    ],
)
def test_a_model_that_cannot_be_is_refused(spec, message):
    """At the construction of its spec, with the value that is wrong."""
    with pytest.raises(ValueError, match=message):
        spec()
