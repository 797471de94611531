"""A file system that fails: inside `failing_files`, calls under a folder raise an error of the system from the n-th one
on, write less than they were given, take long, or end the process.

`open`, `os.open`, `os.write`, `os.fsync`, `os.replace`, `os.rename`, `os.mkdir`, `os.link`, `os.unlink`, `os.rmdir` and
the writes of every file that Python opened are replaced. Nothing is preloaded, so it works on every system; what a
library writes in C (`numpy.ndarray.tofile`) passes by, which is why tests/laws/test_writers.py forbids it."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CREATES = frozenset({"create", "write", "fsync", "mkdir", "rename", "link"})
CHANGES = CREATES | {"remove"}
ALL = CHANGES | {"read"}


@dataclass(frozen=True)
class Kind:
    """How calls fail. number: errno, 0 for none. hits: which calls. lasting: all from the n-th one on, or that one
    alone."""

    number: int
    hits: frozenset[str]
    lasting: bool = True


KINDS: dict[str, Kind] = {
    "ENOSPC": Kind(errno.ENOSPC, CREATES),
    "EDQUOT": Kind(errno.EDQUOT, CREATES),
    "EROFS": Kind(errno.EROFS, CHANGES),
    "ESTALE": Kind(errno.ESTALE, ALL),
    "EIO": Kind(errno.EIO, ALL),
    "EIO once": Kind(errno.EIO, CHANGES, lasting=False),
    "short": Kind(0, frozenset({"write"})),
    "slow": Kind(0, CHANGES, lasting=False),
    "kill": Kind(0, CHANGES, lasting=False),
}
ERRORS = [name for name, kind in KINDS.items() if kind.number]
SLOW_SECONDS = 0.05


@dataclass
class FailingFiles:
    """The state of a failing folder. first: the number of the first call that fails, from 0. calls: those counted so
    far; failures: those that failed."""

    root: str
    kind: str
    first: int
    calls: int = 0
    failures: int = 0
    descriptors: dict[int, str] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def is_under(self, path: Any) -> bool:
        if isinstance(path, int):
            return path in self.descriptors
        try:
            name = os.path.abspath(os.fsdecode(path))
        except (TypeError, ValueError):
            return False
        return name == self.root or name.startswith(self.root + os.sep)

    def call(self, operation: str, path: Any) -> bool:
        """Count a call and fail if it is to fail. True: a write is to be short."""
        kind = KINDS[self.kind]
        if operation not in kind.hits:
            return False
        with self.lock:
            number, self.calls = self.calls, self.calls + 1
        if number < self.first or (number > self.first and not kind.lasting):
            return False
        self.failures += 1
        if kind.number:
            name = None if isinstance(path, int) else os.fsdecode(path)
            raise OSError(kind.number, os.strerror(kind.number), *([name] if name else []))
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "slow":
            time.sleep(SLOW_SECONDS)
        return self.kind == "short"


class FailingRaw(io.FileIO):
    """A file whose writes are counted. Of what no longer fits on a full disk the first half is written, as systems do;
    the next write is the one that fails."""

    state: FailingFiles
    is_full = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            short = self.state.call("write", self.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(view) < 2 or self.is_full:
                raise
            self.is_full = short = True
        return super().write(view[: max(1, len(view) // 2)] if short else view) or 0

    def close(self) -> None:
        if not self.closed:
            self.state.descriptors.pop(self.fileno(), None)
        super().close()


def make_open(state: FailingFiles, real: Callable[..., Any]) -> Callable[..., Any]:
    """`open` for files under the folder, in Python's own layers."""

    def failing_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if isinstance(file, int) or not state.is_under(file):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not set(mode) & set("wxa+"):
            state.call("read", file)
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        state.call("create", file)
        raw = FailingRaw(file, mode.replace("b", "").replace("t", ""))
        raw.state = state
        state.descriptors[raw.fileno()] = os.fsdecode(file)
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    return failing_open


def make_os_calls(state: FailingFiles) -> dict[str, Callable[..., Any]]:
    """The calls of `os` that are replaced, by name."""
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "posix_fallocate")}

    def failing_os_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if not state.is_under(path):
            return real["open"](path, flags, *rest, **more)  # type: ignore[no-any-return]
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        state.call("create" if writes else "read", path)
        descriptor: int = real["open"](path, flags, *rest, **more)
        state.descriptors[descriptor] = os.fsdecode(path)
        return descriptor

    def failing_write(descriptor: int, data: Any) -> int:
        if state.is_under(descriptor) and state.call("write", descriptor):
            data = memoryview(data)[: max(1, len(data) // 2)]
        return real["write"](descriptor, data)  # type: ignore[no-any-return]

    def failing_fsync(descriptor: int) -> None:
        if state.is_under(descriptor):
            state.call("fsync", descriptor)
        real["fsync"](descriptor)

    def closing(descriptor: int) -> None:
        state.descriptors.pop(descriptor, None)
        real["close"](descriptor)

    def reserve(descriptor: int, *place: int) -> None:
        if state.is_under(descriptor):
            state.call("write", descriptor)
        real["posix_fallocate"](descriptor, *place)

    calls: dict[str, Callable[..., Any]] = {
        "posix_fallocate": reserve,
        "open": failing_os_open, "write": failing_write, "fsync": failing_fsync, "close": closing,
    }  # fmt: skip
    names = {"mkdir": "mkdir", "rename": "rename", "replace": "rename", "link": "link", "symlink": "link"}
    names |= {"unlink": "remove", "remove": "remove", "rmdir": "remove", "truncate": "write", "chmod": "create"}
    return calls | {name: make_path_call(state, name, operation) for name, operation in names.items()}


def make_path_call(state: FailingFiles, name: str, operation: str) -> Callable[..., Any]:
    real = getattr(os, name)

    def failing(*paths: Any, **more: Any) -> Any:
        inside = next((path for path in reversed(paths) if not isinstance(path, int) and state.is_under(path)), None)
        if inside is not None:
            state.call(operation, inside)
        return real(*paths, **more)

    return failing


@contextmanager
def failing_files(root: Path, kind: str, first: int) -> Iterator[FailingFiles]:
    """Inside, calls under a folder fail from the first-th on. For one thread that tests, and those that it starts."""
    state = FailingFiles(os.path.abspath(root), kind, first)
    replaced: list[tuple[Any, str, Any]] = []
    for name, call in make_os_calls(state).items():
        replaced.append((os, name, getattr(os, name)))
        setattr(os, name, call)
    opened = make_open(state, io.open)
    for module in (builtins, io):
        replaced.append((module, "open", module.open))  # type: ignore[attr-defined]
        module.open = opened  # type: ignore[attr-defined]
    try:
        yield state
    finally:
        for module, name, real in replaced:
            setattr(module, name, real)
