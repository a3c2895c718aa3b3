"""Trained: an encoder as a run left it, with all that is needed to feed it; from a run, an export or the hub."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ajepa.embed.hub import fetch_from_hub, is_hub_id
from ajepa.model.vit import Encoder, EncoderSpec
from ajepa.recipes.catalogue import recipe_from_json, recipe_to_json
from ajepa.training.run import RECIPE_FILE, Json
from ajepa.training.trained_run import TrainedRun
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError

WEIGHTS_FILE = "model.safetensors"

LAST_CHECKPOINT = "last"  # of a run, where nothing is said

EXPORT_METADATA_KEY = "ajepa"  # in the header of that file: the configuration, as JSON

EXPORT_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PretrainedEncoder:
    """A frozen encoder: its shape and weights, the features that it was trained on, and where it came from.

    mel         front end of its features; `clip_seconds` is that of its store and bounds nothing
    mean, std   of log-mel, by which features are normalised
    origin      what made it: recipe, step, identity of the data, versions; plain JSON values
    licence     of the weights, as whoever exported them stated it
    """

    spec: EncoderSpec
    mel: MelSpec
    mean: float
    std: float
    weights: dict[str, Tensor]
    origin: Json
    licence: str | None = None

    @classmethod
    def of_run(cls, path: Path, at: str | int = LAST_CHECKPOINT) -> Self:
        """At a checkpoint of a run (`Run.load`): the target (EMA) encoder of a pre-trained one, or a fine-tuned one's.

        RunError where there is none, such as in a run of a convolutional network.
        """
        trained = TrainedRun.open(path, at)
        run = trained.run
        return cls(
            spec=trained.encoder_spec("that embeds; give another run"),
            mel=trained.mel,
            mean=run.identity["mean"],
            std=run.identity["std"],
            weights=trained.encoder_weights(),
            origin={
                "recipe": run.recipe,
                "step": trained.step,
                "identity": {key: value for key, value in run.identity.items() if key != "mel"},
                "versions": run.versions,
            },
        )

    @classmethod
    def from_export(cls, file: Path) -> Self:
        """What `ajepa-train export` wrote; RunError where it is something else, or not what was written."""
        try:
            with safe_open(file, framework="pt") as opened:
                told = (opened.metadata() or {}).get(EXPORT_METADATA_KEY)
            weights = load_file(file)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{file}: cannot be read as safetensors ({error}); fetch it again") from None
        if told is None:
            raise RunError(f"{file}: no encoder of ajepa's; give what `ajepa-train export` wrote")
        config = json.loads(told)
        if config["format"] != EXPORT_FORMAT:
            raise RunError(
                f"{file}: export format {config['format']}, this version reads {EXPORT_FORMAT}; update ajepa"
            )
        loaded = cls(
            spec=recipe_from_json(config["encoder"]),
            mel=MelSpec.from_json(config["mel"]),
            mean=config["mean"],
            std=config["std"],
            weights=weights,
            origin=config["origin"],
            licence=config["licence"],
        )
        if loaded.model_id != config["model_id"]:
            raise RunError(f"{file}: damaged (its digest is not {config['model_id']}); fetch it again")
        return loaded

    @property
    def model_id(self) -> str:
        """16 hex digits: equal for what gives equal embeddings, wherever it lies."""
        shown = [recipe_to_json(self.spec), self.mel.spec_id, self.mean, self.std]
        digest = hashlib.sha256(json.dumps(shown, sort_keys=True).encode())
        for name, weight in sorted(self.weights.items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def recipe_name(self) -> str:
        """Of the recipe that made it, for messages."""
        return str(self.origin.get("recipe", {}).get("name", "unnamed"))

    def to_json(self) -> Json:
        """All but the weights."""
        return {
            "format": EXPORT_FORMAT,
            "model_id": self.model_id,
            "encoder": recipe_to_json(self.spec),
            "mel": self.mel.to_json(),
            "mean": self.mean,
            "std": self.std,
            "origin": self.origin,
            "licence": self.licence,
        }

    def build_encoder(self, device: torch.device) -> Encoder:
        """The network in eval mode, without gradients; RunError where the weights are of another shape."""
        encoder = Encoder(self.spec)
        try:
            encoder.load_state_dict(self.weights)
        except RuntimeError as error:
            told = " ".join(str(error).split())[:200]
            raise RunError(f"the weights are not those of {self.spec}: {told}; export them again") from None
        return encoder.requires_grad_(False).eval().to(device)


def load_pretrained(location: Path | str, at: str | int = LAST_CHECKPOINT) -> PretrainedEncoder:
    """From a run folder, an exported folder or file, or ORG/NAME[@REVISION] on the Hugging Face hub.

    `at` is a run's checkpoint: last, best or a step; of anything else there is one (RunError). What lies on this
    machine comes first. Weights are safetensors: no pickle, and no code but this package's.
    """
    path = Path(location)
    if (path / RECIPE_FILE).is_file():
        return PretrainedEncoder.of_run(path, at)
    if at != LAST_CHECKPOINT:
        raise RunError(
            f"{location}: is no run, and holds one checkpoint alone; leave out {at!r}, or give the run"
        )
    if (path / WEIGHTS_FILE).is_file():
        return PretrainedEncoder.from_export(path / WEIGHTS_FILE)
    if path.is_file():
        return PretrainedEncoder.from_export(path)
    if not path.exists() and is_hub_id(str(location)):
        return PretrainedEncoder.from_export(fetch_from_hub(str(location)) / WEIGHTS_FILE)
    told = f"holds neither {RECIPE_FILE} nor {WEIGHTS_FILE}" if path.exists() else "no such run or file"
    raise RunError(
        f"{location}: {told}; expected a run, what `ajepa-train export` wrote, or ORG/NAME on the hub"
    )
