"""Folders of labeled images: which files count, and the report on the others and on classes of one part alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llm_quest.data.document import DropReport
from llm_quest.data.image_datasets import ImageDataset, ImageSplits
from llm_quest.data.image_folder import describe_sides, load_image_folder
from llm_quest.data.images import ImageProcessor
from llm_quest.errors import DataError

PREPROCESS = ImageProcessor(8)


def read(path: Path) -> ImageSplits:
    return load_image_folder(path, PREPROCESS, 0.3, DropReport())


def paint(path: Path, brightness: int, number: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        Image.fromarray(np.full((5, 7), brightness + i, dtype=np.uint8)).save(path / f"{i}.png")


def test_a_folders_sub_folders_are_its_classes(tmp_path: Path):
    paint(tmp_path / "dark", 10, 20)
    paint(tmp_path / "light", 200, 20)
    sides = read(tmp_path)
    assert sides.train.names == ("dark", "light")
    assert len(sides.train) + len(sides.held_out) == 40
    for side in (sides.train, sides.held_out):
        assert ((side.pixels.mean(axis=(1, 2, 3)) > 100) == side.labels).all()


def test_which_files_are_images_of_a_class_and_what_is_counted_of_the_rest(tmp_path: Path):
    """The law of a folder: an image counts wherever it lies below its class and whatever its name ends in; everything
    else is counted by its reason."""
    for number, name in enumerate(("cat", "dog", ".ipynb_checkpoints", "__MACOSX")):
        paint(tmp_path / name, 30 * number, 20)
    for file in (tmp_path / "__MACOSX").iterdir():
        file.rename(file.with_name(f"._{file.name}"))
    paint(tmp_path / "cat" / "outside" / "at night", 200, 3)
    paint(tmp_path / "cat" / ".thumbnails", 200, 4)
    (tmp_path / "cat" / "._0.png").write_bytes(b"of another system")
    for number, name in enumerate(("a.JFIF", "without a suffix", "c.data")):
        Image.fromarray(np.full((5, 7), 150 + number, dtype=np.uint8)).save(tmp_path / "dog" / name, "PNG")
    (tmp_path / "dog" / "notes.txt").write_text("they are nice")
    (tmp_path / "labels.csv").write_text("0.png,cat")
    report = DropReport()
    sides = load_image_folder(tmp_path, PREPROCESS, 0.3, report)
    assert sides.train.names == ("cat", "dog")
    assert len(sides.train) + len(sides.held_out) == report.kept[0] == 46
    assert {reason: count for reason, (count, _) in report.dropped.items()} == {
        "hidden files": 45,
        "files that are no images": 1,
        "files outside of the class folders": 1,
    }
    assert not report.notes


def test_what_is_odd_about_the_two_sides_is_told_with_numbers(tmp_path: Path):
    paint(tmp_path / "train" / "a", 10, 6)
    paint(tmp_path / "train" / "b", 99, 6)
    paint(tmp_path / "train" / "c", 150, 2)
    paint(tmp_path / "val" / "a", 14, 4)  # two of them are the last of train/a
    paint(tmp_path / "val" / "b", 200, 1)
    Image.fromarray(np.full((5, 7), 10, dtype=np.uint8)).save(tmp_path / "train" / "b" / "again.png")
    report = DropReport()
    load_image_folder(tmp_path, PREPROCESS, 0.3, report)
    assert report.notes == [
        "1 of the classes (c): no image is held out, so that it is never measured",
        "2 of 5 held-out images are trained on too (equal pixels)",
        "1 images are in more than one class (equal pixels)",
    ]
    assert report.remarks() == report.notes


def test_classes_on_one_side_alone_are_named():
    pixels = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 3, 2, 2)
    names = ("a", "b", "c")
    sides = ImageSplits(
        ImageDataset(pixels[:2], np.array([0, 0]), names), ImageDataset(pixels[2:], np.array([1, 2]), names)
    )
    assert describe_sides(sides) == [
        "2 of the classes (b, c): all images are held out, so that it is never learned",
        "1 of the classes (a): no image is held out, so that it is never measured",
    ]


def test_a_linked_folder_is_a_class_and_a_link_to_nowhere_is_no_image(tmp_path: Path):
    paint(tmp_path / "elsewhere", 10, 20)
    paint(tmp_path / "images" / "b", 200, 20)
    (tmp_path / "images" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "b" / "gone").symlink_to(tmp_path / "nowhere")
    assert read(tmp_path / "images").train.names == ("a", "b")


def test_a_folder_with_a_split_of_its_own_keeps_it(tmp_path: Path):
    for side, number in (("train", 6), ("val", 3)):
        paint(tmp_path / side / "a", 10, number)
        paint(tmp_path / side / "b", 99, number)
    sides = read(tmp_path)
    assert (len(sides.train), len(sides.held_out)) == (12, 6)
    paint(tmp_path / "val" / "c", 50, 1)
    with pytest.raises(DataError, match="has the class 'c', which the training images have not"):
        read(tmp_path)


def test_a_folder_without_classes_and_a_broken_image_are_named(tmp_path: Path):
    paint(tmp_path / "a", 10, 3)
    with pytest.raises(DataError, match="has images in 1 sub-folders; at least two classes"):
        read(tmp_path)
    paint(tmp_path / "b", 10, 3)
    (tmp_path / "b" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1\.png: no image that can be read"):
        read(tmp_path)
