"""Corpus: the documents of one run. Without a network there is always the Python interpreter's own text.

    builtin:topics      pydoc's help topics: the language reference in English with code, about 0.5 MB
    builtin:docstrings  the standard library's docstrings, one document per module, about 2 MB
    builtin:source      the standard library's source, one document per module, about 12 MB
    builtin             topics and docstrings

All of it is under the PSF license. Another Python has another text: a corpus carries its Python version and its
sha256, and results are compared only within one hash. Tests are left out (some builds lack them), as are files written
at build time. A model that memorizes half a megabyte is not a language model: report the size with every result.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from llm_quest.data.document import Document, DropReport
from llm_quest.data.documents import read_documents, row_documents
from llm_quest.data.records import map_columns
from llm_quest.data.sources import HUB_PREFIX, DataSource, check_parts, is_saved_dataset, iter_source, split_function
from llm_quest.errors import DataError, MissingError, UsageError

EXCLUDED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "pydoc_data")
)


@dataclass(frozen=True)
class Corpus:
    """The documents of one run. name: as given in the recipe. python: the version whose text it is, None for the
    user's own data. sha256: of all texts in order. The documents are held in memory."""

    name: str
    documents: tuple[Document, ...]
    drop_report: DropReport
    sha256: str
    python: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(document.nbytes for document in self.documents)

    def as_json(self) -> dict[str, Any]:
        facts = {"name": self.name, "sha256": self.sha256, "documents": len(self.documents), "bytes": self.nbytes}
        return facts | {"python": self.python, "drop_report": self.drop_report.as_json()}

    def lines(self) -> list[str]:
        """The report as lines of text."""
        origin = f", text of Python {self.python}" if self.python else ""
        title = (
            f"{self.name}: {len(self.documents):,} documents, {self.nbytes:,} bytes, sha256 {self.sha256[:12]}{origin}"
        )
        return [title, *self.drop_report.lines()]


def load_corpus(
    source: str | Path | Sequence[DataSource],
    *,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
    strict: bool = False,
) -> Corpus:
    """The documents of `builtin`, `builtin:PART[,PART]`, a text file, a folder or rows (`data/sources.py`), or of
    several sources; each text once. columns: {"text": COLUMN} for rows whose text stands elsewhere. strict: DataError
    with all rows that cannot be used, in place of leaving them out. DataError where nothing is left, with the report
    that says why."""
    drop_report = DropReport()
    sources = [DataSource(str(source))] if isinstance(source, str | Path) else source
    name = ", ".join(one.path for one in sources)
    source_documents = chain.from_iterable(
        _read_source_documents(one, drop_report, columns or {}, separator) for one in sources
    )
    documents = _deduplicate(source_documents, drop_report)
    drop_report.require_rows(len(documents), name, strict=strict)
    if not documents:
        raise DataError(f"{name} holds no text: " + ("; ".join(drop_report.lines()[1:]) or "it is empty"))
    python = platform.python_version() if any(is_builtin(one.path) for one in sources) else None
    return Corpus(name, documents, drop_report, _corpus_hash(documents), python)


def is_builtin(path: str) -> bool:
    return path == "builtin" or path.startswith("builtin:")


def _read_source_documents(
    source: DataSource,
    drop_report: DropReport,
    columns: Mapping[str, str],
    separator: str | None,
) -> Iterator[Document]:
    check_parts(source)
    if is_builtin(source.path):
        documents = _read_builtin(source.path, drop_report)
    elif source.path.startswith(HUB_PREFIX) or split_function(source.path) is not None or is_saved_dataset(source.path):
        documents = row_documents(map_columns(iter_source(source, drop_report), columns, drop_report), drop_report)
    else:
        documents = read_documents(source.path, drop_report, columns=columns, separator=separator, split=source.split)
    return (replace(document, weight=source.weight) for document in documents)


