"""Loads functions and classes from a user's Python file, named `FILE.py:NAME`."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_quest.errors import UsageError


def split_reference(reference: str) -> tuple[Path, str]:
    """The file and the name of `FILE.py:NAME`. The file is resolved, so that it is found from any working directory."""
    file, colon, name = reference.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UsageError(
            f"{reference!r} names no function or class of a file; write FILE.py:NAME, like my_rewards.py:score"
        )
    return Path(file).resolve(), name


def check_reference(reference: str) -> str:
    """`FILE.py:NAME` with the whole path. UsageError where there is no such file, it is not Python, or nothing of that
    name is in it. The file is read and not run."""
    file, name = split_reference(reference)
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{file} is not Python: {error}") from None
    names = top_level_names(tree)
    if name not in names:
        raise UsageError(f"{file} has no {name!r}; it has {', '.join(names) or 'no names'}")
    return f"{file}:{name}"


def top_level_names(tree: ast.Module) -> list[str]:
    """The names that a module defines, assigns or imports, in its order."""
    defined: list[str] = []
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                defined.append(name)
            case ast.Assign(targets=targets):
                defined += [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                defined += [name.asname or name.name for name in names]
    return defined


def load_user_object(reference: str) -> Any:
    """Run the file and return what it has under the name. Modules beside the file can be imported from it."""
    file, name = split_reference(reference)
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def hash_user_code(reference: str) -> str:
    """sha256 of the file and of the modules beside it that it imports by name: what a resumed run may not change."""
    first, *others = find_imports(split_reference(reference)[0])
    digest = hashlib.sha256(first.read_bytes())
    for file in sorted(others):
        digest.update(f"\n{file.relative_to(first.parent)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def find_imports(file: Path) -> list[Path]:
    """The file, and the Python files below its folder that it imports, directly or through one another."""
    imported, waiting = list[Path](), [file]
    while waiting:
        current = waiting.pop()
        if current not in imported:
            imported.append(current)
            waiting += [one for name in iter_import_names(current) for one in module_files(file.parent, current, name)]
    return imported


def iter_import_names(file: Path) -> Iterator[str]:
    """The dotted names that a file imports, with the dots of a relative import."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):  # another process says so when it is run
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (module.removesuffix(".") + f".{name.name}" for name in node.names)


def module_files(root: Path, importer: Path, name: str) -> Iterator[Path]:
    """The files below `root` that an import of this name runs: those of the packages on its way, and its own."""
    level = len(name) - len(name.lstrip("."))
    home = importer.parents[min(level, len(importer.parents)) - 1] if level else root
    parts = [part for part in name.split(".") if part]
    for length in range(1, len(parts) + 1):
        place = home.joinpath(*parts[:length])
        candidates = place / "__init__.py", place.with_name(f"{place.name}.py")
        yield from (candidate for candidate in candidates if candidate.is_file() and candidate.is_relative_to(root))
