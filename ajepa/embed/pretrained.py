"""A pretrained encoder with the front end and normalisation of its input, loaded from a run, an export or the hub."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ajepa.embed.head import ClassifierHead, is_head_weight
from ajepa.embed.hub import fetch_from_hub, is_hub_id
from ajepa.model.vit import Encoder, EncoderSpec
from ajepa.recipes.catalogue import recipe_from_json, recipe_to_json
from ajepa.training.feature_choice import FeatureChoice, read_feature_choice
from ajepa.training.run import RECIPE_FILE, Json
from ajepa.training.trained_run import (
    BAND_STATISTICS,
    INITIAL_CHECKPOINT,
    TrainedRun,
    build_initial_encoder,
)
from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError

WEIGHTS_FILE = "model.safetensors"

# The header of this file contains the configuration as JSON, under this key.
EXPORT_METADATA_KEY = "ajepa"

# Format 2 also has `head`, the classes of a fine-tuned run, and `features`, the pooling and layer that probes found
# best; a file of format 1 has neither.
EXPORT_FORMAT = 2
READ_EXPORT_FORMATS = (1, 2)

# The default checkpoint of a run.
LAST_CHECKPOINT = "last"

# Messages quote at most this many characters of torch's error about weights, which lists every tensor.
MAX_ERROR_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PretrainedEncoder:
    """A frozen encoder: its shape and weights, its input features, and its origin.

    mel        front end of the input features; its `clip_seconds` is that of the training store and is not a limit here
    mean, std  mean and deviation of log-mel that normalise the features
    origin     how the encoder was made: recipe, step, identity of the data, versions; plain JSON values
    licence    licence of the weights, as stated at the export
    head       the classifier of a fine-tuned run; None: the run was pre-trained
    features   the pooling and layer that probes found best; None: no probe has chosen
    """

    spec: EncoderSpec
    mel: MelSpec
    mean: float
    std: float
    weights: dict[str, Tensor]
    origin: Json
    licence: str | None = None
    head: ClassifierHead | None = None
    features: FeatureChoice | None = None

    @classmethod
    def from_run(cls, path: Path, at: str | int = LAST_CHECKPOINT) -> Self:
        """Return the encoder of a run at a checkpoint (`TrainedRun.open`).

        A pre-training run gives the target (EMA) encoder, a fine-tuning run the encoder of its classifier. RunError if
        the run has no encoder, for example if its model is a convolutional network.
        """
        trained = TrainedRun.open(path, at)
        run = trained.run
        return cls(
            spec=trained.encoder_spec("that embeds; give another run"),
            mel=trained.mel,
            mean=run.identity.mean,
            std=run.identity.std,
            weights=trained.encoder_weights(),
            origin={
                "recipe": run.recipe,
                "step": trained.step,
                "identity": {key: value for key, value in run.identity.to_json().items() if key != "mel"},
                "versions": run.versions,
                **({"warm_start": run.warm_start} if run.warm_start is not None else {}),
            },
            head=ClassifierHead.from_run(trained),
            features=read_feature_choice(run.path),
        )

    @classmethod
    def from_export(cls, file: Path) -> Self:
        """Return the encoder in a file of `ajepa-train export`; RunError if it is another file or was changed."""
        # Read the weights, and the configuration in the header.
        try:
            with safe_open(file, framework="pt") as opened:
                text = (opened.metadata() or {}).get(EXPORT_METADATA_KEY)
            weights = load_file(file)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{file}: cannot be read as safetensors ({error}); fetch it again") from None
        if text is None:
            raise RunError(f"{file}: holds no encoder of ajepa; give a file that `ajepa-train export` wrote")
        config = json.loads(text)
        if config["format"] not in READ_EXPORT_FORMATS:
            raise RunError(
                f"{file}: export format {config['format']}, this version reads up to {EXPORT_FORMAT}; update ajepa"
            )
        head = read_head(file, config.get("head"), weights)
        encoder_weights = {name: weight for name, weight in weights.items() if not is_head_weight(name)}
        features = config.get("features")

        # Compare the digest, which covers the weights and every setting that affects the embeddings.
        loaded = cls(
            spec=recipe_from_json(config["encoder"]),
            mel=MelSpec.from_json(config["mel"]),
            mean=config["mean"],
            std=config["std"],
            weights=encoder_weights,
            origin=config["origin"],
            licence=config["licence"],
            head=head,
            features=None if features is None else FeatureChoice.from_json(features, str(file)),
        )
        if loaded.model_id != config["model_id"]:
            raise RunError(f"{file}: damaged (its digest is not {config['model_id']}); fetch it again")
        return loaded

    @property
    def model_id(self) -> str:
        """16 hex digits; equal for encoders that give equal embeddings, whether from a run, an export or the hub."""
        settings = [recipe_to_json(self.spec), self.mel.spec_id, self.mean, self.std]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, weight in sorted(self.weights.items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def recipe_name(self) -> str:
        """The name of the recipe that trained the encoder, for messages."""
        return str(self.origin.get("recipe", {}).get("name", "unnamed"))

    def before_training(self) -> Self:
        """Return the encoder before its first step, drawn by the seed of its recipe; RunError if that is unknown."""
        # The encoder of a run that started from another one was not drawn by its own seed.
        seed = self.origin.get("recipe", {}).get("seed")
        identity = self.origin.get("identity", {})
        if seed is None or identity.get("from") is not None or identity.get("warm_start") is not None:
            raise RunError(
                f"model {self.model_id}: holds no recipe whose seed drew its first weights; "
                f"leave out {INITIAL_CHECKPOINT!r}, or give the pre-trained run"
            )
        encoder = build_initial_encoder(self.spec, seed, self.weights.get(BAND_STATISTICS))
        return replace(self, weights=encoder.state_dict(), origin=self.origin | {"step": 0}, head=None)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights of encoder and head, by their names in an export."""
        return self.weights if self.head is None else self.weights | self.head.tensors

    def to_json(self) -> Json:
        """Return the configuration of an export: everything except the weights."""
        return {
            "format": EXPORT_FORMAT,
            "model_id": self.model_id,
            "encoder": recipe_to_json(self.spec),
            "mel": self.mel.to_json(),
            "mean": self.mean,
            "std": self.std,
            "origin": self.origin,
            "licence": self.licence,
            "head": None if self.head is None else self.head.to_json(),
            "features": None if self.features is None else self.features.to_json(),
        }

    def build_encoder(self, device: torch.device) -> Encoder:
        """Return the network in eval mode, without gradients; RunError if the weights do not fit the shape."""
        encoder = Encoder(self.spec)
        try:
            encoder.load_state_dict(self.weights)
        except RuntimeError as error:
            mismatch = " ".join(str(error).split())[:MAX_ERROR_CHARACTERS]
            raise RunError(f"the weights do not fit {self.spec}: {mismatch}; export them again") from None
        return encoder.requires_grad_(False).eval().to(device)


