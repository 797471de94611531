"""Output of the commands: results on stdout (as lines, or as one JSON document), progress on stderr.

Text from a model or from a file is cleaned before it is printed: escape sequences can rewrite a terminal, and
bidirectional overrides make text look like something else.

A failure is one to four lines on stderr and the exit code of its class (docs/cli.md):

0 done · 1 a bug in LLM Quest (traceback in crash.txt) · 2 usage or config · 3 input data or model files · 4 stopped by
a training guard · 5 out of memory or disk · 6 missing package, network or device · 7 run folder busy or of another
run · 130, 143 interrupted
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from llm_quest import __version__
from llm_quest.errors import (
    DISK_REMEDIES,
    PeerFailure,
    QuestError,
    QuestWarning,
    exit_code_of,
    import_extra,
    install_command,
    is_out_of_memory,
    shorten_line,
    wrap_line,
)
from llm_quest.files import atomic_write_text
from llm_quest.progress import Heartbeat, is_terminal, wants_color, write_line

UNSAFE_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 but for tab and newline
    "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff"  # bidirectional marks and overrides, odd line ends
    "\ud800-\udfff\U000e0000-\U000e007f]"  # lone surrogates and the invisible tag characters
)


@contextmanager
def show_progress(quiet: bool = False) -> Iterator[None]:
    """Show phases and training runs on stderr inside the block, in the main process."""
    if quiet or os.environ.get("RANK", "0") != "0":
        yield
    elif is_terminal(sys.stderr):
        from llm_quest.train.terminal_display import TerminalDisplay

        with TerminalDisplay.open():
            yield
    else:
        with Heartbeat():
            yield


class Printable(Protocol):
    """A result that can be printed as lines or as JSON."""

    def lines(self) -> list[str]: ...

    def as_json(self) -> Any: ...


def clean_text(text: str) -> str:
    """Remove control characters and bidirectional overrides; carriage returns become line ends."""
    return UNSAFE_CHARACTERS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def open_streams() -> None:
    """Make stdout and stderr safe to write to: a stream that is closed (`quest ... >&-`, a service without a console)
    becomes the null device, and a character that a stream cannot encode becomes a question mark."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


ASCII_SUBSTITUTES = str.maketrans(
    {"│": "|", "├": "|", "─": "-", "┃": "|", "┣": "|", "━": "-", "▶": ">", "◀": "<", "┢": "+", "┡": "+", "⊕": "+"}
    | {"→": "->", "×": "x", "±": "+-", "·": "-", "é": "e", "…": "...", "≥": ">=", "≤": "<="}
)
"""Substitutes of the diagrams' characters, for streams that cannot encode them (LC_ALL=C, code page 1252)."""


def make_encodable(text: str, stream: TextIO) -> str:
    """The text with substitutes for characters that the stream cannot encode, and question marks for the rest."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(ASCII_SUBSTITUTES).encode(encoding, "replace").decode(encoding)
    return text


def print_status(text: str = "") -> None:
    """Print progress on stderr, as lines."""
    for line in make_encodable(clean_text(text), sys.stderr).split("\n"):
        write_line(line)


def show_warnings() -> None:
    """Print a `QuestWarning` as one line on stderr, in the main process alone; others are shown as before."""
    show_others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, QuestWarning):
            show_others(message, category, *place, **more)
        elif os.environ.get("RANK", "0") == "0":
            print_status(f"warning: {message}")

    warnings.showwarning = show


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    return shlex.join(["quest", *sys.argv[1:]])


def discard_status(text: str = "") -> None:
    """Print nothing (`--quiet`)."""


def status_printer(quiet: bool) -> Callable[[str], None]:
    """The function that prints progress."""
    return discard_status if quiet else print_status


def print_result(report: Printable, as_json: bool) -> None:
    """Print a result on stdout."""
    if as_json:
        print_json(report.as_json())
    else:
        print_lines(report.lines())


class ColorPrintable(Protocol):
    """A result of our own text, which can have colors."""

    def lines(self, *, color: bool = False) -> list[str]: ...

    def as_json(self) -> Any: ...


def print_colored_result(report: ColorPrintable, as_json: bool) -> None:
    """Print a result on stdout, with colors where that is a terminal. Its text is clean already: the colors are
    escape sequences, which `print_lines` would remove."""
    if as_json or not wants_color(sys.stdout):
        print_result(report, as_json)
    else:
        print("\n".join(report.lines(color=True)))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout."""
    for line in lines:
        print(make_encodable(clean_text(line), sys.stdout))
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print one JSON document on stdout. NaN and infinity, which JSON does not have, become null."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(replace_nonfinite(value), indent=2, ensure_ascii=not unicode, default=str)
    print(text.encode("utf-8", "replace").decode("utf-8"), flush=True)


