"""RunIdentity: the data that a run is trained on and, where it is fine-tuned, its task; `identity` in recipe.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import RunError

LabelKind = Literal["single", "multi"]

# Keys of every identity, keys that are written only where they apply, and keys of a fine-tuned run.
DATA_KEYS = ("store_id", "spec_id", "mel", "mean", "std")
OPTIONAL_DATA_KEYS = ("stores", "excluded", "store_weights", "block_shuffle", "warm_start")
TASK_KEYS = ("task", "kind", "label_set", "train_splits", "eval_splits", "classes", "from")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShuffleIdentity:
    """A shuffle of a few blocks at a time: which part of a store a block is, and how many blocks are mixed."""

    blocks: str = "shards"
    window_blocks: int

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The block shuffle with these fields; RunError for a missing or unknown key."""
        refuse_other_keys(record, "identity.block_shuffle", required=("blocks", "window_blocks"))
        return cls(**record)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartCheckpoint:
    """The checkpoint whose encoder a fine-tuned run started from: its step and the digest of its weights."""

    step: int
    sha256: str

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The checkpoint with these fields; RunError for a missing or unknown key."""
        refuse_other_keys(record, "identity.from", required=("step", "sha256"))
        return cls(**record)

    def to_json(self) -> dict[str, Any]:
        """Step and digest as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartIdentity:
    """The weights that a pre-trained run began with instead of random ones.

    parts   parts of a checkpoint that were taken; the others were drawn by the seed of the recipe
    step    after which they were taken; None: not known
    sha256  digest of all of them
    """

    parts: tuple[str, ...]
    step: int | None
    sha256: str

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The warm start with these fields; RunError for a missing or unknown key."""
        refuse_other_keys(record, "identity.warm_start", required=("parts", "step", "sha256"))
        return cls(parts=tuple(record["parts"]), step=record["step"], sha256=record["sha256"])

    def to_json(self) -> dict[str, Any]:
        """Parts, step and digest as plain values."""
        return {"parts": list(self.parts), "step": self.step, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskIdentity:
    """The task that a fine-tuned run learns: its name, its labels, its splits, its start.

    kind       single: each clip has exactly one class; multi: it may have several
    label_set  the labels that are trained on
    classes    mids, in the order of the classifier's outputs
    start      the checkpoint whose encoder training starts from, `from` in JSON; None: random weights
    """

    task: str
    kind: LabelKind
    label_set: str
    train_splits: tuple[str, ...]
    eval_splits: tuple[str, ...]
    classes: tuple[str, ...]
    start: StartCheckpoint | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(LabelKind):
            raise RunError(f"identity.kind must be single or multi, got {self.kind!r}")

    @property
    def single_label(self) -> bool:
        """Whether each clip has exactly one class."""
        return self.kind == "single"

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The task of an identity's JSON; RunError for a missing or unknown key."""
        refuse_other_keys(record, "identity", required=TASK_KEYS)

        # A run from random weights has null here.
        start = record["from"]
        if start is not None:
            start = StartCheckpoint.from_json(start)
        return cls(
            task=record["task"],
            kind=record["kind"],
            label_set=record["label_set"],
            train_splits=tuple(record["train_splits"]),
            eval_splits=tuple(record["eval_splits"]),
            classes=tuple(record["classes"]),
            start=start,
        )

    def to_json(self) -> dict[str, Any]:
        """The task as plain values, for `from_json`."""
        return {
            "task": self.task,
            "kind": self.kind,
            "label_set": self.label_set,
            "train_splits": list(self.train_splits),
            "eval_splits": list(self.eval_splits),
            "classes": list(self.classes),
            "from": None if self.start is None else self.start.to_json(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """The data that a run is trained on: compared when it is carried on, and needed to use its weights later.

    store_id       of the store, or of several stores joined
    spec_id, mel   the mel spec of its clips
    mean, std      by which clips are normalised: of log-mel in the training splits, or those of the warm start
    stores         ids of the stores that are joined; empty: there is one store
    excluded       digest of the clips that exclude lists leave out, of joined stores one for each; None: of no clip
    store_weights  each joined store's share of the clips; empty: every clip comes once an epoch
    block_shuffle  None: clips are shuffled whole
    warm_start     None: the first weights are drawn by the seed of the recipe
    task_identity  None: the run is pre-trained
    """

    store_id: str
    spec_id: str
    mel: MelSpec
    mean: float
    std: float
    stores: tuple[str, ...] = ()
    excluded: str | tuple[str | None, ...] | None = None
    store_weights: tuple[float, ...] = ()
    block_shuffle: BlockShuffleIdentity | None = None
    warm_start: WarmStartIdentity | None = None
    task_identity: TaskIdentity | None = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The identity that `to_json` wrote.

        RunError for a missing or unknown key, InputError for a mel spec that this version cannot compute.
        """
        refuse_other_keys(record, "identity", required=DATA_KEYS, optional=(*OPTIONAL_DATA_KEYS, *TASK_KEYS))

        # Keys that only some runs have. A list of digests is that of joined stores.
        excluded = record.get("excluded")
        if isinstance(excluded, list):
            excluded = tuple(excluded)
        block_shuffle = record.get("block_shuffle")
        if block_shuffle is not None:
            block_shuffle = BlockShuffleIdentity.from_json(block_shuffle)
        warm_start = record.get("warm_start")
        if warm_start is not None:
            warm_start = WarmStartIdentity.from_json(warm_start)

        # The keys of a fine-tuned run: all of them, or none.
        task_identity = None
        task_record = {key: record[key] for key in TASK_KEYS if key in record}
        if task_record:
            task_identity = TaskIdentity.from_json(task_record)
        return cls(
            store_id=record["store_id"],
            spec_id=record["spec_id"],
            mel=MelSpec.from_json(record["mel"]),
            mean=record["mean"],
            std=record["std"],
            stores=tuple(record.get("stores", ())),
            excluded=excluded,
            store_weights=tuple(record.get("store_weights", ())),
            block_shuffle=block_shuffle,
            warm_start=warm_start,
            task_identity=task_identity,
        )

    def to_json(self) -> dict[str, Any]:
        """The value under `identity` in recipe.json, keys in their order there."""
        # Every run.
        record: dict[str, Any] = {
            "store_id": self.store_id,
            "spec_id": self.spec_id,
            "mel": self.mel.to_json(),
            "mean": self.mean,
            "std": self.std,
        }
        if self.task_identity is not None:
            record |= self.task_identity.to_json()

        # Keys that only some runs have: one store, all its clips, shuffled whole, is the identity above.
        if self.stores:
            record["stores"] = list(self.stores)
        if self.excluded is not None:
            record["excluded"] = self.excluded
        if isinstance(self.excluded, tuple):
            record["excluded"] = list(self.excluded)
        if self.store_weights:
            record["store_weights"] = list(self.store_weights)
        if self.block_shuffle is not None:
            record["block_shuffle"] = asdict(self.block_shuffle)
        if self.warm_start is not None:
            record["warm_start"] = self.warm_start.to_json()

        # The start of a fine-tuned run is the last key.
        if self.task_identity is not None:
            record["from"] = record.pop("from")
        return record


def refuse_other_keys(
    record: Mapping[str, Any], name: str, *, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """RunError where a JSON object, called `name`, lacks a required key or has a key that is unknown."""
    unknown = [key for key in record if key not in (*required, *optional)]
    if unknown:
        raise RunError(f"{name}: unknown {', '.join(unknown)}; written by a newer version? Update ajepa")
    missing = [key for key in required if key not in record]
    if missing:
        raise RunError(f"{name}: {', '.join(missing)} missing; restore the file, or start another --run")
