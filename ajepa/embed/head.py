"""ClassifierHead: the linear head of a fine-tuned encoder with its class names, as a run and an export keep it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, get_args

import torch
from torch import Tensor

from ajepa.model.classifier import Classifier, VitClassifier, VitSpec
from ajepa.model.pooling import PoolingName
from ajepa.model.vit import EncoderSpec
from ajepa.training.run import Json
from ajepa.training.trained_run import TrainedRun
from pipeline.errors import RunError
from pipeline.labels.ontology import known_class_names

HEAD_WEIGHT = "head.weight"
HEAD_BIAS = "head.bias"

# Scores of single labels sum to 1; those of several labels are independent.
SOFTMAX = "softmax"
SIGMOID = "sigmoid"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassifierHead:
    """A linear layer from the pooled tokens of a clip to one logit per class.

    pooling     how tokens become the vector that the layer reads (`pooling.pool_tokens`)
    class_ids   the task's classes, in the order of the logits: AudioSet's ids, or a user's own labels
    activation  from logits to scores: softmax if every clip has one class, else sigmoid
    """

    weight_CD: Tensor
    bias_C: Tensor
    pooling: PoolingName
    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    activation: str

    def __post_init__(self) -> None:
        classes = len(self.class_ids)
        shapes = (tuple(self.weight_CD.shape[:1]), tuple(self.bias_C.shape), len(self.class_names))
        if shapes != ((classes,), (classes,), classes):
            raise RunError(f"a head of {classes} classes has weights of other shapes: {shapes}")
        if self.activation not in (SOFTMAX, SIGMOID) or self.pooling not in get_args(PoolingName):
            raise RunError(
                f"a head with {self.activation!r} and pooling {self.pooling!r}: update ajepa to read it"
            )

    @classmethod
    def from_run(cls, trained: TrainedRun) -> Self | None:
        """The head of a fine-tuned run; None if the run has none, or another kind of network."""
        task_identity = trained.run.identity.task_identity
        if task_identity is None or not isinstance(trained.recipe.model, VitSpec):
            return None
        class_ids = task_identity.classes
        return cls(
            weight_CD=trained.weights[HEAD_WEIGHT],
            bias_C=trained.weights[HEAD_BIAS],
            pooling=trained.recipe.model.pooling,
            class_ids=class_ids,
            class_names=names_of_classes(class_ids),
            activation=activation_of(trained),
        )

    @classmethod
    def from_export(cls, config: Json, tensors: Mapping[str, Tensor]) -> Self:
        """The head of an export: its configuration, and the tensors of the file; RunError if it was changed."""
        head = cls(
            weight_CD=tensors[HEAD_WEIGHT],
            bias_C=tensors[HEAD_BIAS],
            pooling=config["pooling"],
            class_ids=tuple(config["class_ids"]),
            class_names=tuple(config["class_names"]),
            activation=config["activation"],
        )
        if head.head_id != config["head_id"]:
            raise RunError(f"the head is damaged (its digest is not {config['head_id']}); fetch it again")
        return head

    @property
    def head_id(self) -> str:
        """16 hex digits; equal for heads that give equal scores from equal tokens."""
        settings = [self.pooling, list(self.class_ids), self.activation]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for weight in (self.weight_CD, self.bias_C):
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by their names in a file."""
        return {HEAD_WEIGHT: self.weight_CD, HEAD_BIAS: self.bias_C}

    def to_json(self) -> Json:
        """Everything but the weights."""
        return {
            "head_id": self.head_id,
            "activation": self.activation,
            "pooling": self.pooling,
            "class_ids": list(self.class_ids),
            "class_names": list(self.class_names),
        }

    def build_classifier(
        self, spec: EncoderSpec, encoder_weights: Mapping[str, Tensor], device: torch.device
    ) -> Classifier:
        """The network from log-mel to logits, in evaluation mode and without gradients."""
        model = VitClassifier(VitSpec(encoder=spec, pooling=self.pooling), len(self.class_ids), seed=0)
        model.encoder.load_state_dict(dict(encoder_weights))
        model.head.load_state_dict({"weight": self.weight_CD, "bias": self.bias_C})
        return model.requires_grad_(False).eval().to(device)


def is_head_weight(name: str) -> bool:
    """Whether a tensor of an export belongs to the head."""
    return name in (HEAD_WEIGHT, HEAD_BIAS)


def names_of_classes(class_ids: tuple[str, ...]) -> tuple[str, ...]:
    """The name of each class: AudioSet's for its ids, and a user's own label as it is."""
    known = known_class_names()
    return tuple(known.get(class_id, class_id) for class_id in class_ids)


def activation_of(trained: TrainedRun) -> str:
    """softmax if the run was trained with one loss over all classes, else sigmoid."""
    loss = trained.finetune_recipe.loss
    if loss == "auto":
        return SOFTMAX if trained.run.task_identity.single_label else SIGMOID
    return SOFTMAX if loss == "ce" else SIGMOID


def apply_activation(logits_NC: Tensor, activation: str) -> Tensor:
    """Scores in [0, 1] of logits; in the last axis."""
    return logits_NC.softmax(-1) if activation == SOFTMAX else logits_NC.sigmoid()
