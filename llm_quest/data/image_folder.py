"""Labelled images of a folder with a sub-folder for each class: which files count, and what is said of the rest.

cat/1.png  cat/outside/2.jfif  cat/photo    images of `cat`, also in deeper folders; a file counts by its suffix,
                                            or by what it holds (as in `quest classify`)
cat/notes.txt  1.png                        no image, or outside of the classes: left out, counted and told
.thumbnails/  cat/._1.png  cat/.cache/      hidden: likewise
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from llm_quest.data.document import DropReport
from llm_quest.data.image_datasets import ImageDataset, ImageSplits, split_images
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
) -> ImageSplits:
    """A folder with a sub-folder for each class; or with folders `train` and `val` (or `test`) of such, which are
    then the two sides; or with another folder for validation. drop_report counts the files, and notes what is odd about
    the two sides."""
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is no folder of images; expected a sub-folder for each class")
    inside = {entry.name: entry for entry in path.iterdir() if entry.is_dir()}
    if validation is not None:
        train = read_class_folders(path, image_processor, drop_report)
        sides = ImageSplits(train, read_class_folders(Path(validation), image_processor, drop_report, train.names))
    elif (inside.keys() - {"train"}) & {"val", "test"} and "train" in inside:
        train = read_class_folders(inside["train"], image_processor, drop_report)
        other = inside.get("val", inside.get("test", path))
        sides = ImageSplits(train, read_class_folders(other, image_processor, drop_report, train.names))
    else:
        sides = split_images(read_class_folders(path, image_processor, drop_report), held_out, stratify=stratify)
    for note in describe_sides(sides):
        drop_report.note(note)
    return sides


def read_class_folders(
    path: Path, image_processor: ImageProcessor, drop_report: DropReport, class_names: Sequence[str] | None = None
) -> ImageDataset:
    """Every image of every sub-folder; class_names: the classes that must exist."""
    files = find_class_images(path, drop_report)
    if class_names is None and len(files) < 2:
        raise DataError(
            f"{path} has images in {len(files)} sub-folders; at least two classes are needed, one folder each"
        )
    class_names = tuple(files if class_names is None else class_names)
    if unknown := [name for name in files if name not in class_names]:
        raise DataError(f"{path} has the class {unknown[0]!r}, which the training images have not")
    if not files:
        raise DataError(f"{path} has no images in the folders of the classes; add some, or remove {path.name}")
    labels = [label for label, name in enumerate(class_names) for _ in files.get(name, ())]
    pixels = load_pixels([file for name in class_names for file in files.get(name, ())], image_processor)
    return ImageDataset(pixels, np.array(labels), class_names)


def find_class_images(path: Path, drop_report: DropReport) -> dict[str, list[Path]]:
    """Class -> its images, of every visible sub-folder that has any."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            found[entry.name] = list(find_images(entry, drop_report))
        else:
            inside = [Path(root) / name for root, _, names in os.walk(entry) for name in names]
            for file in inside if entry.is_dir() else [entry]:
                drop_report.drop(HIDDEN if entry.name.startswith(".") else OUTSIDE, file_size(file))
    return {name: files for name, files in found.items() if files}


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
    names = sides.train.names
    trained, held_out = (Counter(names[label] for label in side.labels) for side in (sides.train, sides.held_out))
    marks = [
        [hashlib.sha256(image.tobytes()).digest() for image in side.pixels] for side in (sides.train, sides.held_out)
    ]
    both = sum(mark in set(marks[0]) for mark in marks[1]) if set(marks[0]) & set(marks[1]) else 0
    labels = {(mark, int(label)) for side, own in zip((sides.train, sides.held_out), marks, strict=True)
              for mark, label in zip(own, side.labels, strict=True)}  # fmt: skip
    shared = sum(count > 1 for count in Counter(mark for mark, _ in labels).values())
    return [
        *describe_classes(trained, held_out, "all images are held out, so that it is never learned"),
        *describe_classes(held_out, trained, "no image is held out, so that it is never measured"),
        *([f"{both:,} of {len(sides.held_out):,} held-out images are trained on too (equal pixels)"] if both else []),
        *([f"{shared:,} images are in more than one class (equal pixels)"] if shared else []),
    ]


def describe_classes(there: Mapping[str, int], elsewhere: Mapping[str, int], what: str) -> list[str]:
    """A sentence about the classes that are elsewhere alone."""
    absent = [name for name in elsewhere if not there.get(name)]
    if not absent:
        return []
    listed = ", ".join(absent[:MAX_LISTED_CLASSES]) + (", ..." if len(absent) > MAX_LISTED_CLASSES else "")
    return [f"{len(absent)} of the classes ({listed}): {what}"]
