"""Signal handling: SIGINT and SIGTERM finish the step, save a checkpoint and stop; SIGUSR1 saves one and goes on.

A handler only sets a flag; the loop reads it between two steps. A second SIGINT or SIGTERM ends the process at once:
the checkpoints are safe, because one that is incomplete does not have its name yet."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1",) if name in dir(signal))


class SignalHandler:
    """`with SignalHandler() as signal_handler:` and then `signal_handler.stop_signal` (0, 2 or 15) and
    `signal_handler.save_requested` (reset by whoever saves).

    echo_seconds: seconds after the first signal during which a second one is taken for its echo (torchrun passes
    Ctrl-C on, so that a worker receives it twice). Outside the main thread nothing is installed: Python allows it
    nowhere else."""

    def __init__(self, echo_seconds: float = 0.0):
        self.echo_seconds = echo_seconds
        self.stop_signal = 0
        self.save_requested = False
        self._first_signal_time = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                number: signal.signal(number, self._handle) for number in (*STOP_SIGNALS, *SAVE_SIGNALS)
            }
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number not in STOP_SIGNALS:
            self.save_requested = True
        elif not self.stop_signal:
            self.stop_signal, self._first_signal_time = number, time.monotonic()
            write_stderr(f"\n{signal.Signals(number).name}: this step is finished and saved; once more ends at once\n")
        elif time.monotonic() - self._first_signal_time >= self.echo_seconds:
            os._exit(128 + number)


def write_stderr(text: str) -> None:
    """Write to standard error, past Python's buffer: a handler may interrupt a write to it, and that buffer is not
    reentrant (RuntimeError: reentrant call)."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
