"""Runs code that may hang or crash in a process of its own, which can be killed.

Commonly got wrong: `signal.alarm` works in the main thread alone, and in others every answer silently becomes wrong; a
thread that hangs is never reclaimed; a time-out is not a wrong answer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from llm_quest.child_process import end_with_parent
from llm_quest.errors import GuardStop, UsageError

START_TIMEOUT_SECONDS = 60.0
MAX_FAILED_BATCHES = 5
SAFE_PATH = "llm-quest"
"""A value of PYTHONSAFEPATH by which it is known as ours."""

Handler = Callable[[Any], Any]
Setup = Callable[..., Handler]


class WorkerFailure(Exception):
    """A request without an answer. kind: exception, hang or crash. message: its cause."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind, self.message = kind, message


@dataclass
class FailureCounter:
    """Counts the failures of a user's code or of a service by kind, and logs the first of each kind. subject: what
    fails, as messages name it."""

    subject: str
    log: Callable[[str], None] = print
    counts: Counter[str] = field(default_factory=Counter)
    failed_batches: int = 0

    def count(self, kind: str, message: str) -> None:
        if not self.counts[kind]:
            self.log(f"{self.subject}, {kind}: {message}. Further failures of this kind are counted, not logged")
        self.counts[kind] += 1

    def end_batch(self, failed: bool, message: str) -> None:
        """Note whether a whole batch failed. GuardStop after MAX_FAILED_BATCHES in a row, with the newest message."""
        self.failed_batches = self.failed_batches + 1 if failed else 0
        if self.failed_batches >= MAX_FAILED_BATCHES:
            raise GuardStop(f"{self.subject} failed on {self.failed_batches} batches in a row: {message}")

    def summary(self) -> str:
        return describe_counts(self.counts)


def describe_counts(counts: Mapping[str, int]) -> str:
    """`crash: 1, hang: 2`; "" for no counts."""
    return ", ".join(f"{kind}: {number}" for kind, number in sorted(counts.items()))


class WorkerProcess:
    """`WorkerProcess(setup, *arguments).call(request, seconds)`: what `setup(*arguments)(request)` returns there.

    setup: a module's function, run once in the process; it returns the function that answers requests. A request that
    takes longer than its seconds, or that ends the process, raises WorkerFailure; the process is killed, and the next
    request starts another. What the code prints goes to stderr."""

    def __init__(self, setup: Setup, *arguments: Any):
        self.setup, self.arguments = setup, arguments
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Connection | None = None

    def call(self, request: Any, timeout_seconds: float) -> Any:
        """The answer to a request. WorkerFailure where there is none."""
        pipe = self.start()
        try:
            pipe.send(request)
            if pipe.poll(timeout_seconds):
                kind, answer = pipe.recv()
                if kind == "answer":
                    return answer
                raise WorkerFailure(kind, answer)
            failure = WorkerFailure("hang", f"it took longer than {timeout_seconds:g} s and was stopped")
        except (EOFError, BrokenPipeError, ConnectionResetError):
            failure = WorkerFailure("crash", "its process ended")
        self.close()
        raise failure

    def start(self) -> Connection:
        """Start the process, if none is running. UsageError where its setup fails."""
        if self._process is None or not self._process.is_alive():
            self.close()
            self._pipe, theirs = self._context.Pipe()
            is_main_thread = threading.current_thread() is threading.main_thread()
            self._process = self._context.Process(
                target=serve_requests, args=(theirs, self.setup, self.arguments, is_main_thread), daemon=True
            )
            with without_working_folder():
                self._process.start()
            theirs.close()
            self._require_ready()
        assert self._pipe is not None
        return self._pipe

    def _require_ready(self) -> None:
        assert self._pipe is not None
        message = f"it did not start within {START_TIMEOUT_SECONDS:g} s"
        try:
            if self._pipe.poll(START_TIMEOUT_SECONDS):
                kind, message = self._pipe.recv()
                if kind == "ready":
                    return
        except EOFError:
            message = "its process ended while it was loaded"
        self.close()
        raise UsageError(message)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def without_working_folder() -> Iterator[None]:
    """Inside, a Python that is started looks for no module in the working folder, which may hold code of others: a
    file multiprocessing.py there would be run."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ.setdefault("PYTHONSAFEPATH", SAFE_PATH)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]


def serve_requests(pipe: Connection, setup: Setup, arguments: tuple[Any, ...], by_signal: bool = True) -> None:
    """The main function of the process: set up, then answer until the pipe closes or the parent is gone. SIGINT is
    ignored, since the trainer handles it. by_signal: whether the main thread started it (`end_with_parent`)."""
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        end_with_parent(parent.pid, by_signal)
    if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:  # not for processes that the user's code starts
        del os.environ["PYTHONSAFEPATH"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr
    try:
        handler = setup(*arguments)
    except BaseException as error:
        pipe.send(("exception", describe_exception(error)))
        return
    pipe.send(("ready", ""))
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("answer", handler(request)))
        except BaseException as error:
            pipe.send(("exception", describe_exception(error)))


def describe_exception(error: BaseException) -> str:
    """The last line of the traceback, behind the innermost place that is not Python's own or a package's."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    last = traceback.format_exception_only(error)[-1].strip()
    place = innermost_place(error.__traceback__)
    return f"{place}: {last}" if place else last


def innermost_place(trace: TracebackType | None) -> str:
    """file:line of the deepest frame that is in no package; "" where there is none."""
    frames = [one for one in traceback.extract_tb(trace) if not is_package_file(one.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def is_package_file(filename: str) -> bool:
    package = "site-packages" in filename or filename.startswith(str(Path(__file__).parents[1]))
    return package or filename.startswith(("<", sys.base_prefix))
