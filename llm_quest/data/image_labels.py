"""Labels of images in a table beside them, as the imagefolder of `datasets` has it: metadata.jsonl or metadata.csv.

{"file_name": "a/1.png", "label": "cat"}              one label of each image
{"file_name": "a/2.png", "labels": ["cat", "dog"]}    any number of labels, also none

file_name is relative to the table's folder. An image that no row names, and a row without its image, are counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from llm_quest.data.batch import MULTI_LABEL
from llm_quest.data.document import DropReport
from llm_quest.data.images import is_file, is_image_file
from llm_quest.data.records import Record, TrackedRow, iter_records, map_columns, parse_rows
from llm_quest.data.text_classification import collect_label_names, parse_labels, problem_type_of
from llm_quest.errors import DataError, RowError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class LabelOptions:
    """How labels are read. columns: key (file_name, label, labels) -> the column that holds it. label_separator: splits
    a label of text into several. problem_type: transformers' name; None: several labels where a row has a list."""

    columns: Mapping[str, str] = field(default_factory=dict)
    label_separator: str | None = None
    problem_type: str | None = None

    @property
    def is_multi_label(self) -> bool:
        return self.problem_type == MULTI_LABEL


@dataclass(frozen=True)
class LabeledImage:
    """An image file and its labels. where: file:line. is_list: whether the row has a list of labels."""

    file: Path
    labels: tuple[str, ...]
    where: str = ""
    is_list: bool = False


def find_label_table(folder: Path) -> Path | None:
    """The table of a folder's labels, where there is one."""
    return next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)


def read_label_table(file: Path, options: LabelOptions, drop_report: DropReport) -> list[LabeledImage]:
    """The images that the table names. DataError where none of its rows can be used."""
    records = map_columns(iter_records(file, drop_report), options.columns, drop_report)
    parse = partial(parse_labeled_image, folder=file.parent, label_separator=options.label_separator)
    entries = parse_rows(records, parse, drop_report)
    drop_report.require_rows(len(entries), str(file))
    if not entries:
        raise DataError(f"{file} holds no rows")
    labels_of: dict[Path, set[tuple[str, ...]]] = defaultdict(set)
    for entry in entries:
        labels_of[entry.file].add(entry.labels)
    if twice := [image for image, labels in labels_of.items() if len(labels) > 1]:
        drop_report.note(f"{len(twice)} images have rows of different labels in {file.name}, such as {min(twice).name}")
    return entries


def parse_labeled_image(record: Record, *, folder: Path, label_separator: str | None) -> LabeledImage:
    """Parse one row. RowError where it names no image, or has no label."""
    row, where = TrackedRow.wrap(record.row), record.where
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise RowError(where, "no file_name", f"'file_name' is {name!r:.60}; expected an image of {folder}")
    key = next((key for key in ("labels", "label") if key in row), None)
    if key is None:
        has = ", ".join(map(repr, record.row))
        raise RowError(
            where, "no label", f"has the keys {has}; expected 'label' or 'labels' (data.columns renames one)"
        )
    if not is_file(folder / name):
        raise RowError(where, "an image that is missing", f"there is no {name!r:.200} in {folder}")
    if not is_image_file(folder / name):
        raise RowError(where, "a file that is no image", f"{name!r:.200} is no image")
    labels, is_list = parse_labels(row, key, where, label_separator)
    return LabeledImage(folder / name, labels, where, is_list)


def resolve_label_names(images: Sequence[LabeledImage], options: LabelOptions) -> tuple[tuple[str, ...], str]:
    """(the labels in order, the problem type) of training images."""
    return collect_label_names(images), problem_type_of(images, options.problem_type)


def encode_labels(images: Sequence[LabeledImage], names: Sequence[str], *, is_multi_label: bool) -> np.ndarray:
    """(N,) class numbers; multi-label: (N,C) of 0 and 1, float32. DataError for a label that the training images have
    not."""
    number = {name: i for i, name in enumerate(names)}
    targets = np.zeros((len(images), len(names)), dtype=np.float32)
    for row, image in enumerate(images):
        if unknown := [label for label in image.labels if label not in number]:
            raise DataError(f"{image.where}: has the label {unknown[0]!r}, which the training images have not")
        targets[row, [number[label] for label in image.labels]] = 1
    return targets if is_multi_label else targets.argmax(axis=1)
