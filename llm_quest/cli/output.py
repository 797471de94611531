"""What is printed: results on stdout (as lines, or as one JSON document), everything said along the way on stderr.

Text that a model wrote or a stranger's file holds is cleaned before it reaches a terminal: escape sequences can
rewrite one, and bidirectional overrides make text read as what it is not.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TextIO

UNSAFE_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 but for tab and newline
    "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff"  # bidirectional marks and overrides, odd line ends
    "\ud800-\udfff\U000e0000-\U000e007f]"  # lone surrogates and the invisible tag characters
)


class Printable(Protocol):
    """A finding that can be read by people and by programs."""

    def lines(self) -> list[str]: ...

    def as_json(self) -> Any: ...


def clean_text(text: str) -> str:
    """The text without characters that command a terminal; carriage returns become line ends."""
    return UNSAFE_CHARACTERS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def open_streams() -> None:
    """A stream that was closed before we began (`quest ... >&-`, a service without a console) is the null device, and a
    character that a stream cannot encode is written as a question mark: neither ends a command."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


PLAINER = str.maketrans(
    {"│": "|", "├": "|", "─": "-", "┃": "|", "┣": "|", "━": "-", "▶": ">", "◀": "<", "┢": "+", "┡": "+", "⊕": "+"}
    | {"→": "->", "×": "x", "±": "+-", "·": "-", "é": "e", "…": "...", "≥": ">=", "≤": "<="}
)
"""What a picture is drawn with, for streams of few characters (LC_ALL=C, code page 1252)."""


def encodable(text: str, stream: TextIO) -> str:
    """The text with plainer characters where the stream cannot encode it, and question marks for the rest."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(PLAINER).encode(encoding, "replace").decode(encoding)
    return text


def print_status(text: str = "") -> None:
    """One line for people, on stderr."""
    print(encodable(clean_text(text), sys.stderr), file=sys.stderr, flush=True)


def discard_status(text: str = "") -> None:
    """What `--quiet` says."""


def status_printer(quiet: bool) -> Callable[[str], None]:
    """How to tell what happens."""
    return discard_status if quiet else print_status


def print_result(report: Printable, as_json: bool) -> None:
    """A finding on stdout."""
    if as_json:
        print_json(report.as_json())
    else:
        print_lines(report.lines())


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout."""
    for line in lines:
        print(encodable(clean_text(line), sys.stdout))
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """One JSON document on stdout; a number that JSON does not have (NaN, infinity) is null."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(replace_nonfinite(value), indent=2, ensure_ascii=not unicode, default=str)
    print(text.encode("utf-8", "replace").decode("utf-8"), flush=True)


def replace_nonfinite(value: Any) -> Any:
    """The same without NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): replace_nonfinite(item) for key, item in value.items()}
    return [replace_nonfinite(item) for item in value] if isinstance(value, list | tuple) else value
