"""Output of the commands: results on stdout (as lines, or as one JSON document), progress on stderr.

Text from a model or from a file is cleaned before it is printed: escape sequences can rewrite a terminal, and
bidirectional overrides make text look like something else.
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
    """Print a line of progress on stderr."""
    print(make_encodable(clean_text(text), sys.stderr), file=sys.stderr, flush=True)


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
