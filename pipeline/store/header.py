"""Header: what a store is, everything that is known of it before the first clip is decoded."""

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

STORED_DTYPES = ("float16", "uint8")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """The array `mel`: clips x frames x bands, one chunk a clip, `shard_clips` chunks a shard."""

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
        """What an absent clip reads as in zarr-python; no clip that is there holds it throughout."""
        return 0 if self.dtype == "uint8" else math.nan

    @property
    def clip_bytes(self) -> int:
        return self.frames * self.bands * np.dtype(self.dtype).itemsize

    @property
    def shard_count(self) -> int:
        return -(-self.clips // self.shard_clips)

    def rows_of_shard(self, shard: int) -> range:
        """The rows of `mel` that a shard holds."""
        return range(shard * self.shard_clips, min((shard + 1) * self.shard_clips, self.clips))


STORE_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreHeader:
    """What a store is: everything that is known before the first clip is decoded."""

    spec: MelSpec
    layout: ShardLayout
    plan_id: str
    scale: float  # log-mel = offset + scale * stored
    offset: float
    classes: ClassList
    plan_digest: str  # of the manifest's columns of the plan
    labels_digest: str  # of `raw` and `outside` in labels.parquet

    def to_log_mel(self, stored: np.ndarray) -> np.ndarray:
        """Stored values as log-mel, natural logarithm of power, float32, in the same shape."""
        return dequantise(stored, self.scale, self.offset)

    def to_json(self) -> dict[str, object]:
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
        """The header of the store at `store`; raises StoreError where there is none of this format."""
        path = store / "zarr.json"
        try:
            header = json.loads(path.read_text())["attributes"]["ajepa"]
            known, digest = header["format"], header.pop("digest", None)
        except (OSError, KeyError, ValueError, TypeError, AttributeError):
            raise StoreError(
                f"{store}: not a feature store; make one with: ajepa-data build-audioset"
            ) from None
        if known != STORE_FORMAT:
            raise StoreError(f"{store}: has store format {known}, this version reads format {STORE_FORMAT}")
        if digest != _json_digest(header):
            raise StoreError(
                f"{path}: does not match its digest; run the build command again: it writes it anew"
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


def dequantise(stored: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """The numbers that stored ones stand for, `offset + scale * stored`, float32."""
    return stored.astype(np.float32) * np.float32(scale) + np.float32(offset)


def _json_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