def pydoc_topics() -> Iterator[Document]:
    """pydoc's help topics, by name."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError as error:
        raise MissingError("this Python comes without pydoc_data; use builtin:docstrings or your own text") from error
    for name in sorted(texts):
        yield Document(texts[name], f"pydoc_data.topics:{name}")


def stdlib_docstrings() -> Iterator[Document]:
    """One document per module: its docstring, then each class and function with its signature and docstring. Modules
    are parsed, never imported."""
    for file, name in stdlib_modules():
        if text := module_docstrings(file.read_bytes(), name):
            yield Document(text, f"docstrings:{name}")


def stdlib_source() -> Iterator[Document]:
    """One document per module of the standard library: its source as it stands on disk."""
    for file, name in stdlib_modules():
        yield Document(_read_source(file), f"source:{name}")


def module_docstrings(source: bytes, name: str) -> str:
    """The docstrings of a module's source, each after its name and signature; empty if it has none. The source is
    parsed, not run."""
    with pause_garbage_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        pieces = list(iter_docstrings(ast.parse(source), name))
    return "".join(f"{piece}\n\n" for piece in pieces)


BUILTIN_CORPORA: dict[str, Callable[[], Iterator[Document]]] = {
    "topics": pydoc_topics,
    "docstrings": stdlib_docstrings,
    "source": stdlib_source,
}


def builtin_parts(name: str) -> list[str]:
    """The parts that `builtin` or `builtin:topics,source` names. UsageError for a part that does not exist."""
    if name == "builtin":
        return ["topics", "docstrings"]
    names = [part.strip() for part in name.removeprefix("builtin:").split(",")]
    for part in names:
        if part not in BUILTIN_CORPORA:
            near = get_close_matches(part, BUILTIN_CORPORA, n=1)
            meant = f"; did you mean builtin:{near[0]}?" if near else ""
            raise UsageError(
                f"{name}: the built-in corpus has no part {part!r}; it has {', '.join(BUILTIN_CORPORA)}{meant}"
            )
    return list(dict.fromkeys(names))


def _read_builtin(name: str, drop_report: DropReport) -> Iterator[Document]:
    for document in chain.from_iterable(BUILTIN_CORPORA[part]() for part in builtin_parts(name)):
        if document.text.strip():
            drop_report.keep(document.nbytes)
            yield document
        else:
            drop_report.drop("empty", document.nbytes)


def _deduplicate(documents: Iterator[Document], drop_report: DropReport) -> tuple[Document, ...]:
    """Keep the first of each text; a later copy is counted as dropped."""
    seen: dict[str, Document] = {}
    for document in documents:
        if document.hash in seen:
            drop_report.kept = [drop_report.kept[0] - 1, drop_report.kept[1] - document.nbytes]
            drop_report.drop("copy of another document", document.nbytes)
        else:
            seen[document.hash] = document
    return tuple(seen.values())


def _corpus_hash(documents: tuple[Document, ...]) -> str:
    return hashlib.sha256("".join(document.hash for document in documents).encode()).hexdigest()


def stdlib_modules() -> list[tuple[Path, str]]:
    """Files of the standard library and their module names, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(file, file.relative_to(root)) for file in root.rglob("*.py")]
    wanted = [
        (f, p) for f, p in files if EXCLUDED_FOLDERS.isdisjoint(p.parts) and not p.name.startswith("_sysconfigdata")
    ]
    if not wanted:
        raise MissingError(f"the standard library's source is not at {root}; use builtin:topics or your own text")
    named = [(file, ".".join(path.with_suffix("").parts).removesuffix(".__init__")) for file, path in wanted]
    return sorted(named, key=lambda pair: pair[1])


def _read_source(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def iter_docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """'name(signature)', a blank line, the docstring, for the node and everything named inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and text.strip():
            arguments = (
                f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            )
            yield f"{name}{arguments}\n\n{inspect.cleandoc(text)}"
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from iter_docstrings(child, f"{name}.{child.name}")


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector: parsing is four times as fast, because a tree is many small objects that all stay
    alive."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
