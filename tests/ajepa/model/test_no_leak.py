"""Hidden patches stay hidden: not one bit of them reaches the context encoder's output, whatever options are on.

In published code masks were lost under activation checkpointing, and the loss improved because of it.
"""

import itertools
import shutil
from typing import get_args

import numpy as np
import pytest
import torch

from ajepa.model.masking import MaskMaker, RandomBlocks, RandomPatches, TimeFrequencyAware, TimeSpans
from ajepa.model.patches import PatchGrid
from ajepa.model.transformer import PositionName, compile_blocks
from ajepa.model.vit import Encoder, EncoderSpec

GRID = PatchGrid(rows=4, cols=8, patch_frames=4, patch_bands=4)

MAKERS = [RandomPatches(), RandomBlocks(), TimeFrequencyAware(), TimeSpans()]

CLIPS, SETS = 3, 2

each_maker = pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: type(maker).__name__)

each_position = pytest.mark.parametrize("positions", get_args(PositionName))

each_precision = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])

each_way = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


def needs_compiler(test):
    """Skip a test without a compiler for torch.compile, which itself reads `.grad` of a non-leaf, with a warning."""
    test = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")(test)
    return pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")(test)


def encoder_of(positions: PositionName, *, recompute: bool = False) -> Encoder:
    """Weights large enough that every token matters to every other."""
    spec = EncoderSpec(
        grid=GRID, width=32, depth=2, heads=4, positions=positions, layer_scale=0.7, drop_path=0.2
    )
    encoder = Encoder(spec)
    for index, parameter in enumerate(encoder.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    encoder.recompute = recompute
    return encoder


def random_mel(seed: int) -> torch.Tensor:
    return torch.randn(CLIPS, GRID.frames, GRID.bands, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(
    encoder: Encoder, mel_BTF: torch.Tensor, context_NK: torch.Tensor, *, bf16: bool
) -> list[torch.Tensor]:
    """The gradient of the spectrogram, the context's output vectors, and the gradients of the weights."""
    mel_BTF = mel_BTF.clone().requires_grad_()
    keep_L2N = encoder.transformer_spec.draw_drop_path(np.random.default_rng(0), len(context_NK))
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        context_NKD = encoder(mel_BTF, context_NK, keep_L2N=keep_L2N)
    context_NKD.float().square().sum().backward()
    return [mel_BTF.grad, context_NKD, *(weight.grad.clone() for weight in encoder.parameters())]


def context_and_hidden(maker: MaskMaker) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible tokens of two mask sets per clip, `NK`, and the values hidden in both sets, bool `BTF`."""
    masks = maker.sample(np.random.default_rng(0), GRID, batch=CLIPS * SETS)
    context_NK = torch.from_numpy(masks.context_BK)
    visible_BP = torch.zeros(CLIPS, GRID.tokens, dtype=torch.bool)
    visible_BP.scatter_(1, context_NK.view(CLIPS, -1), True)
    hidden_BTF = ~visible_BP.view(CLIPS, GRID.cols, GRID.rows).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert hidden_BTF.any()
    return context_NK, hidden_BTF


def clean_and_changed(hidden_BTF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, and the same batch with noise in the hidden places, a hundred times as loud."""
    return random_mel(0), torch.where(hidden_BTF, 100 * random_mel(1), random_mel(0))


def assert_no_leak(encoder: Encoder, maker: MaskMaker, *, bf16: bool) -> None:
    context_NK, hidden_BTF = context_and_hidden(maker)
    clean, changed = (
        outputs_and_gradients(encoder, mel_BTF, context_NK, bf16=bf16)
        for mel_BTF in clean_and_changed(hidden_BTF)
    )
    assert clean[0][hidden_BTF].eq(0).all()
    assert clean[0][~hidden_BTF].ne(0).any()
    assert all(torch.equal(before, after) for before, after in zip(clean, changed, strict=True))


@each_maker
@each_position
@each_way
@each_precision
def test_nothing_hidden_reaches_the_context_or_a_gradient(maker, positions, recompute, bf16):
    """Hidden patches are replaced by loud noise: outputs and gradients keep every bit."""
    assert_no_leak(encoder_of(positions, recompute=recompute), maker, bf16=bf16)


@needs_compiler
@pytest.mark.parametrize(("positions", "bf16"), [("sincos", False), ("rope", True)])
def test_nothing_hidden_reaches_the_context_once_compiled(positions, bf16):
    """The compiler traces the graph that runs, with gradients; for every mask maker, with and without recomputation."""
    torch._dynamo.reset()
    for recompute, maker in itertools.product((False, True), MAKERS):
        encoder = encoder_of(positions, recompute=recompute)
        for block in encoder.blocks:
            block.compile(dynamic=True, backend="aot_eager")
        assert_no_leak(encoder, maker, bf16=bf16)


@needs_compiler
def test_nothing_hidden_reaches_the_context_through_generated_code():
    """The same in the forward pass with the compiler's own kernels, whose generation takes half a minute."""
    torch._dynamo.reset()
    encoder = encoder_of("rope")
    compile_blocks(encoder.blocks, dynamic=True)
    for maker in MAKERS:
        context_NK, hidden_BTF = context_and_hidden(maker)
        with torch.no_grad():
            clean, changed = (encoder(mel_BTF, context_NK) for mel_BTF in clean_and_changed(hidden_BTF))
            torch.testing.assert_close(
                clean, encoder_of("rope")(random_mel(0), context_NK), atol=1e-4, rtol=1e-4
            )
        assert torch.equal(clean, changed)


@needs_compiler
def test_one_compilation_serves_every_block_and_every_number_of_tokens():
    """Counts change from step to step: a run that compiled for each count would spend its time on compilation."""
    torch._dynamo.reset()
    compilations, encoder = [], encoder_of("sincos")

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    for block in encoder.blocks:
        block.compile(dynamic=True, backend=backend)
    for count in range(CLIPS + 1, GRID.tokens):  # as many tokens as clips would give a separate graph
        encoder(random_mel(0), torch.arange(count).expand(CLIPS, -1))
    assert len(compilations) == 1


@each_maker
@each_position
def test_two_mask_sets_of_a_clip_do_not_see_each_other(maker, positions):
    """One set may show patches that the other hides: a set alone gives the same output as both sets together."""
    masks = maker.sample(np.random.default_rng(0), GRID, batch=CLIPS * SETS)
    context_NK, encoder = torch.from_numpy(masks.context_BK), encoder_of(positions)
    together_NKD = encoder(random_mel(0), context_NK)
    for place in range(SETS):
        alone_NKD = encoder(random_mel(0), context_NK[place::SETS])
        torch.testing.assert_close(alone_NKD, together_NKD[place::SETS])
