"""What a user can cause, one class per exit code (documented in docs/cli.md). A message names the thing and the
remedy."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MAX_MESSAGE_LINES, LONGEST_LINE = 4, 300
LONGEST_PROBLEM = 2000  # characters
LIST_ALL = "--json lists all"


def shorten_line(line: str, most: int) -> str:
    """A line that can be read: what a user gave may be megabytes in one line. The cure, at the end, is kept."""
    return line if len(line) <= most else f"{line[: most - 105]} ... {line[-100:]}"


def wrap_line(line: str) -> list[str]:
    """A line as several of at most 300 characters, broken between words."""
    parts = []
    while len(line) > LONGEST_LINE:
        at = line.rfind(" ", LONGEST_LINE // 2, LONGEST_LINE)
        parts.append(line[: at if at > 0 else LONGEST_LINE])
        line = line[len(parts[-1]) :].lstrip()
    return [*parts, line]


def summarize_problems(problems: Sequence[str], list_all: str) -> str:
    """What has room in four lines of 300 characters: all of it, one problem a line, or else the beginning and end of
    the first problems, how many more there are, and what lists them."""
    shown = list(problems)
    if sum(len(wrap_line(line)) for line in shown) > MAX_MESSAGE_LINES:
        shown = [shorten_line(line, LONGEST_LINE) for line in shown]
    if len(shown) > MAX_MESSAGE_LINES:
        shown[MAX_MESSAGE_LINES - 1 :] = [f"... and {len(shown) - MAX_MESSAGE_LINES + 1:,} more; {list_all}"]
    return "\n".join(shown)


class QuestWarning(UserWarning):
    """What goes on in a plainer form than the user may expect, and why; commands show it as one line."""


class QuestError(ValueError):
    """Shown as one to four lines without a traceback; the process ends with `exit_code`.

    message: one problem a line, the worst first. problems: all of these lines; the message shows what has room.
    list_all: what lists them all, for whoever reads the message. came_first: of several processes that train together,
    this is the error that ended them all."""

    exit_code = 1
    came_first = False

    def __init__(self, message: object = "", *more: object, list_all: str = LIST_ALL):
        self.problems = tuple(shorten_line(line, LONGEST_PROBLEM) for line in str(message).splitlines())
        super().__init__(summarize_problems(self.problems, list_all) if isinstance(message, str) else message, *more)


class UsageError(QuestError):
    """A wrong option, key, type, range or combination."""

    exit_code = 2


class DataError(QuestError):
    """Input data or model files that cannot be used; the message names file and line."""

    exit_code = 3


class RowError(DataError):
    """A row that cannot be used; the others can. where: file:line. kind: a short name of the fault, under which rows
    are counted."""

    def __init__(self, where: str, kind: str, reason: str):
        super().__init__(f"{where}: {reason}")
        self.where, self.kind, self.reason = where, kind, reason


class GuardStop(QuestError):
    """A training guard stopped the run (too many non-finite steps, a run that cannot learn)."""

    exit_code = 4


class ResourceError(QuestError):
    """Out of memory or disk."""

    exit_code = 5


class MissingError(QuestError):
    """An optional package, a network or a device that is not there."""

    exit_code = 6


class BusyError(QuestError):
    """The run folder is in use by another process, or belongs to another run."""

    exit_code = 7


class PeerFailure(QuestError):
    """Another process of the run has failed, and this one ends with its exit code. shown: whether that process has
    shown its message."""

    def __init__(self, message: str, exit_code: int, shown: bool = True):
        super().__init__(message)
        self.exit_code, self.shown = exit_code, shown


@contextmanager
def tolerate_failure(what: str, log: Callable[[str], None]) -> Iterator[None]:
    """For what a run writes besides its result (a report, a plot): a failure is logged, and the run goes on."""
    try:
        yield
    except Exception as error:
        log(f"{what} could not be written, and is left out: {(str(error) or type(error).__name__).splitlines()[0]}")


class StoppedBySignal(KeyboardInterrupt):
    """A stop signal (SIGINT, SIGTERM, SIGHUP) ends the command. number: of the signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


EXIT_INTERRUPTED = 130
DISK_REMEDIES: dict[int, str] = {
    errno.ENOSPC: "no space is left on its disk; free some and run the command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
    errno.EFBIG: "the file grew larger than is allowed here (ulimit -f); raise the limit and run the command again",
    errno.EMFILE: "too many files are open in this process (ulimit -n); raise the limit and run the command again",
    errno.EROFS: "its file system can only be read; name another folder, or mount it for writing",
    errno.EIO: "its disk cannot be read or written (input/output error); look at the disk and run the command again",
    getattr(errno, "ESTALE", -1): "its network file system has lost it (stale file handle); mount it again and run the "
    "command again",
}
"""What is wrong with a disk, and what to do, by the system's error number."""
OUT_OF_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "not enough memory")


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that ends with this error: 1 for what is no user's error (docs/cli.md)."""
    if isinstance(error, QuestError | StoppedBySignal):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in DISK_REMEDIES):
        return ResourceError.exit_code
    return DataError.exit_code if isinstance(error, OSError) and error.filename is not None else 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is an out-of-memory error of Python, CUDA or the CPU allocator."""
    allocator_failed = isinstance(error, RuntimeError) and any(word in str(error) for word in OUT_OF_MEMORY_PHRASES)
    return isinstance(error, MemoryError) or allocator_failed


def import_extra(module: str, remedy: str) -> Any:
    """A module of a package that not every installation has. MissingError where it is not installed, or cannot be
    imported: packages that do not go together raise what they like (protobuf's TypeError under TensorBoard)."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except Exception as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = shorten_line(" ".join(f"{type(error).__name__}: {error}".split()), 200)
        state = "is not installed" if is_missing else f"is installed and cannot be imported ({reason})"
        raise MissingError(f"{package} {state}: {remedy}") from None


def install_command(name: str) -> str:
    """The remedy where a package of one of our extras is missing."""
    return f"pip install 'llm-quest[{name}]'"
