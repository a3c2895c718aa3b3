"""Subject: the encoder of a run that is probed, pre-trained or fine-tuned, and what it is compared with."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ajepa.learnt import Learnt
from ajepa.recipes import from_json
from ajepa.run import Run
from ajepa.vit import Encoder, EncoderSpec

TRAINED, RANDOM, STATISTICS = "encoder", "random init", "log-mel statistics"
TARGET = "target"  # the EMA encoder of a pre-trained run's checkpoint


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subject:
    """An encoder at a checkpoint; `seed` is what it was drawn with before its first step."""

    spec: EncoderSpec
    weights: dict[str, Tensor]
    step: int
    part: str
    seed: int

    @classmethod
    def of(cls, run: Run, at: str | int = "last") -> Self:
        """RunError where there is no such checkpoint, or no encoder."""
        if run.finetuned:
            learnt = Learnt.of(run, at)
            spec, weights = learnt.encoder()
            return cls(
                spec=spec, weights=weights, step=learnt.step, part=learnt.part, seed=learnt.recipe.seed
            )
        recipe, loaded = from_json(run.recipe), run.load(TARGET, at=at)
        return cls(
            spec=recipe.model.encoder,
            weights=loaded.parts[TARGET],
            step=loaded.step,
            part=TARGET,
            seed=recipe.seed,
        )

    def encoders(self, device: torch.device) -> dict[str, Encoder | None]:
        """What is compared: the run's encoder, one of its shape with random weights, and none at all.

        The random one is that of a pre-trained run before its first step, and hears as the trained one does.
        """
        trained, random = (Encoder(replace(self.spec, drop_path=0.0), seed=self.seed) for _ in range(2))
        trained.load_state_dict(self.weights)
        if trained.bands_2F is not None:
            random.know_bands(*trained.bands_2F)
        return {TRAINED: trained.to(device).eval(), RANDOM: random.to(device).eval(), STATISTICS: None}
