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

from pipeline.audio.decode import AudioPolicy, ClipAudio, load_clip_audio
from pipeline.audio.mel import log_mel
from pipeline.audio.sources import SoundLocator
from pipeline.build.remote_store import RemoteStore
from pipeline.errors import AudioError, StoreError
from pipeline.files import DISK_FULL_ERRNOS, PARTIAL_SUFFIX
from pipeline.store.header import StoreHeader
from pipeline.store.manifest import RESULT_SCHEMA, failure_result
from pipeline.store.reader import ShardReader
from pipeline.store.shards import (
    ShardCommit,
    ShardWriter,
    SplitMoments,
    commit_shard,
    ledger_path,
    read_commit,
    shard_matches_commit,
    shard_path,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """One row to fill: where its sound lies, and which seconds of it count."""

    row: int
    split: str
    start_seconds: float
    end_seconds: float
    locator: SoundLocator | None
    duplicate: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTask:
    """The clips of one block: whole shards of every store. Some may be known to fail."""

    clips: tuple[PlannedClip, ...]
    known_failures: dict[int, tuple[str, str]] = field(default_factory=dict)

    def with_failed_row(self, row: int, reason: str, detail: str) -> "BlockTask":
        return replace(self, known_failures=self.known_failures | {row: (reason, detail)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBuilder:
    """Turns blocks into committed shards of one or more stores of the same plan: one shard, one writer."""

    stores: tuple[tuple[Path, StoreHeader], ...]
    policy: AudioPolicy
    remote_stores: dict[Path, RemoteStore] = field(default_factory=dict)  # of the stores that lie elsewhere

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
                    closing(_OpenShard(store, header, shard, self.policy, self.remote_stores.get(store)))
                )
                for store, header in self.stores
                for shard in range(first // header.layout.shard_clips, last // header.layout.shard_clips + 1)
            ]
            for clip in sorted(task.clips, key=_archive_order):
                if wanting := [hand for hand in hands if hand.needs_row(clip.row)]:
                    yield clip.row
                    heard = self._decode_clip(clip, task)
                    for hand in wanting:
                        hand.add_clip(clip, heard)
            yield None
            splits = {clip.row: clip.split for clip in task.clips}
            for hand in hands:
                hand.commit_changes(splits)

    def _decode_clip(self, clip: PlannedClip, task: BlockTask) -> "ClipAudio | dict[str, Any]":
        """The clip's sound, or the result columns that say why there is none."""
        if clip.duplicate is not None:
            return failure_result("duplicate", clip.duplicate)
        if clip.locator is None:
            return failure_result(
                "missing", "no sound for this id and start in the folders and archives that were given"
            )
        if clip.row in task.known_failures:
            return failure_result(*task.known_failures[clip.row], source=clip.locator.source)
        longest = max(header.spec.clip_seconds for _, header in self.stores)
        seconds = min(clip.end_seconds - clip.start_seconds, longest)
        try:
            return load_clip_audio(
                clip.locator,
                start_seconds=clip.start_seconds,
                end_seconds=clip.start_seconds + seconds,
                policy=self.policy,
            )
        except AudioError as error:
            return failure_result(error.reason, str(error), source=clip.locator.source)


def _archive_order(clip: PlannedClip) -> tuple[str, int, int, int]:
    """Where a clip's sound lies, so that an archive is read from its beginning to its end."""
    where = clip.locator
    if where is None:
        return "", 0, 0, clip.row
    return where.path, where.group or 0, where.row or where.offset or 0, clip.row


class _OpenShard:
    """One shard in the making: new spectrograms wait in a file without a name, one place a row, until all are there."""

    def __init__(
        self,
        store: Path,
        header: StoreHeader,
        shard: int,
        policy: AudioPolicy,
        remote_store: RemoteStore | None,
    ) -> None:
        self.store, self.header, self.shard = store, header, shard
        self.policy, self._remote_store = policy, remote_store
        self.rows = header.layout.rows_of_shard(shard)
        record = read_commit(store, shard)
        self._old_commit = None if record is None else record[0]
        self._old_results = (
            [failure_result("missing", "")] * len(self.rows) if record is None else record[1].to_dicts()
        )
        self._new_results = list(self._old_results)
        self._scratch_file: IO[bytes] | None = None
        for debris in shard_path(store, shard).parent.glob(f"*{PARTIAL_SUFFIX}"):  # of a process that died
            debris.unlink()

    def close(self) -> None:
        """Forget what was not committed."""
        if self._scratch_file is not None:
            self._scratch_file.close()

    def needs_row(self, row: int) -> bool:
        return row in self.rows and self._old_results[row - self.rows[0]]["status"] != "good"

    def add_clip(self, clip: PlannedClip, outcome: "ClipAudio | dict[str, Any]") -> None:
        """Take in what became of a clip."""
        number = clip.row - self.rows[0]
        if not isinstance(outcome, ClipAudio):
            self._new_results[number] = outcome
            return
        assert clip.locator is not None
        mel_TF, result = compute_stored_row(outcome, self.header)
        self._new_results[number] = {"source": clip.locator.source} | result
        with _explaining_full_disk(self.store, self.shard):
            if self._scratch_file is None:
                self._scratch_file = tempfile.TemporaryFile(dir=self.store)  # noqa: SIM115  (closed by `close`)
            self._scratch_file.seek(number * mel_TF.nbytes)
            self._scratch_file.write(mel_TF.data)
            self._scratch_file.flush()

    def commit_changes(self, splits: Mapping[int, str]) -> None:
        """Write the shard and its record, if anything has changed."""
        if self._old_commit is not None and self._new_results == self._old_results:
            return
        policy = union_of_policies(self.policy, None if self._old_commit is None else self._old_commit.policy)
        with ExitStack() as stack, _explaining_full_disk(self.store, self.shard):
            good = self._good_rows(stack)
            write_shard(self.store, self.header, self.shard, self._new_results, good, splits, policy)
        if self._remote_store is not None:
            self._remote_store.push_shard(self.shard)

    def _good_rows(self, stack: ExitStack) -> Iterator[tuple[int, np.ndarray]]:
        """The good rows in their order with their spectrograms: those that wait, and those kept of the old shard."""
        layout, reader = self.header.layout, None
        for number, (row, old, new) in enumerate(
            zip(self.rows, self._old_results, self._new_results, strict=True)
        ):
            mel_TF = np.empty((layout.frames, layout.bands), layout.dtype)
            if old["status"] == "good":
                if reader is None:
                    reader = self._open_old_shard(stack)
                reader.read(np.array([row]), np.zeros(1, np.int64), mel_TF[None])
                yield row, mel_TF
            elif new["status"] == "good":
                assert self._scratch_file is not None
                self._scratch_file.seek(number * mel_TF.nbytes)
                self._scratch_file.readinto(mel_TF.data.cast("B"))  # type: ignore[attr-defined]
                yield row, mel_TF

    def _open_old_shard(self, stack: ExitStack) -> ShardReader:
        """Of the shard as it was, brought here if it lies elsewhere; StoreError where it is not what was committed."""
        mirror, record = self._remote_store, ledger_path(self.store, self.shard)
        home = stack.enter_context(mirror.fetched_shard(self.shard)) if mirror else self.store
        if self._old_commit is not None and shard_matches_commit(home, self._old_commit):
            return ShardReader(partial(shard_path, home), self.header.layout)
        how = f"run: ajepa-data verify {self.store} --repair (or delete {record} and build again)"
        if mirror:
            how = f"delete {mirror.file_url(record)} and build again"
        raise StoreError(f"{mirror.url if mirror else self.store}: shard {self.shard} is damaged; {how}")


def write_shard(
    store: Path,
    header: StoreHeader,
    shard: int,
    results: Sequence[dict[str, Any]],
    good_rows: Iterable[tuple[int, np.ndarray]],
    splits: Mapping[int, str],
    policy: dict[str, Any],
) -> None:
    """Write and commit a shard: the results of all its rows, and in their order the good ones' spectrograms."""
    moments, first, writer = SplitMoments(), header.layout.rows_of_shard(shard)[0], None
    with ExitStack() as stack:
        for row, mel_TF in good_rows:
            if writer is None:
                writer = stack.enter_context(closing(ShardWriter(store, header.layout, shard)))
            writer.append_clip(row, mel_TF)
            moments.add_frames(
                splits[row], dequantise_mel(mel_TF[: results[row - first]["n_frames"]], header)
            )
        commit = ShardCommit(
            shard=shard,
            spec_id=header.spec.spec_id,
            plan_id=header.plan_id,
            sha256=hashlib.sha256().hexdigest() if writer is None else writer.finish_file(),
            size_bytes=0 if writer is None else writer.size_bytes,
            policy=policy,
            moments=moments.to_json(),
        )
        if writer is None:  # what lies there holds no good clip any more
            shard_path(store, shard).unlink(missing_ok=True)
        commit_shard(store, commit, pl.DataFrame(results, schema=RESULT_SCHEMA, orient="row"), writer)


@contextmanager
def _explaining_full_disk(store: Path, shard: int) -> Iterator[None]:
    """Say which shard found the disk full, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        raise StoreError(
            f"{store}: no space left for shard {shard}; free some and run the same command again: it carries on"
        ) from None


def compute_stored_row(audio: ClipAudio, header: StoreHeader) -> tuple[np.ndarray, dict[str, Any]]:
    """A clip as stored, `[T, F]`, and its result columns but for `source`."""
    spec = header.spec
    wave_S = audio.resample_wave(spec.sample_rate_hz)[: spec.clip_samples]
    clip_TF = log_mel(torch.from_numpy(wave_S)[None], spec)[0]
    frames = len(clip_TF)
    mel_TF = np.empty((header.layout.frames, header.layout.bands), header.layout.dtype)
    mel_TF[:frames] = quantise_mel(clip_TF, header).numpy()
    mel_TF[frames:] = quantise_mel(torch.tensor(spec.floor_log), header).numpy()
    error_N = (dequantise_mel(mel_TF[:frames], header) - clip_TF).flatten()
    return mel_TF, {
        "status": "good",
        "reason": None,
        "detail": None,
        "flags": list(audio.flags),
        "n_frames": frames,
        "codec": audio.codec,
        "rate_hz": audio.rate_hz,
        "channels": audio.channels,
        "seconds": audio.source_seconds,
        "peak_dbfs": audio.peak_dbfs,
        "rms_dbfs": audio.rms_dbfs,
        "digest": audio.digest,
        "error_rms_nat": math.sqrt(float(error_N.dot(error_N)) / len(error_N)),
        "error_max_nat": float(error_N.abs().max()),
        "crc32c": google_crc32c.value(mel_TF.tobytes()),
    }


def quantise_mel(mel: Tensor, header: StoreHeader) -> Tensor:
    """Log-mel as stored; uint8 keeps 0 for what is not there. Rounds as NumPy does, in a twentieth of its time."""
    if header.layout.dtype == "float16":
        return mel.half()
    return ((mel - header.offset) / header.scale).round().clamp(1, 255).to(torch.uint8)


def dequantise_mel(stored_TF: np.ndarray, header: StoreHeader) -> Tensor:
    """Stored values as log-mel, float32."""
    return torch.from_numpy(stored_TF).float().mul_(header.scale).add_(header.offset)


def union_of_policies(policy: AudioPolicy, old_policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """A policy that takes what either takes: rows of a shard may come from builds with different ones."""
    now = asdict(policy)
    return now if old_policy is None else {name: max(now[name], old_policy[name]) for name in now}
