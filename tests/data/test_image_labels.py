"""Labels of images in metadata.jsonl and metadata.csv, as the imagefolder of `datasets` reads them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm_quest.data.document import DropReport
from llm_quest.data.image_datasets import ImageSplits
from llm_quest.data.image_folder import load_image_folder
from llm_quest.data.image_labels import LabelOptions
from llm_quest.data.images import ImageProcessor
from llm_quest.errors import DataError


def paint(folder: Path, rows: list[dict[str, Any]]) -> None:
    """An image for each row, each with a brightness of its own."""
    for number, row in enumerate(rows):
        file = folder / row["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 7), number, dtype=np.uint8)).save(file)


def read(folder: Path, report: DropReport | None = None, held_out: float = 0.0, **options: Any) -> ImageSplits:
    return load_image_folder(
        folder, ImageProcessor(8), held_out, report or DropReport(), options=LabelOptions(**options)
    )


SEVERAL: list[dict[str, Any]] = [
    {"file_name": "a/0.png", "labels": ["cat", "dog"]}, {"file_name": "b 1.png", "labels": []},
    {"file_name": "a/2.png", "labels": ["dog"]}, {"file_name": "a/3.png", "labels": ["bird", "cat", "dog"]},
]  # fmt: skip


def labels_of(side: Any) -> list[tuple[str, ...]]:
    """The labels of each image, in the order of its brightness."""
    order = np.argsort(side.pixels.mean(axis=(1, 2, 3)))
    return [side.label_names(index) for index in order]


def test_several_labels_of_an_image_or_none(tmp_path: Path) -> None:
    paint(tmp_path, SEVERAL)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SEVERAL))
    report = DropReport()
    side = read(tmp_path, report).train
    assert side.names == ("bird", "cat", "dog")
    assert labels_of(side) == [tuple(row["labels"]) for row in SEVERAL]
    assert side.label_counts == [1, 2, 3]
    assert report.kept[0] == 4
    assert not report.dropped


@pytest.mark.parametrize("separator", [None, ";"])
def test_a_table_of_comma_separated_values(tmp_path: Path, separator: str | None) -> None:
    """With one label of each image, whole numbers in the order of their value; with several in one cell."""
    rows = [
        {"file_name": f"{number}.png", "tag": f"{number};{number + 1}" if separator else number} for number in range(11)
    ]
    paint(tmp_path, rows)
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "tag"])
        writer.writeheader()
        writer.writerows(rows)
    side = read(tmp_path, columns={"label": "tag"}, label_separator=separator).train
    assert side.names == tuple(map(str, range(12 if separator else 11)))
    assert side.is_multi_label == bool(separator)
    assert labels_of(side) == [(str(n), str(n + 1)) if separator else (str(n),) for n in range(11)]


def test_what_cannot_be_used_is_counted_with_its_line(tmp_path: Path) -> None:
    good = [{"file_name": f"{n}.png", "label": "ab"[n % 2]} for n in range(4)]
    paint(tmp_path, [*good, {"file_name": "unnamed.png"}])
    (tmp_path / "notes.png").write_text("no image")
    bad = [
        {"file_name": "gone.png", "label": "a"}, {"file_name": "notes.png", "label": "a"}, {"label": "a"},
        {"file_name": "0.png"}, {"file_name": "1.png", "label": {"a": 1}},
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, *bad]))
    report = DropReport()
    side = read(tmp_path, report).train
    assert len(side) == 4
    assert report.skipped.total() == 5
    assert [row.split(": ")[0].rpartition(":")[2] for row in report.skipped_rows] == ["5", "6", "7", "8", "9"]
    assert report.dropped["images that metadata.jsonl does not name"][0] == 2  # unnamed.png; notes.png ends as one


def test_the_table_of_the_other_side_has_no_classes_of_its_own(tmp_path: Path) -> None:
    for side, labels in (("train", ["a", "b"]), ("val", ["b", "c"])):
        rows = [{"file_name": f"{n}.png", "label": label} for n, label in enumerate(labels)]
        paint(tmp_path / side, rows)
        (tmp_path / side / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"val/metadata\.jsonl:2: has the label 'c', which the training images have not"
    ):
        read(tmp_path)


def test_equal_images_of_several_labels_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "labels": ["a"] if n % 2 else ["a", "b"]} for n in range(60)]
    paint(tmp_path, rows)
    for n in range(0, 60, 3):
        (tmp_path / f"{n}.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = DropReport()
    sides = read(tmp_path, report, held_out=0.3)
    both = {image.tobytes() for image in sides.train.pixels} & {image.tobytes() for image in sides.held_out.pixels}
    assert not both
    assert any("have other labels elsewhere" in note for note in report.notes)
