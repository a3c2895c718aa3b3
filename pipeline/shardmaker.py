"""ShardMaker: a block of clips -> decoded once, transformed for every store, written, committed."""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch

from pipeline.audio import Audio, AudioPolicy, load
from pipeline.errors import AudioError, StoreError
from pipeline.files import PARTIAL, fsync
from pipeline.locators import Locator
from pipeline.manifest import RESULT_SCHEMA, failure
from pipeline.mel import log_mel
from pipeline.mirror import Mirror
from pipeline.shards import ShardReader, ShardWriter, intact, shard_path
from pipeline.store import NEXT, Commit, Header, commit_at, ledger_path, read_commit, write_commit

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
class BlockTask:
    """The clips of one block: whole shards of every store. Some may be known to fail."""

    clips: tuple[Clip, ...]
    condemned: dict[int, tuple[str, str]] = field(default_factory=dict)

    def without(self, row: int, reason: str, detail: str) -> "BlockTask":
        return replace(self, condemned=self.condemned | {row: (reason, detail)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMaker:
    """Turns blocks into committed shards of one or more stores of the same plan: one shard, one writer."""

    stores: tuple[tuple[Path, Header], ...]
    policy: AudioPolicy
    mirrors: dict[Path, Mirror] = field(default_factory=dict)  # of the stores that lie elsewhere

    def __call__(self, task: BlockTask) -> Iterator[int | None]:
        """Fill, write and commit the block's shards; yields each row before it is decoded, None before a commit.

        Rows that are good already are kept; where no other changes, a shard is left alone. StoreError if it is
        damaged: keeping its rows would give them fresh checksums.
        """
        with ExitStack() as stack:
            hands: list[_Hand] = []
            for clip in task.clips:
                for store, header in self.stores:
                    if clip.row % header.layout.shard_clips == 0:
                        hand = _Hand(store, header, clip.row, task, self.mirrors.get(store))
                        hands.append(stack.enter_context(hand))
                if wanting := [hand for hand in hands if hand.wants(clip.row)]:
                    yield clip.row
                    heard = self._heard(clip, task)
                    for hand in wanting:
                        hand.fill(clip, heard)
                if done := [hand for hand in hands if hand.last_row == clip.row]:
                    yield None
                    for hand in done:
                        hand.commit()
                    hands = [hand for hand in hands if hand not in done]

    def _heard(self, clip: Clip, task: BlockTask) -> "Audio | dict[str, Any]":
        """The clip's sound, or the result columns that say why there is none."""
        if clip.duplicate is not None:
            return failure("duplicate", clip.duplicate)
        if clip.locator is None:
            return failure("missing", "no sound for this id and start in what was given")
        if clip.row in task.condemned:
            return failure(*task.condemned[clip.row], source=clip.locator.source)
        longest = max(header.spec.clip_seconds for _, header in self.stores)
        seconds = min(clip.end_seconds - clip.start_seconds, longest)
        try:
            return load(
                clip.locator,
                start_seconds=clip.start_seconds,
                end_seconds=clip.start_seconds + seconds,
                policy=self.policy,
            )
        except AudioError as error:
            return failure(error.reason, str(error), source=clip.locator.source)


class _Hand:
    """One shard in the making. It is written from the first row on that is not as it was: before, there is no file."""

    def __init__(self, store: Path, header: Header, row: int, task: BlockTask, mirror: Mirror | None) -> None:
        """The shard of `store` that holds a row."""
        self.store, self.header, self.shard = store, header, row // header.layout.shard_clips
        self._mirror, shard = mirror, self.shard
        rows = header.layout.rows(shard)
        self.first_row, self.last_row = rows[0], rows[-1]
        self._splits = {clip.row: clip.split for clip in task.clips if clip.row in rows}
        record = read_commit(store, shard)
        self._before = None if record is None else record[0]
        self._old = [failure("missing", "")] * len(rows) if record is None else record[1].to_dicts()
        self._results = list(self._old)
        self._writer: ShardWriter | None = None
        self._reader: ShardReader | None = None
        self._written = self.first_row  # rows before this one are in the writer
        self._moments = Moments()
        self._brought = ExitStack()
        for debris in shard_path(store, shard).parent.glob(f"*{PARTIAL}"):  # of a process that died
            debris.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what is unfinished."""
        if self._writer is not None:
            self._writer.drop()
        self._brought.close()

    def wants(self, row: int) -> bool:
        return self._old[row - self.first_row]["status"] != "good"

    def fill(self, clip: Clip, heard: "Audio | dict[str, Any]") -> None:
        """Take in what became of a clip."""
        if isinstance(heard, Audio):
            assert clip.locator is not None
            mel_TF, result = spectrogram(heard, self.header)
            self._results[clip.row - self.first_row] = {"source": clip.locator.source} | result
            self._catch_up(clip.row)
            self._append(clip.row, mel_TF)
        else:
            self._results[clip.row - self.first_row] = heard

    def _catch_up(self, row: int) -> None:
        """Append the rows before `row` that were good already, out of the shard that is there."""
        kept = [r for r in range(self._written, row) if not self.wants(r)]
        if kept and self._reader is None:
            self._reader = self._reader_of_kept()
        layout = self.header.layout
        for old_row in kept:
            assert self._reader is not None
            mel_TF = np.empty((layout.frames, layout.bands), layout.dtype)
            self._reader.read_into(old_row, mel_TF)
            self._append(old_row, mel_TF)
        self._written = row

    def _reader_of_kept(self) -> ShardReader:
        """Of the shard as it was, brought here if it lies elsewhere."""
        mirror, record = self._mirror, ledger_path(self.store, self.shard)
        home = self._brought.enter_context(mirror.kept(self.shard)) if mirror else self.store
        if self._before is not None and matches(home, self._before):
            return ShardReader(home, self.header.layout)
        how = f"run: ajepa-data verify {self.store} --repair (or delete {record} and build again)"
        if mirror:
            how = f"delete {mirror.url_of(record)} and build again"
        raise StoreError(f"{mirror.url if mirror else self.store}: shard {self.shard} is damaged; {how}")

    def _append(self, row: int, mel_TF: np.ndarray) -> None:
        with _disk(self.store, self.shard):
            if self._writer is None:
                self._writer = ShardWriter(self.store, self.header.layout, self.shard)
            self._writer.add(row, mel_TF)
        n_frames = self._results[row - self.first_row]["n_frames"]
        values_TF = self.header.offset + self.header.scale * mel_TF[:n_frames].astype(np.float64)
        self._moments.add(self._splits[row], values_TF)
        self._written = row + 1

    def commit(self) -> None:
        """Write the rest and the record, if anything has changed."""
        if self._before is not None and self._results == self._old:
            return
        self._catch_up(self.last_row + 1)
        with _disk(self.store, self.shard):
            commit = Commit(
                shard=self.shard,
                spec_id=self.header.spec.spec_id,
                plan_id=self.header.plan_id,
                sha256=hashlib.sha256().hexdigest() if self._writer is None else self._writer.finish(),
                size_bytes=0 if self._writer is None else self._writer.size_bytes,
                moments=self._moments.to_json(),
            )
            results = pl.DataFrame(self._results, schema=RESULT_SCHEMA, orient="row")
            place(self.store, commit, results, self._writer)
        self._writer = None
        self._brought.close()
        if self._mirror is not None:
            self._mirror.push_shard(self.shard)


@contextmanager
def _disk(store: Path, shard: int) -> Iterator[None]:
    """Say which shard found the disk full, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StoreError(
            f"{store}: no space left for shard {shard}; free some and run the same command again: it carries on"
        ) from None


def place(store: Path, commit: Commit, results: pl.DataFrame, writer: ShardWriter | None) -> None:
    """Put a shard and its record in place so that at every instant the old pair or the new one can be had.

    The new record waits as `.next` while the shard is renamed; `settle` decides by the shard's digest.
    """
    record = ledger_path(store, commit.shard)
    waiting = record.with_name(record.name + NEXT)
    write_commit(waiting, commit, results)
    if writer is not None:
        writer.place()
    settle(store, waiting)


def settle(store: Path, waiting: Path) -> None:
    """Adopt a waiting record if the shard it tells of is in place, else drop it: the old record holds."""
    if matches(store, commit_at(waiting)[0]):
        waiting.replace(waiting.with_suffix(""))
    else:
        waiting.unlink()
    fsync(waiting.parent)


def matches(store: Path, commit: Commit) -> bool:
    """Whether the shard on disk is the one that was committed."""
    return intact(shard_path(store, commit.shard), commit.size_bytes, commit.sha256)


def spectrogram(audio: Audio, header: Header) -> tuple[np.ndarray, dict[str, Any]]:
    """A clip as stored, `[T, F]`, and its result columns but for `source`."""
    spec = header.spec
    wave_S = audio.resampled(spec.sample_rate_hz)[: spec.clip_samples]
    clip_TF = log_mel(torch.from_numpy(wave_S)[None], spec)[0].numpy()
    mel_TF = np.empty((header.layout.frames, header.layout.bands), header.layout.dtype)
    mel_TF[: len(clip_TF)] = quantise(clip_TF, header)
    mel_TF[len(clip_TF) :] = quantise(np.array(spec.floor_log, np.float32), header)
    error_TF = header.offset + header.scale * mel_TF[: len(clip_TF)].astype(np.float32) - clip_TF
    return mel_TF, {
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
        "error_rms_nat": float(np.sqrt(np.mean(np.square(error_TF), dtype=np.float64))),
        "error_max_nat": float(np.abs(error_TF).max()),
    }


def quantise(mel: np.ndarray, header: Header) -> np.ndarray:
    """Log-mel as stored; uint8 keeps 0 for what is not there."""
    if header.layout.dtype == "float16":
        return mel.astype(np.float16)
    return np.clip(np.rint((mel - header.offset) / header.scale), 1, 255).astype(np.uint8)


class Moments:
    """Per split: how many valid frames, and the sums and sums of squares of their stored log-mel per band."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}

    def add(self, split: str, values_TF: np.ndarray) -> None:
        zeros_F = np.zeros(values_TF.shape[1])
        frames, sum_F, square_F = self._sums.get(split, (0, zeros_F, zeros_F))
        self._sums[split] = [
            frames + len(values_TF),
            sum_F + values_TF.sum(axis=0),
            square_F + np.square(values_TF).sum(axis=0),
        ]

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {
            split: {"frames": frames, "sum_F": sum_F.tolist(), "square_F": square_F.tolist()}
            for split, (frames, sum_F, square_F) in self._sums.items()
        }
