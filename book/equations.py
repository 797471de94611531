"""Equations of a page, and what their symbols mean. An equation is an indented line of a docstring with a sign of
equality or an arrow; the meanings are those of `book/symbols.yaml`."""

from __future__ import annotations

import functools
import re

import yaml

from book.catalog import Subject
from book.source import ROOT

SYMBOLS = ROOT / "book/symbols.yaml"
SIGN = re.compile(r"(?<![<>=!:])=(?!=)|<-|-->")
SYMBOL = re.compile(r"[A-Za-z]\w*'?")
WORDS = re.compile(r"\s{3,}")


def equation_lines(text: str) -> list[str]:
    """Indented lines with an equation, each cut at the remark behind it."""
    lines = (line for line in text.splitlines() if line.startswith("    ") and SIGN.search(line))
    return [found for line in lines if (found := cut_remarks(line))]


def cut_remarks(line: str) -> str:
    """The pieces of a line that hold an equation: those that wide gaps part it into."""
    return "   ".join(piece for piece in WORDS.split(line.strip()) if SIGN.search(piece))


@functools.cache
def read_symbols() -> tuple[frozenset[str], dict[str, dict[str, str]]]:
    """English words within equations; `everywhere` or a page's key -> symbol -> meaning."""
    found = yaml.safe_load(SYMBOLS.read_text(encoding="utf-8"))
    return frozenset(found.pop("words")), found


def symbols_in(text: str) -> list[str]:
    """What looks like a symbol in the equations of a text, in order."""
    return list(dict.fromkeys(one for line in equation_lines(text) for one in SYMBOL.findall(line)))


def meaning_of(symbol: str, page: dict[str, str], everywhere: dict[str, str]) -> str:
    """The meaning of a symbol: its own, or that of the longest name before its indices."""
    return next((known[name] for known in (page, everywhere) for name in names_of(symbol) if name in known), "")


def names_of(symbol: str) -> list[str]:
    """A symbol, without its prime, and without its indices: q_nope_h, q_nope, q."""
    parts = symbol.split("_")
    return [symbol, symbol.rstrip("'"), *("_".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))]


def symbol_rows(subject: Subject, text: str) -> list[tuple[str, str]]:
    """(symbol, meaning) of a page's equations; a meaning that nobody wrote is empty."""
    words, symbols = read_symbols()
    page, everywhere = symbols.get(subject.key, {}), symbols["everywhere"]
    found = [one for one in symbols_in(text) if one in page or one.rstrip("'") not in words]
    return [(one, meaning_of(one, page, everywhere)) for one in found]
