"""ShardMaker: the clips of one shard -> decoded, transformed, written, committed."""

import errno
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from pipeline.audio import AudioPolicy, load
from pipeline.errors import AudioError, StoreError
from pipeline.files import fsync, replacing
from pipeline.locators import Locator
from pipeline.manifest import RESULT_SCHEMA, failure
from pipeline.mel import log_mel
from pipeline.shards import ShardReader, encode_shard, shard_path
from pipeline.store import Commit, Header, commit_at, ledger_path, read_commit, write_commit

NEXT = ".next"  # suffix of a record whose shard is about to be placed


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One row to fill: where its sound lies, and which seconds of it count."""

    row: int
    split: str
    start_seconds: float
    end_seconds: float
    locator: Locator | None
    duplicate: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """The clips of one shard, and those already known to fail."""

    shard: int
    clips: tuple[Clip, ...]
    open_rows: int  # those not good yet
    condemned: dict[int, tuple[str, str]] = field(default_factory=dict)

    def without(self, row: int, reason: str, detail: str) -> "ShardTask":
        return replace(self, condemned=self.condemned | {row: (reason, detail)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMaker:
    """Turns tasks into committed shards: one shard, one task, one writer."""

    store: Path
    header: Header
    policy: AudioPolicy

    def __call__(self, task: ShardTask) -> Iterator[int | None]:
        """Fill, write and commit a shard; yields each row before it is decoded, None before writing.

        Rows that are good already are kept; if no other changes, the shard is left alone. StoreError if it is
        damaged: keeping its rows would give them fresh checksums.
        """
        layout, before = self.header.layout, read_commit(self.store, task.shard)
        shape = (len(task.clips), layout.frames, layout.bands)
        mel_NTF = np.full(shape, layout.fill, layout.dtype)
        old = before[1].to_dicts() if before else [failure("missing", "")] * len(task.clips)
        results = []
        for clip, result, mel_TF in zip(task.clips, old, mel_NTF, strict=True):
            if result["status"] != "good":
                yield clip.row
                result = self._fill(clip, task, mel_TF)
            results.append(result)
        yield None
        if before is None or results != old:
            if before is not None:
                self._keep(task, before[0], old, mel_NTF)
            self._commit(task, mel_NTF, pl.DataFrame(results, schema=RESULT_SCHEMA, orient="row"))

    def _keep(self, task: ShardTask, before: Commit, old: list[dict[str, Any]], mel_NTF: np.ndarray) -> None:
        """Copy the rows that are good already out of the shard that is there."""
        if not matches(self.store, before):
            record = ledger_path(self.store, task.shard)
            raise StoreError(f"{self.store}: shard {task.shard} is damaged; delete {record} and build again")
        reader = ShardReader(self.store, self.header.layout)
        for clip, result, mel_TF in zip(task.clips, old, mel_NTF, strict=True):
            if result["status"] == "good":
                reader.read_into(clip.row, mel_TF)

    def _fill(self, clip: Clip, task: ShardTask, mel_TF: np.ndarray) -> dict[str, Any]:
        """Write a clip's spectrogram into its place; the result columns of its row."""
        if clip.duplicate is not None:
            return failure("duplicate", clip.duplicate)
        if clip.locator is None:
            return failure("missing", "no file for this id and start below the audio folders")
        if clip.row in task.condemned:
            return failure(*task.condemned[clip.row], source=clip.locator.source)
        spec = self.header.spec
        seconds = min(clip.end_seconds - clip.start_seconds, spec.clip_seconds)
        try:
            audio = load(
                clip.locator,
                start_seconds=clip.start_seconds,
                end_seconds=clip.start_seconds + seconds,
                policy=self.policy,
            )
        except AudioError as error:
            return failure(error.reason, str(error), source=clip.locator.source)
        clip_TF = log_mel(torch.from_numpy(audio.resampled(spec.sample_rate_hz))[None], spec)[0].numpy()
        mel_TF[:] = quantise(np.array(spec.floor_log, np.float32), self.header)
        mel_TF[: len(clip_TF)] = quantise(clip_TF, self.header)
        return {
            "source": clip.locator.source,
            "status": "good",
            "reason": None,
            "detail": None,
            "flags": list(audio.flags),
            "n_frames": len(clip_TF),
            "codec": audio.codec,
            "rate_hz": audio.rate_hz,
            "channels": audio.channels,
            "seconds": audio.seconds,
            "peak_dbfs": audio.peak_dbfs,
            "rms_dbfs": audio.rms_dbfs,
            "digest": audio.digest,
        }

    def _commit(self, task: ShardTask, mel_NTF: np.ndarray, results: pl.DataFrame) -> None:
        content = encode_shard(self.header.layout, task.shard, mel_NTF)
        commit = Commit(
            shard=task.shard,
            spec_id=self.header.spec.spec_id,
            plan_id=self.header.plan_id,
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            moments=_moments(task, mel_NTF, results, self.header),
        )
        try:
            place(self.store, commit, results, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreError(
                f"{self.store}: no space left for shard {task.shard} ({len(content) / 2**20:.0f} MiB); "
                "free some and run the same command again: it carries on"
            ) from None


def place(store: Path, commit: Commit, results: pl.DataFrame, content: memoryview) -> None:
    """Put a shard and its record in place so that at every instant the old pair or the new one can be had.

    The new record waits as `.next` while the shard is renamed; `settle` decides by the shard's digest.
    """
    record = ledger_path(store, commit.shard)
    waiting = record.with_name(record.name + NEXT)
    if content:
        path = shard_path(store, commit.shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.write_bytes(content)
            fsync(scratch)
            write_commit(waiting, commit, results)
    else:
        write_commit(waiting, commit, results)
    settle(store, waiting)


def settle(store: Path, waiting: Path) -> None:
    """Adopt a waiting record if the shard it tells of is in place, else drop it: the old record holds."""
    if matches(store, commit_at(waiting)[0]):
        waiting.replace(waiting.with_suffix(""))
    else:
        waiting.unlink()
    fsync(waiting.parent)


def matches(store: Path, commit: Commit) -> bool:
    """Whether the shard on disk is the one that was committed, byte for byte."""
    path = shard_path(store, commit.shard)
    if not commit.size_bytes:
        return not path.exists()
    if not path.is_file() or path.stat().st_size != commit.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == commit.sha256


def quantise(mel: np.ndarray, header: Header) -> np.ndarray:
    """Log-mel as stored; uint8 keeps 0 for what is not there."""
    if header.layout.dtype == "float16":
        return mel.astype(np.float16)
    return np.clip(np.rint((mel - header.offset) / header.scale), 1, 255).astype(np.uint8)


def _moments(
    task: ShardTask, mel_NTF: np.ndarray, results: pl.DataFrame, header: Header
) -> dict[str, dict[str, Any]]:
    """Per split: how many valid frames, and the sums and sums of squares of their stored log-mel per band."""
    moments: dict[str, dict[str, Any]] = {}
    for clip, mel_TF, n_frames in zip(task.clips, mel_NTF, results["n_frames"], strict=True):
        if n_frames:
            values_TF = header.offset + header.scale * mel_TF[:n_frames].astype(np.float64)
            zeros_F = np.zeros(values_TF.shape[1])
            sums = moments.setdefault(clip.split, {"frames": 0, "sum_F": zeros_F, "square_F": zeros_F})
            sums["frames"] += n_frames
            sums["sum_F"] = sums["sum_F"] + values_TF.sum(axis=0)
            sums["square_F"] = sums["square_F"] + np.square(values_TF).sum(axis=0)
    return {
        split: {name: value if name == "frames" else value.tolist() for name, value in sums.items()}
        for split, sums in moments.items()
    }
