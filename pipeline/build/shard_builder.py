"""ShardMaker: a block of clips -> decoded once, transformed for every store, written, committed."""

import hashlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
import polars as pl
import torch
from torch import Tensor

from pipeline.audio.decode import Audio, AudioPolicy, load
from pipeline.audio.mel import log_mel
from pipeline.audio.sources import Locator
from pipeline.build.remote_store import Mirror
from pipeline.errors import AudioError, StoreError
from pipeline.files import FULL, PARTIAL
from pipeline.store.header import Header
from pipeline.store.manifest import RESULT_SCHEMA, failure
from pipeline.store.reader import ShardReader
from pipeline.store.shards import (
    Commit,
    Moments,
    ShardWriter,
    ledger_path,
    matches,
    place,
    read_commit,
    shard_path,
)


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
        """Fill, write and commit the block's shards; yields each row before it is decoded, None before the writing.

        Sounds are decoded in the order in which they lie in their archives, rows are written in their own. Rows that
        are good already are kept; where no other changes, a shard is left alone. StoreError if it is damaged: keeping
        its rows would give them fresh checksums.
        """
        first, last = task.clips[0].row, task.clips[-1].row
        with ExitStack() as stack:
            hands = [
                stack.enter_context(
                    closing(_Hand(store, header, shard, self.policy, self.mirrors.get(store)))
                )
                for store, header in self.stores
                for shard in range(first // header.layout.shard_clips, last // header.layout.shard_clips + 1)
            ]
            for clip in sorted(task.clips, key=_lies):
                if wanting := [hand for hand in hands if hand.wants(clip.row)]:
                    yield clip.row
                    heard = self._heard(clip, task)
                    for hand in wanting:
                        hand.fill(clip, heard)
            yield None
            splits = {clip.row: clip.split for clip in task.clips}
            for hand in hands:
                hand.commit(splits)

    def _heard(self, clip: Clip, task: BlockTask) -> "Audio | dict[str, Any]":
        """The clip's sound, or the result columns that say why there is none."""
        if clip.duplicate is not None:
            return failure("duplicate", clip.duplicate)
        if clip.locator is None:
            return failure(
                "missing", "no sound for this id and start in the folders and archives that were given"
            )
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


def _lies(clip: Clip) -> tuple[str, int, int, int]:
    """Where a clip's sound lies, so that an archive is read from its beginning to its end."""
    where = clip.locator
    if where is None:
        return "", 0, 0, clip.row
    return where.path, where.group or 0, where.row or where.offset or 0, clip.row


class _Hand:
    """One shard in the making: new spectrograms wait in a file without a name, one place a row, until all are there."""

    def __init__(
        self, store: Path, header: Header, shard: int, policy: AudioPolicy, mirror: Mirror | None
    ) -> None:
        self.store, self.header, self.shard = store, header, shard
        self.policy, self._mirror = policy, mirror
        self.rows = header.layout.rows(shard)
        record = read_commit(store, shard)
        self._before = None if record is None else record[0]
        self._old = [failure("missing", "")] * len(self.rows) if record is None else record[1].to_dicts()
        self._results = list(self._old)
        self._waiting: IO[bytes] | None = None
        for debris in shard_path(store, shard).parent.glob(f"*{PARTIAL}"):  # of a process that died
            debris.unlink()

    def close(self) -> None:
        """Forget what was not committed."""
        if self._waiting is not None:
            self._waiting.close()

    def wants(self, row: int) -> bool:
        return row in self.rows and self._old[row - self.rows[0]]["status"] != "good"

    def fill(self, clip: Clip, heard: "Audio | dict[str, Any]") -> None:
        """Take in what became of a clip."""
        number = clip.row - self.rows[0]
        if not isinstance(heard, Audio):
            self._results[number] = heard
            return
        assert clip.locator is not None
        mel_TF, result = spectrogram(heard, self.header)
        self._results[number] = {"source": clip.locator.source} | result
        with _disk(self.store, self.shard):
            if self._waiting is None:
                self._waiting = tempfile.TemporaryFile(dir=self.store)  # noqa: SIM115  (closed by `close`)
            self._waiting.seek(number * mel_TF.nbytes)
            self._waiting.write(mel_TF.data)
            self._waiting.flush()

    def commit(self, splits: Mapping[int, str]) -> None:
        """Write the shard and its record, if anything has changed."""
        if self._before is not None and self._results == self._old:
            return
        policy = loosest(self.policy, None if self._before is None else self._before.policy)
        with ExitStack() as stack, _disk(self.store, self.shard):
            good = self._good(stack)
            write_shard(self.store, self.header, self.shard, self._results, good, splits, policy)
        if self._mirror is not None:
            self._mirror.push_shard(self.shard)

    def _good(self, stack: ExitStack) -> Iterator[tuple[int, np.ndarray]]:
        """The good rows in their order with their spectrograms: those that wait, and those kept of the old shard."""
        layout, reader = self.header.layout, None
        for number, (row, old, new) in enumerate(zip(self.rows, self._old, self._results, strict=True)):
            mel_TF = np.empty((layout.frames, layout.bands), layout.dtype)
            if old["status"] == "good":
                if reader is None:
                    reader = self._reader(stack)
                reader.read(np.array([row]), np.zeros(1, np.int64), mel_TF[None])
                yield row, mel_TF
            elif new["status"] == "good":
                assert self._waiting is not None
                self._waiting.seek(number * mel_TF.nbytes)
                self._waiting.readinto(mel_TF.data.cast("B"))  # type: ignore[attr-defined]
                yield row, mel_TF

    def _reader(self, stack: ExitStack) -> ShardReader:
        """Of the shard as it was, brought here if it lies elsewhere; StoreError where it is not what was committed."""
        mirror, record = self._mirror, ledger_path(self.store, self.shard)
        home = stack.enter_context(mirror.kept(self.shard)) if mirror else self.store
        if self._before is not None and matches(home, self._before):
            return ShardReader(partial(shard_path, home), self.header.layout)
        how = f"run: ajepa-data verify {self.store} --repair (or delete {record} and build again)"
        if mirror:
            how = f"delete {mirror.url_of(record)} and build again"
        raise StoreError(f"{mirror.url if mirror else self.store}: shard {self.shard} is damaged; {how}")


def write_shard(
    store: Path,
    header: Header,
    shard: int,
    results: Sequence[dict[str, Any]],
    good: Iterable[tuple[int, np.ndarray]],
    splits: Mapping[int, str],
    policy: dict[str, Any],
) -> None:
    """Write and commit a shard: the results of all its rows, and in their order the good ones' spectrograms."""
    moments, first, writer = Moments(), header.layout.rows(shard)[0], None
    with ExitStack() as stack:
        for row, mel_TF in good:
            if writer is None:
                writer = stack.enter_context(closing(ShardWriter(store, header.layout, shard)))
            writer.add(row, mel_TF)
            moments.add(splits[row], restore(mel_TF[: results[row - first]["n_frames"]], header))
        commit = Commit(
            shard=shard,
            spec_id=header.spec.spec_id,
            plan_id=header.plan_id,
            sha256=hashlib.sha256().hexdigest() if writer is None else writer.finish(),
            size_bytes=0 if writer is None else writer.size_bytes,
            policy=policy,
            moments=moments.to_json(),
        )
        if writer is None:  # what lies there holds no good clip any more
            shard_path(store, shard).unlink(missing_ok=True)
        place(store, commit, pl.DataFrame(results, schema=RESULT_SCHEMA, orient="row"), writer)


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


def spectrogram(audio: Audio, header: Header) -> tuple[np.ndarray, dict[str, Any]]:
    """A clip as stored, `[T, F]`, and its result columns but for `source`."""
    spec = header.spec
    wave_S = audio.resampled(spec.sample_rate_hz)[: spec.clip_samples]
    clip_TF = log_mel(torch.from_numpy(wave_S)[None], spec)[0]
    frames = len(clip_TF)
    mel_TF = np.empty((header.layout.frames, header.layout.bands), header.layout.dtype)
    mel_TF[:frames] = quantise(clip_TF, header).numpy()
    mel_TF[frames:] = quantise(torch.tensor(spec.floor_log), header).numpy()
    error_N = (restore(mel_TF[:frames], header) - clip_TF).flatten()
    return mel_TF, {
        "status": "good",
        "reason": None,
        "detail": None,
        "flags": list(audio.flags),
        "n_frames": frames,
        "codec": audio.codec,
        "rate_hz": audio.rate_hz,
        "channels": audio.channels,
        "seconds": audio.seconds,
        "peak_dbfs": audio.peak_dbfs,
        "rms_dbfs": audio.rms_dbfs,
        "digest": audio.digest,
        "error_rms_nat": math.sqrt(float(error_N.dot(error_N)) / len(error_N)),
        "error_max_nat": float(error_N.abs().max()),
        "crc32c": google_crc32c.value(mel_TF.tobytes()),
    }


def quantise(mel: Tensor, header: Header) -> Tensor:
    """Log-mel as stored; uint8 keeps 0 for what is not there. Rounds as NumPy does, in a twentieth of its time."""
    if header.layout.dtype == "float16":
        return mel.half()
    return ((mel - header.offset) / header.scale).round().clamp(1, 255).to(torch.uint8)


def restore(stored_TF: np.ndarray, header: Header) -> Tensor:
    """Stored values as log-mel, float32."""
    return torch.from_numpy(stored_TF).float().mul_(header.scale).add_(header.offset)


def loosest(policy: AudioPolicy, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """A policy that takes what either takes: rows of a shard may come from builds with different ones."""
    now = asdict(policy)
    return now if before is None else {name: max(now[name], before[name]) for name in now}
