"""The header of a store: all facts about the store that are known before the first clip is decoded."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.audio.mel_spec import MelSpec
from pipeline.errors import StoreError
from pipeline.labels.ontology import ClassList
from pipeline.messages import describe_no_store

STORE_FORMAT = 1

STORED_DTYPES = ("float16", "uint8")

# Every error that may be raised by reading a `zarr.json` that is missing, truncated or from another program.
UNREADABLE_HEADER_ERRORS = (OSError, KeyError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """The shape of the array `mel`: clips x frames x bands, one chunk per clip, `shard_clips` chunks per shard."""

    clips: int
    frames: int
    bands: int
    dtype: str  # float16 or uint8
    shard_clips: int

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"dtype must be one of {STORED_DTYPES}, got {self.dtype}")

    @property
    def fill_value(self) -> float | int:
        """The value that zarr-python returns for an absent clip; no stored clip consists of it alone."""
        return 0 if self.dtype == "uint8" else math.nan

    @property
    def clip_bytes(self) -> int:
        """The size of one clip's chunk without its checksum."""
        return self.frames * self.bands * np.dtype(self.dtype).itemsize

    @property
    def shard_count(self) -> int:
        """The number of shards; the last one may have fewer clips."""
        return -(-self.clips // self.shard_clips)

    def rows_of_shard(self, shard: int) -> range:
        """Return the rows of `mel` that a shard contains."""
        return range(shard * self.shard_clips, min((shard + 1) * self.shard_clips, self.clips))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreHeader:
    """The facts about a store in its `zarr.json`: the build writes them, and every reader uses them."""

    spec: MelSpec
    layout: ShardLayout
    plan_id: str
    scale: float  # log-mel = offset + scale * stored
    offset: float
    classes: ClassList
    plan_digest: str  # digest of the manifest's PLAN_SCHEMA columns
    labels_digest: str  # digest of `raw` and `outside` in labels.parquet

    def to_log_mel(self, stored: np.ndarray) -> np.ndarray:
        """Return stored values as log-mel, natural logarithm of power, float32, in the same shape."""
        return dequantise(stored, self.scale, self.offset)

    def to_json(self) -> dict[str, object]:
        """Return the header as JSON values, with a digest of them."""
        # The digest does not depend on the order of keys, because other programs may rewrite `zarr.json`.
        values = self._json_values()
        return values | {"digest": _json_digest(values)}

    def _json_values(self) -> dict[str, object]:
        return {
            "format": STORE_FORMAT,
            "spec": self.spec.to_json(),
            "spec_id": self.spec.spec_id,
            "plan_id": self.plan_id,
            "layout": asdict(self.layout),
            "scale": self.scale,
            "offset": self.offset,
            "classes": list(self.classes.mids),
            "class_names": list(self.classes.names),
            "plan_digest": self.plan_digest,
            "labels_digest": self.labels_digest,
        }

    @classmethod
    def read(cls, store: Path) -> Self:
        """Read the header of the store at `store`; StoreError if there is none, or if its format is another."""
        path = store / "zarr.json"
        try:
            header = json.loads(path.read_text())["attributes"]["ajepa"]
            store_format = header["format"]
            digest = header.pop("digest", None)
        except UNREADABLE_HEADER_ERRORS:
            raise no_store_error(store) from None

        # Check the format first: another version may compute the digest differently.
        if store_format != STORE_FORMAT:
            raise StoreError(
                f"{store}: has store format {store_format}, this version reads format {STORE_FORMAT}; "
                "build the store again"
            )
        if digest != _json_digest(header):
            raise StoreError(
                f"{path}: does not match its digest; run the build command again, which writes it anew"
            )
        return cls._from_json(header)

    @classmethod
    def _from_json(cls, header: dict[str, Any]) -> Self:
        return cls(
            spec=MelSpec.from_json(header["spec"]),
            layout=ShardLayout(**header["layout"]),
            plan_id=header["plan_id"],
            scale=header["scale"],
            offset=header["offset"],
            classes=ClassList(mids=tuple(header["classes"]), names=tuple(header["class_names"])),
            plan_digest=header["plan_digest"],
            labels_digest=header["labels_digest"],
        )


def no_store_error(location: Path | str) -> StoreError:
    """Return the error for a path or URL that is not a feature store."""
    return StoreError(describe_no_store(location))


def dequantise(stored: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """Return stored values as log-mel: `offset + scale * stored`, float32."""
    return stored.astype(np.float32) * np.float32(scale) + np.float32(offset)


def _json_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
