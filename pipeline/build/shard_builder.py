"""The shard builder: decodes the clips of a block once, transforms them for every store, writes and commits shards.

The reason of a failed clip is a key of `FAILURE_REASONS` in pipeline/store/manifest.py. The reasons `missing` and
`duplicate` are set in this file; the decoder (pipeline/audio) and the worker processes (workers.py) set the others.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import polars as pl

from pipeline.audio.decode import AudioPolicy, ClipAudio, costing_the_clip_alone, load_clip_audio
from pipeline.audio.open_sound import OpenSound
from pipeline.audio.sources import SoundLocator
from pipeline.build.remote_store import RemoteStore
from pipeline.errors import AudioError, StoreError, UnexpectedAudioError
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

if TYPE_CHECKING:  # takes three seconds to import; a build with workers leaves it to them
    from torch import Tensor

# So many clips in a row that fail in the same unexpected way end a build.
MAX_UNEXPECTED_FAILURES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreTarget:
    """A store that a build fills: its folder on this machine, its header, and its remote side if it has one."""

    path: Path  # the staging folder if the store is at a URL
    header: StoreHeader
    remote_store: RemoteStore | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """One row to fill: the location of its sound, and the seconds of the sound that it takes."""

    row: int
    split: str
    start_seconds: float
    end_seconds: float
    locator: SoundLocator | None  # None: the corpus has no sound for the row
    duplicate: str | None  # why the row is a duplicate of another row; None if it is not


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTask:
    """The clips of one block, which is whole shards of every store, and the failures of rows that are not tried."""

    clips: tuple[PlannedClip, ...]
    known_failures: dict[int, tuple[str, str]] = field(default_factory=dict)  # row -> reason, detail

    def with_failed_row(self, row: int, reason: str, detail: str) -> "BlockTask":
        """Return the same task, in which `row` fails for `reason` without being decoded."""
        return replace(self, known_failures=self.known_failures | {row: (reason, detail)})


class UnexpectedFailures:
    """Counts clips in a row that fail in the same unexpected way: then not the clips are at fault."""

    def __init__(self) -> None:
        self._fault = ""
        self._count = 0

    def reset(self) -> None:
        """Begin to count again, after a clip that was decoded."""
        self._count = 0

    def count_failure(self, error: AudioError) -> None:
        """Count a failed clip; StoreError at MAX_UNEXPECTED_FAILURES in a row. Expected failures end a row."""
        fault = error.fault if isinstance(error, UnexpectedAudioError) else ""
        self._count = self._count + 1 if fault == self._fault else 1
        self._fault = fault
        if fault and self._count >= MAX_UNEXPECTED_FAILURES:
            raise StoreError(
                f"{self._count} clips in a row fail in the same way, so a library or this program is at fault, not "
                f"the clips; the last one: {error}. Nothing is lost: the same command carries on once it is mended, "
                "or once these sounds are moved away"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBuilder:
    """Turns blocks into committed shards of one or more stores of the same plan; each shard has one writer.

    A process has one builder for all its blocks, since the clips of a long sound may lie in several of them.
    """

    stores: tuple[StoreTarget, ...]
    policy: AudioPolicy
    unexpected: UnexpectedFailures = field(default_factory=UnexpectedFailures)
    open_sound: OpenSound = field(default_factory=OpenSound)

    def __call__(self, task: BlockTask) -> Iterator[int | None]:
        """Decode the block's clips and commit its shards; yields each row before trying it, then None before writing.

        Good rows are kept, and a shard in which no row changes is not written. Raises StoreError if a shard with good
        rows is damaged, because writing it again would give new checksums to damaged rows.
        """
        with ExitStack() as stack:
            open_shards = self._open_shards(task, stack)

            # Clips are decoded in the order of their archives and sounds, so that each is read from beginning to end.
            for clip in sorted(task.clips, key=_archive_order):
                takers = [shard for shard in open_shards if shard.needs_row(clip.row)]
                if takers:
                    yield clip.row
                    outcome = self._decode_clip(clip, task)
                    for shard in takers:
                        shard.add_clip(clip, outcome)

            # The shards are written in the order of their rows.
            yield None
            splits = {clip.row: clip.split for clip in task.clips}
            for shard in open_shards:
                shard.commit_changes(splits)

    def _open_shards(self, task: BlockTask, stack: ExitStack) -> "list[_OpenShard]":
        """Open the block's shards in every store; `stack` closes them."""
        first_row = task.clips[0].row
        last_row = task.clips[-1].row
        open_shards = []
        for store in self.stores:
            shard_clips = store.header.layout.shard_clips
            for number in range(first_row // shard_clips, last_row // shard_clips + 1):
                shard = _OpenShard(store, number, self.policy)
                open_shards.append(stack.enter_context(closing(shard)))
        return open_shards

    def _decode_clip(self, clip: PlannedClip, task: BlockTask) -> "ClipAudio | dict[str, Any]":
        """Return the clip's sound, or the result columns with the reason of the failure."""
        # Rows that fail without being decoded.
        if clip.duplicate is not None:
            return failure_result("duplicate", clip.duplicate)
        if clip.locator is None:
            return failure_result(
                "missing", "no sound for this id and start in the folders and archives that were given"
            )
        if clip.row in task.known_failures:
            return failure_result(*task.known_failures[clip.row], source=clip.locator.source)

        # The clip is decoded once for all stores, so the longest clip length of the stores is decoded.
        max_seconds = max(store.header.spec.clip_seconds for store in self.stores)
        seconds = min(clip.end_seconds - clip.start_seconds, max_seconds)
        try:
            audio = load_clip_audio(
                clip.locator,
                start_seconds=clip.start_seconds,
                end_seconds=clip.start_seconds + seconds,
                policy=self.policy,
                open_sound=self.open_sound,
            )
        except AudioError as error:
            self.unexpected.count_failure(error)
            return failure_result(error.reason, str(error), source=clip.locator.source)
        self.unexpected.reset()
        return audio


def _archive_order(clip: PlannedClip) -> tuple[str, int, int, int]:
    """Return a key that sorts clips by the location of their sounds: archive, row group, position in the row group."""
    locator = clip.locator
    if locator is None:
        return "", 0, 0, clip.row
    return locator.path, locator.group or 0, locator.row or locator.offset or 0, clip.row


class _OpenShard:
    """A shard that is being built; a temporary file holds its new spectrograms, each at the position of its row."""

    def __init__(self, store: StoreTarget, shard: int, policy: AudioPolicy) -> None:
        self.store = store
        self.shard = shard
        self.policy = policy
        self.rows = store.header.layout.rows_of_shard(shard)
        self._scratch_file: IO[bytes] | None = None

        # The old state of the shard: without a record, all of its rows are missing.
        self._old_commit: ShardCommit | None = None
        self._old_results = [failure_result("missing", "")] * len(self.rows)
        record = read_commit(store.path, shard)
        if record is not None:
            self._old_commit, results = record
            self._old_results = results.to_dicts()
        self._new_results = list(self._old_results)

        # Unfinished files of a process that died.
        for debris in shard_path(store.path, shard).parent.glob(f"*{PARTIAL_SUFFIX}"):
            debris.unlink()

    def close(self) -> None:
        """Discard the spectrograms that were not committed."""
        if self._scratch_file is not None:
            self._scratch_file.close()

    def needs_row(self, row: int) -> bool:
        """Return whether the row belongs to this shard and is not good yet."""
        return row in self.rows and self._old_results[row - self.rows[0]]["status"] != "good"

    def add_clip(self, clip: PlannedClip, outcome: "ClipAudio | dict[str, Any]") -> None:
        """Record the failure of a clip, or its spectrogram and results."""
        index = clip.row - self.rows[0]
        if not isinstance(outcome, ClipAudio):
            self._new_results[index] = outcome
            return

        assert clip.locator is not None
        try:
            with costing_the_clip_alone(clip.locator):
                mel_TF, result = compute_stored_row(outcome, self.store.header)
        except AudioError as error:
            self._new_results[index] = failure_result(error.reason, str(error), source=clip.locator.source)
            return
        self._new_results[index] = {"source": clip.locator.source} | result
        with _explaining_full_disk(self.store.path, self.shard):
            if self._scratch_file is None:
                self._scratch_file = tempfile.TemporaryFile(dir=self.store.path)  # noqa: SIM115  (closed by `close`)
            self._scratch_file.seek(index * mel_TF.nbytes)
            self._scratch_file.write(mel_TF.data)
            self._scratch_file.flush()

    def commit_changes(self, splits: Mapping[int, str]) -> None:
        """Write and push the shard and its record if a row has changed; `splits` maps each row to its split."""
        if self._old_commit is not None and self._new_results == self._old_results:
            return
        old_policy = None if self._old_commit is None else self._old_commit.policy
        policy = union_of_policies(self.policy, old_policy)
        with ExitStack() as stack, _explaining_full_disk(self.store.path, self.shard):
            good_rows = self._good_rows(stack)
            write_shard(
                self.store.path, self.store.header, self.shard, self._new_results, good_rows, splits, policy
            )
        if self.store.remote_store is not None:
            self.store.remote_store.push_shard(self.shard)

    def _good_rows(self, stack: ExitStack) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each good row and its spectrogram, new or from the old shard, in the order of the rows."""
        layout = self.store.header.layout
        reader: ShardReader | None = None
        results = zip(self.rows, self._old_results, self._new_results, strict=True)
        for index, (row, old_result, new_result) in enumerate(results):
            mel_TF = np.empty((layout.frames, layout.bands), layout.dtype)
            if old_result["status"] == "good":
                if reader is None:
                    reader = self._open_old_shard(stack)
                reader.read(np.array([row]), np.zeros(1, np.int64), mel_TF[None])
                yield row, mel_TF
            elif new_result["status"] == "good":
                assert self._scratch_file is not None
                self._scratch_file.seek(index * mel_TF.nbytes)
                self._scratch_file.readinto(mel_TF.data.cast("B"))  # type: ignore[attr-defined]
                yield row, mel_TF

    def _open_old_shard(self, stack: ExitStack) -> ShardReader:
        """Return a reader of the old shard, fetched if it is at a URL; StoreError if it does not match its record."""
        path, remote_store = self.store.path, self.store.remote_store
        folder = path
        if remote_store is not None:
            folder = stack.enter_context(remote_store.fetched_shard(self.shard))
        if self._old_commit is not None and shard_matches_commit(folder, self._old_commit):
            return ShardReader(partial(shard_path, folder), self.store.header.layout)

        # The advice depends on the location of the record that has to be deleted.
        record = ledger_path(path, self.shard)
        if remote_store is not None:
            raise StoreError(
                f"{remote_store.url}: shard {self.shard} is damaged; "
                f"delete {remote_store.file_url(record)} and build again"
            )
        raise StoreError(
            f"{path}: shard {self.shard} is damaged; "
            f"run: ajepa-data verify {path} --repair (or delete {record} and build again)"
        )


def write_shard(
    store: Path,
    header: StoreHeader,
    shard: int,
    results: Sequence[dict[str, Any]],
    good_rows: Iterable[tuple[int, np.ndarray]],
    splits: Mapping[int, str],
    policy: dict[str, Any],
) -> None:
    """Write and commit a shard: the results of all its rows, and the spectrograms of its good rows in their order."""
    first_row = header.layout.rows_of_shard(shard)[0]
    moments = SplitMoments()
    writer: ShardWriter | None = None
    with ExitStack() as stack:
        for row, mel_TF in good_rows:
            if writer is None:
                writer = stack.enter_context(closing(ShardWriter(store, header.layout, shard)))
            writer.append_clip(row, mel_TF)
            # Statistics are computed from the stored values, as a reader gets them, and only over valid frames.
            valid_TF = read_as_log_mel(mel_TF[: results[row - first_row]["n_frames"]], header)
            moments.add_frames(splits[row], valid_TF)

        # A shard without a good row has no file.
        sha256 = hashlib.sha256().hexdigest()
        size_bytes = 0
        if writer is not None:
            sha256 = writer.finish_file()
            size_bytes = writer.size_bytes
        else:
            shard_path(store, shard).unlink(missing_ok=True)

        commit = ShardCommit(
            shard=shard,
            spec_id=header.spec.spec_id,
            plan_id=header.plan_id,
            sha256=sha256,
            size_bytes=size_bytes,
            policy=policy,
            moments=moments.to_json(),
        )
        commit_shard(store, commit, pl.DataFrame(results, schema=RESULT_SCHEMA, orient="row"), writer)


@contextmanager
def _explaining_full_disk(store: Path, shard: int) -> Iterator[None]:
    """Turn the OSError of a full disk into a StoreError that names the shard and reports that nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        raise StoreError(
            f"{store}: no space left for shard {shard}; free some and run the same command again: it carries on"
        ) from None


def compute_stored_row(audio: ClipAudio, header: StoreHeader) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a clip as stored, `mel_TF` in the store's dtype, and its result columns without `source`."""
    import torch

    from pipeline.audio.mel import log_mel

    # From sound to log-mel.
    spec = header.spec
    wave_S = audio.resample_wave(spec.sample_rate_hz)[: spec.clip_samples]
    clip_TF = log_mel(torch.from_numpy(wave_S)[None], spec)[0]
    frames = len(clip_TF)

    # From log-mel to stored values; a short clip is followed by silence.
    mel_TF = np.empty((header.layout.frames, header.layout.bands), header.layout.dtype)
    mel_TF[:frames] = quantise_mel(clip_TF, header).numpy()
    mel_TF[frames:] = quantise_mel(torch.tensor(spec.floor_log), header).numpy()

    # The error of the stored values, as a reader gets them.
    error_N = (read_as_log_mel(mel_TF[:frames], header) - clip_TF).flatten()
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


def quantise_mel(mel: "Tensor", header: StoreHeader) -> "Tensor":
    """Return the log-mel as stored values; in uint8, 0 is reserved for absent clips.

    PyTorch rounds as NumPy does, 20 times as fast.
    """
    import torch

    if header.layout.dtype == "float16":
        return mel.half()
    return ((mel - header.offset) / header.scale).round().clamp(1, 255).to(torch.uint8)


def read_as_log_mel(stored: np.ndarray, header: StoreHeader) -> "Tensor":
    """Return `header.to_log_mel(stored)`, bit for bit; PyTorch converts float16 six times as fast as NumPy."""
    import torch

    return torch.from_numpy(stored).float() * header.scale + header.offset


def union_of_policies(policy: AudioPolicy, old_policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a policy that accepts every clip that either policy accepts.

    A shard has a single policy in its record, but builds with different policies may have filled its rows.
    """
    accepted = asdict(policy)
    if old_policy is None:
        return accepted
    return {name: max(value, old_policy[name]) for name, value in accepted.items()}
