"""Exit codes and error messages. A failure is one to four lines on stderr and the exit code of its class (docs/cli.md):

0 done · 1 a bug in LLM Quest (traceback in crash.txt) · 2 usage or config · 3 input data or model files · 4 stopped by
a training guard · 5 out of memory or disk · 6 missing package, network or device · 7 run folder busy or of another
run · 130, 143 interrupted
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from llm_quest import __version__
from llm_quest.cli.output import print_json, print_status
from llm_quest.errors import (
    OUT_OF_DISK_ERRNOS,
    PeerFailure,
    QuestError,
    exit_code_of,
    is_out_of_memory,
)

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
        code, lines = describe_failure(error)
        for line in lines:
            print_status(line)
        if "--json" in sys.argv and lines and not isinstance(error, KeyboardInterrupt):
            print_json({"error": {"kind": type(error).__name__, "message": "\n".join(lines), "exit_code": code}})
        return code


def describe_failure(error: BaseException) -> tuple[int, list[str]]:
    """(exit code, lines to print) of a failure. Nothing is printed for one that another process of the run shows."""
    return exit_code_of(error), [] if is_shown_elsewhere(error) else failure_lines(error)


def failure_lines(error: BaseException) -> list[str]:
    """The message: cause, place, cure."""
    if isinstance(error, QuestError):
        return [f"quest: {line}" for line in str(error).splitlines()]
    if isinstance(error, KeyboardInterrupt):
        return ["quest: interrupted"]
    if is_out_of_memory(error):
        return [f"quest: out of memory: {first_line(error)}", *OUT_OF_MEMORY_REMEDIES]
    if isinstance(error, OSError) and error.errno in OUT_OF_DISK_ERRNOS:
        return [
            f"quest: no space left on the disk of {error.filename or 'the output'}; free some and run the command again"
        ]
    if isinstance(error, OSError) and error.filename is not None:
        return [f"quest: {error.filename}: {error.strerror}"]
    return [
        f"quest: a bug in LLM Quest: {type(error).__name__}: {first_line(error)}",
        f"the details are in {write_crash_file(error)}",
    ]


def is_shown_elsewhere(error: BaseException) -> bool:
    """Whether another process shows this: what it reported, or what every process of torchrun finds by itself before
    they have met (a wrong key, a file that is not there)."""
    if isinstance(error, PeerFailure):
        return error.shown
    alone = os.environ.get("LOCAL_RANK", "0") == "0"
    return isinstance(error, QuestError) and not error.came_first and not alone


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["(no message)"])[0][:300]


def write_crash_file(error: BaseException) -> Path:
    """Write the traceback to the working folder, or else to the temporary folder. It contains no variables and no
    environment."""
    head = f"quest {__version__}, python {platform.python_version()}, {platform.platform()}\n\n"
    text = head + "".join(traceback.format_exception(error))
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            (folder / "crash.txt").write_text(text, encoding="utf-8", errors="replace")
            return folder / "crash.txt"
        except OSError:
            continue
    return Path("crash.txt (which could not be written)")
