"""What `ajepa-data audit-labels` does, in one call."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.audit import FEW, TOP, audit
from pipeline.audit_exclude import record, suggest
from pipeline.audit_rows import Rows
from pipeline.audit_text import table, write_json
from pipeline.errors import InputError
from pipeline.store import FeatureStore


def audit_store(
    store: Path,
    *,
    measured: Sequence[str] = (),
    exclude: Sequence[Path] = (),
    no_exclude: bool = False,
    json: Path | None = None,
    suggestion: Path | None = None,
    few: int = FEW,
    top: int = TOP,
) -> Iterator[str]:
    """Record exclude lists or take them back, then audit what is left, and write what is asked for; lines to print."""
    if exclude and no_exclude:
        raise InputError("--exclude and --no-exclude: give one of them; --exclude replaces what is recorded")
    if exclude or no_exclude:
        yield from map(str, record(FeatureStore.open(store), exclude))
    rows = Rows.of(FeatureStore.open(store), measured)
    seen = audit(rows, few=few, top=top)
    yield table(seen, str(store))
    if json is not None:
        write_json(seen, str(store), json)
        yield f"\n{json}"
    if suggestion is not None and (clips := suggest(rows, suggestion)):
        beside = "".join(f" --exclude {name}" for name, _, _ in rows.lists)  # a new list replaces them
        yield f"\n{suggestion}: {clips:,} clips; leave them out with:"
        yield f"ajepa-data audit-labels {store}{beside} --exclude {suggestion}"
    elif suggestion is not None:
        yield f"\n{suggestion}: not written; no clip to train on is left that leaks"
