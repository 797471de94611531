"""Writing checkpoints in the background: one thread, one checkpoint at a time; errors are raised in the training
loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


class CheckpointSaver:
    """`start(job)` runs a job that returns the folder it wrote; `take_result()` returns that folder once.

    A new save waits for the one before it. background=False writes at once, in the caller's thread."""

    def __init__(self, background: bool = True):
        self.background = background
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._pending: Future[Path] | None = None

    def close(self) -> None:
        """Wait for the running job."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def start(self, job: Callable[[], Path]) -> None:
        """Start a job. The result of the job before it has been taken (`take_result(wait=True)`)."""
        assert self._pending is None, "a checkpoint is still being written: ask done(wait=True) first"
        if self._pool is not None:
            self._pending = self._pool.submit(job)
            return
        self._pending = Future()
        try:
            self._pending.set_result(job())
        except Exception as error:
            self._pending.set_exception(error)

    def take_result(self, wait: bool = False) -> Path | None:
        """The folder written since the last call, if any; raises what the job raised."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        pending, self._pending = self._pending, None
        return pending.result()
