"""CheckpointWriter: checkpoints of a run are copied at their step and written by a thread while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor

from ajepa.training.checkpoints import Checkpoint, CheckpointScore
from ajepa.training.run import Run
from pipeline.loading.transfer import HostCopy


class CheckpointSnapshot:
    """A checkpoint as it is now, on its way to the host's memory; whatever changes afterwards is not in it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        self.precision = checkpoint.precision
        self._copies: dict[str, dict[str, HostCopy]] = {
            part: {name: HostCopy(value) for name, value in tensors.items()}
            for part, tensors in checkpoint.parts.items()
        }

    def wait(self) -> Checkpoint:
        """Wait for the copies; the checkpoint, on the CPU."""
        parts: dict[str, dict[str, Tensor]] = {
            part: {name: copy.wait() for name, copy in copies.items()}
            for part, copies in self._copies.items()
        }
        return Checkpoint(step=self.step, parts=parts, precision=self.precision)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one after the other, each by `Run.save_checkpoint`: whole or not at all.

    A kill on the way leaves the checkpoint before it. The end of the `with` block waits for the last one; an error in
    writing is raised there, by `raise_failure`, or by the next `start`.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def start(
        self, checkpoint: Checkpoint, *, keep: int, keep_every: int, score: CheckpointScore | None
    ) -> None:
        """Copy a checkpoint now, and begin to write it; waits until the one before is written."""
        self.wait()
        snapshot = CheckpointSnapshot(checkpoint)

        def write() -> None:
            self._run.save_checkpoint(snapshot.wait(), keep=keep, keep_every=keep_every, score=score)

        self._pending = self._thread.submit(write)

    def wait(self) -> None:
        """Wait until everything is written; RunError or OSError where it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def raise_failure(self) -> None:
        """Raise the error in writing, if there was one; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # What ends the run comes first, but a checkpoint that has been begun is finished.
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()
