"""Signal handling: SIGINT, SIGTERM and SIGHUP (a closed terminal) finish the step, save a checkpoint and stop; SIGUSR1
saves one and goes on.

A handler only sets a flag; the loop reads it between two steps. A step or an evaluation that goes on for
PATIENCE_SECONDS more (a long rollout) is given up, and the state before it is saved: a resumed run does it again, with
the same bits. Of several processes all give it up together (`train/failures.py`). A second signal ends the process at
once: the checkpoints are safe, because one that is incomplete does not have its name yet.

Outside of the loop (reading data, a tokenizer, an evaluation, an export) `end_on_signals` ends the command where it is:
what was being written is not there, and all before it is.

Commonly got wrong: Python runs a handler only when the main thread is back in Python. While it waits in a collective or
in a long product no handler runs; so a thread reads signals from a wakeup socket as well."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from llm_quest.errors import StoppedBySignal


def available_signals(*names: str) -> tuple[signal.Signals, ...]:
    """The signals of these names that this system has."""
    return tuple(getattr(signal, name) for name in names if name in dir(signal))


STOP_SIGNALS = available_signals("SIGINT", "SIGTERM", "SIGHUP")
SAVE_SIGNALS = available_signals("SIGUSR1")
PATIENCE_SECONDS = 3.0


class StepInterrupted(KeyboardInterrupt):
    """A step, or an evaluation, that was given up after a signal. It is no Exception, so that `except Exception` on the
    way does not catch it."""


class SignalHandler:
    """`with SignalHandler() as signal_handler:` and then `signal_handler.stop_signal` (0 or its number) and
    `signal_handler.save_requested` (reset by whoever saves). Inside `signal_handler.interruptible()` a stop signal
    raises StepInterrupted after PATIENCE_SECONDS.

    echo_seconds: seconds after the first signal during which a second one is taken for its echo (torchrun passes
    Ctrl-C on, so that a worker receives it twice). Outside the main thread nothing is installed: Python allows it
    nowhere else. A signal that is ignored (SIGHUP under nohup) stays ignored. announce: called with the signal when
    this process gives up, from another thread."""

    def __init__(self, echo_seconds: float = 0.0, announce: Callable[[int], None] = lambda number: None):
        self.echo_seconds, self.announce = echo_seconds, announce
        self.stop_signal = 0
        self.save_requested = False
        self._first_signal_time = 0.0
        self._previous_handlers: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self._interruptible = self._out_of_patience = self._has_given_up = False
        self._num_simulated = 0

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            handled = [n for n in (*STOP_SIGNALS, *SAVE_SIGNALS) if signal.getsignal(n) is not signal.SIG_IGN]
            self._previous_handlers = {number: signal.signal(number, self._handle) for number in handled}
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._read_signals, args=(reader,), daemon=True, name="signals").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._interruptible = False
        if self._previous_handlers:
            signal.set_wakeup_fd(self._previous_wakeup)
            self._writer.close()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    @contextlib.contextmanager
    def interruptible(self, *, allowed: bool = True) -> Iterator[None]:
        """Work that may be given up: nothing that is saved has changed until it ends, and no other process can complete
        the step without what comes after it. allowed=False: never given up (the last evaluation)."""
        self._interruptible = allowed
        try:
            if allowed and self._has_given_up:
                raise StepInterrupted
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._out_of_patience:
            self._out_of_patience = False
            if self._interruptible:
                raise StepInterrupted
        elif number not in STOP_SIGNALS:
            self.save_requested = True
        elif not self.stop_signal:
            self.stop_signal = number
            write_stderr(f"\n{signal.Signals(number).name}: this step is finished and saved; once more ends at once\n")

    def _read_signals(self, reader: socket.socket) -> None:
        """The thread that reads signals at once: starts the timer at the first, ends the process at the second."""
        with reader:
            while received := reader.recv(64):
                for number in received:
                    if number in STOP_SIGNALS and number in self._previous_handlers:
                        self._note_signal(number)

    def _note_signal(self, number: int) -> None:
        if self._num_simulated:
            self._num_simulated -= 1
        elif not self._first_signal_time:
            self._first_signal_time = time.monotonic()
            self._timer = threading.Timer(PATIENCE_SECONDS, self._give_up, (number,))
            self._timer.daemon = True
            self._timer.start()
        elif time.monotonic() - self._first_signal_time >= self.echo_seconds:
            os._exit(128 + number)

    def stop_with_peer(self, number: int) -> None:
        """Give up the step because another process of the run does. May be called from any thread."""
        if not self._has_given_up:
            self._give_up(number)

    def _give_up(self, number: int) -> None:
        """Make the main thread run the handler once more, from another thread. (For a signal that is not ignored:
        SIGINT is, behind `&` in a script, and would not interrupt it.)"""
        self.stop_signal = self.stop_signal or number
        self._has_given_up = self._out_of_patience = True
        self.announce(number)
        handled = [handler for handler in self._previous_handlers if handler in STOP_SIGNALS][:1]
        for one in handled:
            self._num_simulated += 1
            _thread.interrupt_main(signal.Signals(one))


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """Raise StoppedBySignal in the main thread at the first stop signal inside; for commands. The process ends with the
    signal's exit code at a second one, and where it is still there PATIENCE_SECONDS later: in a long call of C, or
    waiting for its threads. A handler that replaces this one meanwhile (the loop's, a server's) gets the signal
    instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = CommandSignals()
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler.raise_in_main_thread) for number in handled}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=handler.read_signals, args=(reader,), daemon=True, name="command signals").start()
    CURRENT.append(handler)
    try:
        yield
    finally:
        CURRENT.remove(handler)
        signal.set_wakeup_fd(previous_wakeup)
        writer.close()
        for number, action in previous.items():
            signal.signal(number, action)
        if handler.num_raised and handler.deadline is None:  # the other thread was late, and reads no more
            handler.note(handler.last_number)


