"""Labeled images of a folder with a sub-folder for each class: which files count, and what is said of the rest.

cat/1.png  cat/outside/2.jfif  cat/photo    images of `cat`, also in deeper folders; a file counts by its suffix,
                                            or by what it holds (as in `quest classify`)
cat/notes.txt  1.png                        no image, or outside of the classes: left out, counted and told
.thumbnails/  cat/._1.png  cat/.cache/      hidden: likewise
metadata.jsonl  metadata.csv                a table of labels, also several of an image (`image_labels.py`); the names
                                            of folders then say nothing
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llm_quest.data.batch import MULTI_LABEL
from llm_quest.data.document import DropReport
from llm_quest.data.image_datasets import ImageDataset, ImageSplits, split_images
from llm_quest.data.image_labels import (
    METADATA_FILES,
    LabeledImage,
    LabelOptions,
    encode_labels,
    find_label_table,
    read_label_table,
    resolve_label_names,
)
from llm_quest.data.images import IMAGE_SUFFIXES, ImageProcessor, is_image_file, load_pixels
from llm_quest.errors import DataError

HIDDEN, OUTSIDE, NO_IMAGE = "hidden files", "files outside of the class folders", "files that are no images"
MAX_LISTED_CLASSES = 5


def load_image_folder(
    path: str | Path,
    image_processor: ImageProcessor,
    held_out: float,
    drop_report: DropReport,
    validation: str | None = None,
    *,
    stratify: bool = True,
    options: LabelOptions | None = None,
) -> ImageSplits:
    """A folder with a sub-folder for each class, or a table of labels; or with folders `train` and `val` (or `test`) of
    such, which are then the two sides; or with another folder for validation. drop_report counts the files, and notes
    what is odd about the two sides."""
    options = options or LabelOptions()
    learned, other = find_sides(Path(path), validation)
    train = read_labeled_folder(learned, image_processor, drop_report, options)
    if other is None:
        sides = split_images(train, held_out, stratify=stratify)
    else:
        sides = ImageSplits(train, read_labeled_folder(other, image_processor, drop_report, options, like=train))
    for note in describe_sides(sides):
        drop_report.note(note)
    return sides


def find_sides(path: Path, validation: str | None = None) -> tuple[Path, Path | None]:
    """The folder of the training images, and that of the held-out ones where there is one: `validation`, or `val` or
    `test` beside `train`."""
    if not path.is_dir():
        raise DataError(f"{path} is no folder of images; expected a sub-folder for each class, or metadata.jsonl")
    if validation is not None:
        return path, Path(validation)
    inside = {entry.name: entry for entry in path.iterdir() if entry.is_dir()}
    other = inside.get("val", inside.get("test"))
    if find_label_table(path) is None and other is not None and "train" in inside:
        return inside["train"], other
    return path, None


def read_labeled_folder(
    path: Path,
    image_processor: ImageProcessor,
    drop_report: DropReport,
    options: LabelOptions,
    like: ImageDataset | None = None,
) -> ImageDataset:
    """The images of a folder with their labels. like: the training images, whose classes and problem type hold."""
    images = list_labeled_folder(path, drop_report, options, known=None if like is None else like.names)
    if like is not None:
        names, is_multi_label = like.names, like.is_multi_label
    elif find_label_table(path) is None:
        names, is_multi_label = tuple(dict.fromkeys(image.labels[0] for image in images)), options.is_multi_label
    else:
        names, problem_type = resolve_label_names(images, options)
        is_multi_label = problem_type == MULTI_LABEL
    pixels = load_pixels([image.file for image in images], image_processor)
    return ImageDataset(pixels, encode_labels(images, names, is_multi_label=is_multi_label), names)


def list_labeled_folder(
    path: Path, drop_report: DropReport, options: LabelOptions, known: Sequence[str] | None = None
) -> list[LabeledImage]:
    """The images of a folder, by its table of labels or by its sub-folders. known: the classes that there may be."""
    table = find_label_table(path)
    if table is not None:
        return list_table(table, options, drop_report)
    if options.columns or options.label_separator:
        raise DataError(
            f"{path} has no {' or '.join(METADATA_FILES)}, which data.columns and data.label_separator are for"
        )
    return list_class_images(path, drop_report, known)


def list_table(table: Path, options: LabelOptions, drop_report: DropReport) -> list[LabeledImage]:
    """The images that the table names; those beside it that it does not name are counted."""
    images = read_label_table(table, options, drop_report)
    named = {image.file.resolve() for image in images}
    kept = DropReport()
    for file in find_images(table.parent, kept):
        if file.resolve() not in named:
            drop_report.drop(f"images that {table.name} does not name", file_size(file))
    for one in images:
        drop_report.keep(file_size(one.file))
    return images


def list_class_images(path: Path, drop_report: DropReport, known: Sequence[str] | None) -> list[LabeledImage]:
    """Every image of every sub-folder, whose name is its class. known: the classes that there may be; None: any."""
    files = find_class_images(path, drop_report)
    if known is None and len(files) < 2:
        raise DataError(
            f"{path} has images in {len(files)} sub-folders; at least two classes are needed, one folder each, or a "
            "metadata.jsonl with file_name and label"
        )
    if unknown := [name for name in files if known is not None and name not in known]:
        raise DataError(f"{path} has the class {unknown[0]!r}, which the training images have not")
    if not files:
        raise DataError(f"{path} has no images in the folders of the classes; add some, or remove {path.name}")
    order = files if known is None else known
    return [LabeledImage(file, (name,)) for name in order for file in files.get(name, ())]


def find_class_images(path: Path, drop_report: DropReport) -> dict[str, list[Path]]:
    """Class -> its images, of every visible sub-folder that has any."""
    files_of_class: dict[str, list[Path]] = {}
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            files_of_class[entry.name] = list(find_images(entry, drop_report))
        else:
            inside = [Path(root) / name for root, _, names in os.walk(entry) for name in names]
            for file in inside if entry.is_dir() else [entry]:
                drop_report.drop(HIDDEN if entry.name.startswith(".") else OUTSIDE, file_size(file))
    return {name: files for name, files in files_of_class.items() if files}


def find_images(folder: Path, drop_report: DropReport) -> Iterator[Path]:
    """The images of a folder and of the folders in it, by name; what is none is counted."""
    files = sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)
    for file in files:
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            drop_report.drop(HIDDEN, file_size(file))
        elif file.suffix.lower() in IMAGE_SUFFIXES or is_image_file(file):
            drop_report.keep(file_size(file))
            yield file
        else:
            drop_report.drop(NO_IMAGE, file_size(file))


def file_size(file: Path) -> int:
    """Bytes; 0 for a link that leads nowhere."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def describe_sides(sides: ImageSplits) -> list[str]:
    """What is odd about the two sides: classes on one side alone, images that are on both, images of two classes."""
    what = "have other labels elsewhere" if sides.train.is_multi_label else "are in more than one class"
    each = [[side.label_names(index) for index in range(len(side))] for side in (sides.train, sides.held_out)]
    trained, held_out = (Counter(name for labels in side for name in labels) for side in each)
    marks = [
        [hashlib.sha256(image.tobytes()).digest() for image in side.pixels] for side in (sides.train, sides.held_out)
    ]
    both = sum(mark in set(marks[0]) for mark in marks[1]) if set(marks[0]) & set(marks[1]) else 0
    labels = {pair for side, own in zip(each, marks, strict=True) for pair in zip(own, side, strict=True)}
    shared = sum(count > 1 for count in Counter(mark for mark, _ in labels).values())
    return [
        *describe_classes(trained, held_out, "all images are held out, so that it is never learned"),
        *describe_classes(held_out, trained, "no image is held out, so that it is never measured"),
        *([f"{both:,} of {len(sides.held_out):,} held-out images are trained on too (equal pixels)"] if both else []),
        *([f"{shared:,} images {what} (equal pixels)"] if shared else []),
    ]


def describe_classes(there: Mapping[str, int], elsewhere: Mapping[str, int], what: str) -> list[str]:
    """A sentence about the classes that are elsewhere alone."""
    absent = [name for name in elsewhere if not there.get(name)]
    if not absent:
        return []
    listed = ", ".join(absent[:MAX_LISTED_CLASSES]) + (", ..." if len(absent) > MAX_LISTED_CLASSES else "")
    return [f"{len(absent)} of the classes ({listed}): {what}"]
