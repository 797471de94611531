"""Reads docstrings and code from the package, so that no text of it is kept twice.

An anchor is `FILE` or `FILE:NAME`, such as `layers/norm.py:RMSNorm.forward`; FILE is relative to `llm_quest/`. A
missing file or name is an error that names the anchor."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llm_quest"
Definition = ast.FunctionDef | ast.ClassDef
GOT_WRONG = "Commonly got wrong:"


class AnchorError(ValueError):
    """An anchor that names no code."""


@dataclass(frozen=True)
class Code:
    """A piece of source. file: relative to `llm_quest/`; line: its first, counted from 1."""

    file: str
    line: int
    text: str


@functools.cache
def parse(file: str) -> tuple[str, ast.Module]:
    """The text and syntax tree of a file of the package."""
    path = PACKAGE / file
    if not path.is_file():
        raise AnchorError(f"{file}: no such file in llm_quest/")
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


def definitions(tree: ast.Module | ast.ClassDef) -> dict[str, Definition]:
    """Name -> function or class, of a module or of a class."""
    return {node.name: node for node in tree.body if isinstance(node, Definition)}


def find(anchor: str) -> tuple[str, Definition | ast.Module]:
    """The file of an anchor and its node."""
    file, _, name = anchor.partition(":")
    node: Definition | ast.Module = parse(file)[1]
    for part in name.split(".") if name else ():
        known = definitions(node) if not isinstance(node, ast.FunctionDef) else {}
        if part not in known:
            raise AnchorError(f"{anchor}: there is no {part!r}; known: {', '.join(known) or 'nothing'}")
        node = known[part]
    return file, node


def code_of(anchor: str) -> Code:
    """The source of an anchor, without its docstring."""
    file, node = find(anchor)
    lines = parse(file)[0].splitlines()
    if isinstance(node, ast.Module):
        first, last = 1, len(lines)
    else:
        first, last = min([node.lineno, *(one.lineno for one in node.decorator_list)]), node.end_lineno or node.lineno
    skipped = docstring_lines(node, lines)
    kept = [lines[number - 1] for number in range(first, last + 1) if number not in skipped]
    return Code(file, first, inspect.cleandoc("\n" + "\n".join(kept)).strip("\n"))


def docstring_lines(node: Definition | ast.Module, lines: list[str]) -> set[int]:
    """The numbers of the lines that a docstring takes, and of the empty ones behind it."""
    first = node.body[0] if node.body else None
    if ast.get_docstring(node) is None or first is None:
        return set()
    end = first.end_lineno or first.lineno
    while end < len(lines) and not lines[end].strip():
        end += 1
    return set(range(first.lineno, end + 1))


def docstring_of(anchor: str) -> str:
    """The docstring of an anchor, or nothing."""
    return ast.get_docstring(find(anchor)[1]) or ""


def paragraphs(text: str) -> list[str]:
    """Paragraphs, of which indented formulas are part of the one before."""
    return [part for part in re.split(r"\n\n(?! )", text) if part.strip()]


def split_mistakes(text: str) -> tuple[str, list[str]]:
    """A docstring without its "Commonly got wrong" sentences, and those, one each."""
    kept, found = [], []
    for part in paragraphs(text):
        before, mark, after = part.partition(GOT_WRONG)
        if before.strip():
            kept.append(before.rstrip())
        if mark:
            found += [
                one.strip() for one in re.split(r";\s+|(?<=[a-z0-9`)])\.\s+(?=[A-Za-z])", flat(after)) if one.strip()
            ]
    return "\n\n".join(kept), [one.rstrip(".") for one in found]


def opening_sentence(text: str) -> str:
    """The first sentence of a docstring, without the drawing or formula that follows it."""
    lines = itertools.takewhile(lambda line: line.strip() and not line.startswith("   "), text.lstrip().splitlines())
    return re.split(r"(?<!\bal)(?<!\bet)\. (?=[A-Z`]|\w+: )", flat(" ".join(lines)))[0].rstrip(".:")


def flat(text: str) -> str:
    """Text on one line."""
    return re.sub(r"\s+", " ", text).strip()


def mistakes_of(file: str) -> list[str]:
    """What is commonly got wrong, of a file: from its own docstring and those of its classes and functions."""
    tree = parse(file)[1]
    texts = [
        ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, (ast.Module, *Definition.__args__))
    ]
    return [one for text in texts for one in split_mistakes(text)[1]]


def papers_of(file: str) -> list[str]:
    """The arXiv numbers that a file names, in order."""
    return list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", parse(file)[0])))


def public_names(file: str) -> list[str]:
    """The public classes and functions of a file, classes first, in the order of the file."""
    found = [node for name, node in definitions(parse(file)[1]).items() if not name.startswith("_")]
    return [node.name for node in sorted(found, key=lambda node: isinstance(node, ast.FunctionDef))]