class CommandSignals:
    """The handler of `end_on_signals`. deadline: the timer of the first signal, which goes on to the process's end.
    num_raised, num_read: signals so far, in the main thread and in the one that reads them."""

    def __init__(self) -> None:
        self.deadline: threading.Timer | None = None
        self.num_raised = self.num_read = self.last_number = 0

    def raise_in_main_thread(self, number: int, frame: FrameType | None) -> None:
        self.num_raised, self.last_number = self.num_raised + 1, number
        raise StoppedBySignal(number)

    def read_signals(self, reader: socket.socket) -> None:
        """The thread that reads signals at once, whatever the main thread does."""
        with reader:
            while received := reader.recv(64):
                for number in received:
                    if number in STOP_SIGNALS and signal.getsignal(number) == self.raise_in_main_thread:
                        self.note(number)

    def note(self, number: int) -> None:
        if self.deadline is not None:
            os._exit(128 + number)
        self.deadline = threading.Timer(PATIENCE_SECONDS, os._exit, (128 + number,))
        self.deadline.daemon = True
        self.deadline.start()
        self.num_read += 1

    def forget(self) -> None:
        """Cancel the deadline: the command goes on. Waits shortly for the reading thread, which may be later."""
        limit = time.monotonic() + 0.1
        while self.num_read < self.num_raised and time.monotonic() < limit:
            time.sleep(0.001)
        self.num_raised = self.num_read = 0
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


CURRENT: list[CommandSignals] = []
"""Of the command that runs."""


def continue_after_interrupt(error: KeyboardInterrupt) -> None:
    """Cancel the end of a command after Ctrl-C, which ends an answer of a chat and not the command. Any other signal is
    raised again."""
    if isinstance(error, StoppedBySignal) and error.exit_code != 128 + signal.SIGINT:
        raise error
    for handler in CURRENT:
        handler.forget()


def write_stderr(text: str) -> None:
    """Write to standard error, past Python's buffer: a handler may interrupt a write to it, and that buffer is not
    reentrant (RuntimeError: reentrant call)."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
