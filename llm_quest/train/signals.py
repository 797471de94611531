"""What the street asks of a running training: SIGINT and SIGTERM finish the step, save and stop; SIGUSR1 saves and
goes on.

A handler only takes a note; the loop reads it between two steps. A second SIGINT or SIGTERM ends the process at once:
the checkpoints are safe, because one that is half-written has not yet got its name."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
SAVES = tuple(getattr(signal, name) for name in ("SIGUSR1",) if name in dir(signal))


class Signals:
    """`with Signals() as signals:` and then `signals.stop` (0, 2 or 15) and `signals.save` (taken down by whoever
    saves).

    patience: seconds after the first signal during which a second one is taken for its echo (torchrun passes Ctrl-C on,
    so that a worker hears it twice). Outside the main thread nothing is installed: Python allows it nowhere else."""

    def __init__(self, patience: float = 0.0):
        self.patience = patience
        self.stop = 0
        self.save = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in (*STOPS, *SAVES)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number not in STOPS:
            self.save = True
        elif not self.stop:
            self.stop, self._since = number, time.monotonic()
            tell(f"\n{signal.Signals(number).name}: this step is finished and saved; once more ends at once\n")
        elif time.monotonic() - self._since >= self.patience:
            os._exit(128 + number)


def tell(text: str) -> None:
    """To standard error, past Python's buffer: a handler may have come while a line was being written there, and that
    buffer is not entered twice (RuntimeError: reentrant call)."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
