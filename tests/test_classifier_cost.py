"""What a step of a classifier takes: operations as torch counts them, memory as a process really took it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_finetune
from torch.utils.flop_counter import FlopCounterMode

from ajepa.attention import written_out_attention
from ajepa.classifier_cost import estimate, refuse_too_large, seen_of, step_cost, weights_of
from ajepa.cnn6 import Cnn6Spec
from ajepa.convnext import ConvNextSpec
from ajepa.distributed import ALONE, World
from ajepa.finetune_recipes import FINETUNE_PIECES, finetune_recipe
from ajepa.finetuning import Finetune
from ajepa.memory import GB
from ajepa.models import built
from ajepa.overrides import overridden
from ajepa.passt import PasstSpec
from ajepa.regularised import RegularisedMasking
from pipeline.errors import RunError

LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")
CPU = torch.device("cpu")
CLASSES = 7
PASST = PasstSpec(frames=64, bands=64, width=32, depth=2, heads=2, drop_rows=1, drop_cols=1)
CNN6 = Cnn6Spec(frames=64, bands=32, width=4)

MEASURED = """
import resource, sys
import numpy as np, torch
from ajepa.devices import pick_precision
from ajepa.finetuner import Finetuner
from pipeline.loader import Batch
from test_classifier_cost import larger

def steps(recipe, micro_clips):
    cpu = torch.device("cpu")
    numbers = pick_precision("bf16" if "bf16" in sys.argv else "fp32", cpu)
    trainer = Finetuner(recipe, torch.eye(50), cpu, single=False, recompute="recompute" in sys.argv,
                        precision=numbers, micro_clips=micro_clips)
    for step in range(2):
        clips, spec = recipe.clips_per_step, recipe.model
        trainer.step(step, Batch(mel_BTF=torch.randn(clips, spec.frames, spec.bands), rows_B=np.arange(clips),
                                 n_frames_B=torch.full((clips,), spec.frames), labels_BC=torch.zeros(clips, 50),
                                 weights_B=torch.ones(clips)))

recipe, micro_clips = larger(sys.argv[1]), 4 if "micro" in sys.argv else None
steps(larger(sys.argv[1], clips_per_step=1), micro_clips)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
steps(recipe, micro_clips)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak) * 1024 - before)  # not ru_maxrss: a child's begins with the size of who forked it
"""


def larger(model: str, **changes) -> Finetune:
    """A recipe whose step takes some hundred MB, far more than what libraries hold."""
    if model == "vit":
        made = overridden(finetune_recipe("own-small"), ["model.encoder.grid.cols=32"], FINETUNE_PIECES)
        made = replace(made, clips_per_step=32)
    elif model == "passt":
        spec = replace(finetune_recipe("passt-small").model, frames=400, drop_cols=9)
        made = replace(finetune_recipe("passt-small"), model=spec, clips_per_step=32)
    elif model == "cnn6":
        made = replace(finetune_recipe("cnn6-small"), model=Cnn6Spec(frames=128, bands=128, width=16))
    else:
        spec = ConvNextSpec(frames=256, bands=64, size="atto", drop_path=0.1)
        made = replace(finetune_recipe("cnn6-small"), model=spec, clips_per_step=24)
    return replace(made, ema=0.9, steps=10, **changes)


@LINUX
@pytest.mark.parametrize(
    "how",
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
def test_the_estimate_is_near_what_a_process_takes(how):
    """In a process of its own: the resident peak of two steps, within a factor of 1.5.

    Recomputed blocks and filters come and go in pieces of some MB, which glibc keeps for the process: up to twice of
    what is in use. There it is told to give them back, as it does larger ones, such as those of larger models.
    """
    program = [sys.executable, "-c", MEASURED, *how]
    path = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    if {"recompute", "cnn6"} & set(how):
        path["MALLOC_MMAP_THRESHOLD_"] = "65536"
    measured = int(subprocess.run(program, capture_output=True, check=True, env=path).stdout)
    needed = estimate(
        larger(how[0]),
        50,
        bf16="bf16" in how,
        written_out="bf16" in how,
        recompute="recompute" in how,
        micro_clips=4 if "micro" in how else None,
    )
    assert 1 / 1.5 < needed.total / measured < 1.5, (str(needed), measured / GB)


def test_weights_are_counted_by_arithmetic():
    """All but some single vectors of a PaSST, its positions."""
    for recipe in (tiny_finetune(), replace(tiny_finetune(), model=PASST)):
        counted = sum(weight.numel() for weight in built(recipe.model, CLASSES, 0).parameters())
        seen = seen_of(recipe)
        assert seen is not None
        assert weights_of(seen, CLASSES) == pytest.approx(counted, rel=0.02)


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
def test_the_formula_counts_what_torch_counts(kind, monkeypatch):
    """To the last operation. Attention is written out, for torch counts nothing in its fused kernel on CPUs."""
    monkeypatch.setattr("ajepa.attention.attention_for", lambda device, dtype: written_out_attention)
    model, recompute = COUNTED[kind]
    recipe = replace(tiny_finetune(), model=model, clips_per_step=5)
    made = built(model, CLASSES, 0)
    if recompute:
        made.encoder.recompute = True
    mel_BTF, n_frames_B = torch.randn(5, model.frames, model.bands), torch.full((5,), model.frames)
    with FlopCounterMode(display=False) as counter:
        made(mel_BTF, n_frames_B, np.random.default_rng(0)).sum().backward()
    cost = step_cost(recipe, CLASSES, recompute=recompute)
    assert cost.flop == counter.get_total_flops()
    assert (cost.step, cost.clips, cost.predicted_tokens) == (1, 5, 0)
    tokens = {"passt": 4 * 4 + 2, "cnn6": 0}.get(kind, 4 * 8)
    assert cost.context_tokens == 5 * tokens


@pytest.mark.parametrize(
    ("model", "gb", "told"),
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
def test_a_recipe_larger_than_memory_is_refused_with_what_to_lower(monkeypatch, model, gb, told):
    """What is offered fits; batch norms cannot do with fewer clips at once, but with fewer a step."""
    monkeypatch.setattr("ajepa.memory.free_bytes", lambda device: int(gb * GB))
    recipe = finetune_recipe(model)
    how = {"half": False, "recompute": False, "world": ALONE}
    with pytest.raises(RunError) as refused:
        refuse_too_large(recipe, 527, CPU, micro_clips=None, **how)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"recipe {model} needs about ")
    assert told in message
    assert f"for {recipe.clips_per_step} clips at once, cpu has {gb:.2f} GB free; " in message
    if told.endswith("batch "):
        fewer = int(message.split(told)[1].split(",")[0])
        changed = replace(recipe, clips_per_step=fewer) if "--batch" in told else recipe
        refuse_too_large(changed, 527, CPU, micro_clips=fewer, **how)


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    """As in pre-training: each has its own copy of everything but the clips."""
    monkeypatch.setattr("ajepa.memory.free_bytes", lambda device: int(12 * GB))
    monkeypatch.setattr(World, "wait", lambda world: None)
    how = {"half": False, "recompute": False, "micro_clips": 1}
    refuse_too_large(finetune_recipe("audioset-20k"), 527, CPU, world=World(size=4, local_size=1), **how)
    with pytest.raises(RunError, match=r"free for each of 8 ranks; not one clip"):
        refuse_too_large(finetune_recipe("audioset-20k"), 527, CPU, world=World(size=8, local_size=8), **how)
