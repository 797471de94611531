"""Signal handling: SIGINT, SIGTERM and SIGHUP (a closed terminal) finish the step, save a checkpoint and stop; SIGUSR1
saves one and goes on.

A handler only sets a flag; the loop reads it between two steps. A step or an evaluation that goes on for
PATIENCE_SECONDS more (a long rollout) is given up, and the state before it is saved: a resumed run does it again, with
the same bits. A second signal ends the process at once: the checkpoints are safe, because one that is incomplete does
not have its name yet."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


def known_signals(*names: str) -> tuple[signal.Signals, ...]:
    """Those of these signals that this system has."""
    return tuple(getattr(signal, name) for name in names if name in dir(signal))


STOP_SIGNALS = known_signals("SIGINT", "SIGTERM", "SIGHUP")
SAVE_SIGNALS = known_signals("SIGUSR1")
PATIENCE_SECONDS = 3.0


class StepInterrupted(BaseException):
    """A step, or an evaluation, that was given up after a signal. Like KeyboardInterrupt it is no Exception, so that
    nothing on the way takes it for an error of its own."""


class SignalHandler:
    """`with SignalHandler() as signal_handler:` and then `signal_handler.stop_signal` (0 or its number) and
    `signal_handler.save_requested` (reset by whoever saves). Inside `signal_handler.interruptible()` a stop signal
    raises StepInterrupted after PATIENCE_SECONDS.

    echo_seconds: seconds after the first signal during which a second one is taken for its echo (torchrun passes
    Ctrl-C on, so that a worker receives it twice). Outside the main thread nothing is installed: Python allows it
    nowhere else. A signal that is ignored (SIGHUP under nohup) stays ignored."""

    def __init__(self, echo_seconds: float = 0.0):
        self.echo_seconds = echo_seconds
        self.stop_signal = 0
        self.save_requested = False
        self._first_signal_time = 0.0
        self._previous_handlers: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self._interruptible = self._out_of_patience = False

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in (*STOP_SIGNALS, *SAVE_SIGNALS) if signal.getsignal(n) is not signal.SIG_IGN]
            self._previous_handlers = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self, *, allowed: bool = True) -> Iterator[None]:
        """Work that may be given up: nothing that is saved has changed until it ends. allowed=False: never given up
        (one of several processes would leave the others waiting)."""
        self._interruptible = allowed
        try:
            yield
        finally:
            self._interruptible = False
            if self._timer is not None:
                self._timer.cancel()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._out_of_patience:
            self._out_of_patience = False
            if self._interruptible:
                raise StepInterrupted
        elif number not in STOP_SIGNALS:
            self.save_requested = True
        elif not self.stop_signal:
            self.stop_signal, self._first_signal_time = number, time.monotonic()
            write_stderr(f"\n{signal.Signals(number).name}: this step is finished and saved; once more ends at once\n")
            if self._interruptible:
                self._timer = threading.Timer(PATIENCE_SECONDS, self._give_up)
                self._timer.daemon = True
                self._timer.start()
        elif time.monotonic() - self._first_signal_time >= self.echo_seconds:
            os._exit(128 + number)

    def _give_up(self) -> None:
        """In the timer's thread: have the main thread run the handler once more."""
        self._out_of_patience = True
        _thread.interrupt_main(signal.SIGINT)


def write_stderr(text: str) -> None:
    """Write to standard error, past Python's buffer: a handler may interrupt a write to it, and that buffer is not
    reentrant (RuntimeError: reentrant call)."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
