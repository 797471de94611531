"""Folders of data: the files below a folder that are read, and a count of those that are not.

Commonly got wrong: a folder as the hub has it (`data/train-00000.parquet`, `data/test-00000.parquet`) is read whole,
and the test rows are trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_quest.data.document import DropReport
from llm_quest.errors import DataError, UsageError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words in names of files and folders that say it, as the package `datasets` reads them."""
DATASET_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe a data set, of `datasets` and of LLaMA-Factory, and hold no rows."""


def iter_files(folder: Path, drop_report: DropReport, top: Path | None = None) -> Iterator[Path]:
    """Regular files in sorted order; the report counts what is skipped."""
    inside = (top or folder).resolve()
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            drop_report.drop("hidden", entry_size(entry))
        elif entry.is_symlink() and (entry.is_dir() or not entry.resolve().is_relative_to(inside)):
            drop_report.drop("link to a folder or out of it", 0)
        elif entry.is_dir():
            yield from iter_files(entry, drop_report, top or folder)
        elif entry.is_file():
            yield entry
        else:
            drop_report.drop("not a regular file", 0)


def entry_size(entry: Path) -> int:
    return entry.stat().st_size if entry.is_file() else 0


def find_split(file: Path, folder: Path) -> str | None:
    """The split that the name of a file says, or that of the nearest folder above it; None where none does."""
    for part in reversed(file.relative_to(folder).parts):
        words = set(re.split(r"[-._ 0-9]+", part.lower()))
        for split, names in SPLIT_WORDS.items():
            if words & set(names):
                return split
    return None


def select_split(files: Sequence[Path], folder: Path, split: str | None, drop_report: DropReport) -> list[Path]:
    """The files of a folder that belong to a split. split: None for `train` and what names no split, where there is a
    file of `train`, else all; the report counts the others and says how they are evaluated on. UsageError for a split
    that the folder does not have."""
    splits = {file: find_split(file, folder) for file in files}
    named = [name for name in SPLIT_WORDS if name in splits.values()]
    if split is not None and split not in named:
        has = f"it has {', '.join(named)}" if named else "none of its files is named after one; leave split out"
        raise UsageError(f"{folder} has no split {split!r}: {has}")
    wanted = {split} if split is not None else {"train", None} if "train" in named else {*named, None}
    for file in files:
        if splits[file] not in wanted:
            drop_report.drop(f"split {splits[file]}", entry_size(file))
    if split is None and (others := [name for name in named if name not in wanted]):
        drop_report.note(
            f"{folder}: the split train is read, {' and '.join(others)} is not; to evaluate on it: "
            f"data.validation='[{{path: {folder}, split: {others[0]}}}]'"
        )
    return [file for file in files if splits[file] in wanted]
