"""Child processes that end with their parent, however it ends."""

from __future__ import annotations

import os
import signal
import threading
import time

WATCH_SECONDS = 0.5


def end_with_parent(parent: int, by_signal: bool = True) -> None:
    """Called in a child process: it ends as soon as process number `parent`, which started it, is gone.

    by_signal: use the parent-death signal where the system has one (Linux). Elsewhere, and besides it, a thread looks.

    Commonly got wrong: the signal comes when the *thread* that started the child ends, so a child that was started by a
    thread that may end first goes without it; and a thread of the child does not run while a call in C (a regular
    expression) holds the interpreter."""
    if by_signal and _request_death_signal():
        gone = os.getppid() != parent  # where there is such a signal, a child that has lost its parent gets another
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True, name="parent").start()
        gone = is_gone(parent)
    if gone:  # it ended before we asked
        os._exit(1)


def _request_death_signal() -> bool:
    """prctl(PR_SET_PDEATHSIG, SIGKILL); False where there is no such call."""
    import ctypes

    try:
        return ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) == 0  # type: ignore[no-any-return]
    except (OSError, AttributeError, TypeError):  # macOS, Windows
        return False


def is_gone(parent: int) -> bool:
    """Whether the parent has ended: a child that has lost it belongs to another process (not so on Windows)."""
    if os.getppid() != parent:
        return True
    import psutil

    return not psutil.pid_exists(parent)


def _watch_parent(parent: int) -> None:
    while not is_gone(parent):
        time.sleep(WATCH_SECONDS)
    os._exit(1)
