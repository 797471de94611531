"""Folders of data: the files below a folder that are read, and a count of those that are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm_quest.data.document import DropReport
from llm_quest.errors import DataError


def iter_files(folder: Path, drop_report: DropReport, top: Path | None = None) -> Iterator[Path]:
    """Regular files in sorted order; the report counts what is skipped."""
    inside = (top or folder).resolve()
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            drop_report.drop("hidden", file_size(entry))
        elif entry.is_symlink() and (entry.is_dir() or not entry.resolve().is_relative_to(inside)):
            drop_report.drop("link to a folder or out of it", 0)
        elif entry.is_dir():
            yield from iter_files(entry, drop_report, top or folder)
        elif entry.is_file():
            yield entry
        else:
            drop_report.drop("not a regular file", 0)


def file_size(entry: Path) -> int:
    return entry.stat().st_size if entry.is_file() else 0
