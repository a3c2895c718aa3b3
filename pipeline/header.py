"""Header: what a store is, everything that is known of it before the first clip is decoded."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.errors import StoreError
from pipeline.melspec import MelSpec
from pipeline.ontology import ClassList
from pipeline.shards import Layout

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a store is: everything that is known before the first clip is decoded."""

    spec: MelSpec
    layout: Layout
    plan_id: str
    scale: float  # log-mel = offset + scale * stored
    offset: float
    classes: ClassList
    plan_digest: str  # of the manifest's columns of the plan
    labels_digest: str  # of `raw` and `outside` in labels.parquet

    def to_json(self) -> dict[str, object]:
        values = self._values()
        return values | {"digest": _digest_of_json(values)}

    def _values(self) -> dict[str, object]:
        return {
            "format": FORMAT,
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
        if known != FORMAT:
            raise StoreError(f"{store}: has store format {known}, this version reads format {FORMAT}")
        if digest != _digest_of_json(header):
            raise StoreError(
                f"{path}: does not match its digest; run the build command again: it writes it anew"
            )
        return cls._of(header)

    @classmethod
    def _of(cls, header: dict[str, Any]) -> Self:
        return cls(
            spec=MelSpec.from_json(header["spec"]),
            layout=Layout(**header["layout"]),
            plan_id=header["plan_id"],
            scale=header["scale"],
            offset=header["offset"],
            classes=ClassList(mids=tuple(header["classes"]), names=tuple(header["class_names"])),
            plan_digest=header["plan_digest"],
            labels_digest=header["labels_digest"],
        )


def _digest_of_json(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
