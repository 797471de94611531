"""Python files parsed once for all laws about source text: parsing the package is half a second, walking it as much."""

from __future__ import annotations

import ast
import functools
from pathlib import Path


@functools.cache
def parse_file(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@functools.cache
def nodes_of(file: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file, as `ast.walk` gives them."""
    return tuple(ast.walk(parse_file(file)))


@functools.cache
def package_files(folder: Path) -> tuple[Path, ...]:
    """The Python files below a folder, in one order."""
    return tuple(sorted(folder.rglob("*.py")))