def read_head(file: Path, config: Json | None, tensors: dict[str, Tensor]) -> ClassifierHead | None:
    """Return the head of an export; None if its configuration has none. RunError, naming the file, if it is damaged."""
    if config is None:
        return None
    try:
        return ClassifierHead.from_export(config, tensors)
    except (RunError, KeyError) as error:
        raise RunError(f"{file}: {error}") from None


def load_pretrained(location: Path | str, at: str | int = LAST_CHECKPOINT) -> PretrainedEncoder:
    """Load an encoder from a run folder, an exported folder or file, or ORG/NAME[@REVISION] on the Hugging Face hub.

    `at` is the checkpoint of a run: last, best, init (before the first step) or a step. An export has a single
    checkpoint, and init if it states the seed of its recipe: RunError if `at` names another. A local path takes
    precedence over a name on the hub. Weights are safetensors: loading needs no pickle and runs no code of the export.
    """
    path = Path(location)
    if (path / RECIPE_FILE).is_file():
        return PretrainedEncoder.from_run(path, at)
    if at not in (LAST_CHECKPOINT, INITIAL_CHECKPOINT):
        raise RunError(
            f"{location}: is no run, and only a run has several checkpoints; leave out {at!r}, or give the run"
        )
    exported = load_export(location)
    return exported.before_training() if at == INITIAL_CHECKPOINT else exported


def load_export(location: Path | str) -> PretrainedEncoder:
    """Load an encoder from an exported folder or file, or from the hub; RunError if there is none."""
    path = Path(location)
    if (path / WEIGHTS_FILE).is_file():
        return PretrainedEncoder.from_export(path / WEIGHTS_FILE)
    if path.is_file():
        return PretrainedEncoder.from_export(path)
    if not path.exists() and is_hub_id(str(location)):
        return PretrainedEncoder.from_export(fetch_from_hub(str(location)) / WEIGHTS_FILE)

    fault = f"holds neither {RECIPE_FILE} nor {WEIGHTS_FILE}" if path.exists() else "no such run or file"
    raise RunError(
        f"{location}: {fault}; expected a run, an export of `ajepa-train export`, or ORG/NAME on the hub"
    )