def replace_nonfinite(value: Any) -> Any:
    """The value with NaN and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): replace_nonfinite(item) for key, item in value.items()}
    return [replace_nonfinite(item) for item in value] if isinstance(value, list | tuple) else value


OUT_OF_MEMORY_REMEDIES = (
    "cheapest remedies: fewer rows at once (micro_batch_size=1; grpo, iterative and rpt: micro_batch_tokens=512; the",
    "result stays the same), activation checkpointing (gradient_checkpointing=true), shorter rows",
)


def run_with_exit_code(command: Callable[[], int | None]) -> int:
    """Run a command; its exit code. With `--json` among the arguments a failure is also printed as JSON on stdout."""
    try:
        return command() or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        # The reader of our output has closed it (`quest models | head`); python would fail again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        code, lines = explain_failure(error)
        for line in lines:
            print_status(line)
        if "--json" in sys.argv and lines and not isinstance(error, KeyboardInterrupt):
            problems = {"problems": error.problems} if isinstance(error, QuestError) else {}
            with suppress(OSError):  # the words are on stderr: stdout may be what has failed
                print_json(failure_json(type(error).__name__, "\n".join(lines), code, **problems))
        return code


def failure_json(kind: str, message: str, exit_code: int, **more: Any) -> dict[str, Any]:
    """A failure as `--json` shows it."""
    return {"error": {"kind": kind, "message": message, "exit_code": exit_code, **more}}


def explain_failure(error: BaseException) -> tuple[int, list[str]]:
    """(exit code, lines to print) of a failure. Nothing is printed for one that another process of the run shows."""
    return exit_code_of(error), [] if is_shown_elsewhere(error) else failure_lines(error)


def failure_lines(error: BaseException) -> list[str]:
    """The lines of a message: cause, place, remedy."""
    if isinstance(error, QuestError):
        return [f"quest: {part}" for line in str(error).splitlines() for part in wrap_line(line)]
    if isinstance(error, KeyboardInterrupt):
        return ["quest: interrupted"]
    if is_out_of_memory(error):
        return [f"quest: out of memory: {first_message_line(error)}", *OUT_OF_MEMORY_REMEDIES]
    if isinstance(error, OSError) and error.errno in DISK_REMEDIES:
        return [shorten_line(f"quest: {one_line(error.filename or 'the output')}: {DISK_REMEDIES[error.errno]}", 300)]
    if isinstance(error, OSError) and error.filename is not None:
        return [shorten_line(f"quest: {one_line(error.filename)}: {error.strerror}", 300)]
    return [
        f"quest: a bug in LLM Quest: {type(error).__name__}: {first_message_line(error)}",
        f"the details are in {write_crash_file(error)}",
    ]


def is_shown_elsewhere(error: BaseException) -> bool:
    """Whether another process shows this: what it reported, or what every process of torchrun finds by itself before
    they have met (a wrong key, a file that is not there)."""
    if isinstance(error, PeerFailure):
        return error.shown
    alone = os.environ.get("LOCAL_RANK", "0") == "0"
    return isinstance(error, QuestError) and not error.came_first and not alone


def one_line(name: object) -> str:
    """A file's name, which may hold line ends."""
    return " ".join(str(name).split("\n"))


def first_message_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["(no message)"])[0][:300]


def write_crash_file(error: BaseException) -> Path:
    """Write the traceback to the working folder, or else to the temporary folder. It contains no variables and no
    environment."""
    head = f"quest {__version__}, python {platform.python_version()}, {platform.platform()}\n\n"
    text = head + "".join(traceback.format_exception(error))
    text = text.encode(errors="replace").decode()
    with suppress(OSError):
        atomic_write_text(Path.cwd() / "crash.txt", text)
        return Path.cwd() / "crash.txt"
    with suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix="llm-quest-crash-", suffix=".txt")  # nobody can foresee its name
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        return Path(name)
    return Path("crash.txt (which could not be written)")


def require_extra(name: str, *packages: str) -> None:
    """MissingError where packages of an extra of this project are not installed, or cannot be imported."""
    for package in packages:
        import_extra(package, install_command(name))
