"""`quest data`: lists the built-in corpora or the forms of rows, or summarizes a data source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llm_quest.data.conversation_forms import RowForm
from llm_quest.data.corpus import BUILTIN_CORPORA, Corpus, load_corpus
from llm_quest.data.document import DropReport
from llm_quest.data.image_folder import find_sides, list_labeled_folder
from llm_quest.data.image_labels import LabelOptions, encode_labels
from llm_quest.data.images import load_image
from llm_quest.data.records import Record, TrackedRow, parse_rows
from llm_quest.data.row_forms import ROW_FORMS, describe_forms, select_form
from llm_quest.data.sources import DataSource, iter_sources
from llm_quest.data.text_classification import collect_label_names
from llm_quest.errors import UsageError
from llm_quest.progress import track
from llm_quest.recipes.yaml_io import read_yaml


@dataclass(frozen=True)
class CorpusList:
    """The parts of the built-in corpus on this version of Python."""

    parts: tuple[Corpus, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [part.as_json() for part in self.parts]

    def lines(self) -> list[str]:
        result = [f"{part.name:<20}{len(part.documents):>6,} documents {part.nbytes:>12,} bytes" for part in self.parts]
        return [
            *result,
            f"from Python {self.parts[0].python} (PSF license); another version of Python gives another text",
            "combine parts (builtin:topics,docstrings), or give a file or folder of your own: quest data SOURCE",
        ]


def list_builtin_corpora() -> CorpusList:
    """All built-in corpora, loaded and counted."""
    return CorpusList(tuple(load_corpus(f"builtin:{part}") for part in BUILTIN_CORPORA))


def load_source(source: str, *, column: str = "text", separator: str | None = None) -> Corpus:
    """A data source, with the counts of what was dropped and why."""
    return load_corpus(source, columns={"text": column}, separator=separator)


@dataclass(frozen=True)
class RowFormList:
    """The forms of rows that each recipe reads."""

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"recipe": recipe, "form": form.name, "keys": form.keys, "optional": form.optional, "example": form.example}
            for recipe, forms in ROW_FORMS.items()
            for form in forms
        ]

    def lines(self) -> list[str]:
        return describe_forms()


@dataclass(frozen=True)
class RowSummary:
    """The rows of a source that a recipe would read, by form, and those that it would leave out."""

    source: str
    recipe: str
    forms: dict[str, int]
    drop_report: DropReport

    def as_json(self) -> dict[str, Any]:
        return {"source": self.source, "recipe": self.recipe, "forms": self.forms, **self.drop_report.row_facts()}

    def lines(self) -> list[str]:
        counted = [f"{count:>9,} rows: {form}" for form, count in self.forms.items()]
        return [
            f"{self.source}, as quest train {self.recipe} reads it",
            *counted,
            *self.drop_report.summary_lines(),
        ]


@dataclass(frozen=True)
class ImageSummary:
    """The images of a folder that `quest train vit` would read, by label and part, and those that it leaves out."""

    source: str
    labels: dict[str, dict[str, int]]
    images: dict[str, int]
    drop_report: DropReport

    def as_json(self) -> dict[str, Any]:
        counted = {"images": self.images, "labels": self.labels}
        return {"source": self.source, "recipe": "vit", **counted, **self.drop_report.row_facts()}

    def lines(self) -> list[str]:
        result = [f"{self.source}, as quest train vit reads it"]
        for part, labels in self.labels.items():
            result += [f"{self.images[part]:>9,} images: {part}"]
            result += [f"{count:>13,} {label}" for label, count in labels.items()]
        return [*result, *self.drop_report.summary_lines()]


def summarize_images(source: str, columns: Mapping[str, str] | None = None) -> ImageSummary:
    """List a folder of labeled images as `quest train vit` does, and open every image: a broken one is an error."""
    report, options = DropReport(), LabelOptions(columns=columns or {})
    learned, held_out = find_sides(Path(source))
    images = list_labeled_folder(learned, report, options)
    parts = {"to train on" if held_out else "a part of them is held out": images}
    known = collect_label_names(images)
    if held_out is not None:
        parts["held out"] = list_labeled_folder(held_out, report, options, known)
        encode_labels(parts["held out"], known, is_multi_label=True)  # a label that is not known is an error
    for one in track([image for part in parts.values() for image in part], "opening images"):
        load_image(one.file)
    counts = {
        part: Counter(label for image in images_of_part for label in image.labels)
        for part, images_of_part in parts.items()
    }
    labels = {part: {name: count[name] for name in known} for part, count in counts.items()}
    return ImageSummary(source, labels, {part: len(images_of_part) for part, images_of_part in parts.items()}, report)


def parse_columns(text: str | None) -> dict[str, str]:
    """data.columns as the command line gives it. UsageError for anything but a mapping of names to names."""
    settings = read_yaml(text or "{}", "--columns")
    given = settings.tree
    if settings.problems or not all(isinstance(one, str) for pair in given.items() for one in pair):
        raise UsageError(
            f"--columns {text!r}: give keys and columns, such as '{{prompt: question, completion: reply}}'"
        )
    return given


def summarize_rows(source: str, recipe: str, columns: Mapping[str, str] | None = None) -> RowSummary | ImageSummary:
    """Read every row of a source as a recipe does, without a model; for vit, a folder of images. columns: see
    `map_columns`. UsageError for a recipe that reads neither."""
    if recipe == "vit":
        return summarize_images(source, columns)
    forms = next((forms for names, forms in ROW_FORMS.items() if recipe in names.split(", ")), None)
    if forms is None:
        known = ", ".join(ROW_FORMS)
        raise UsageError(f"{recipe} reads no rows of a known form; known: {known}")
    report, counts = DropReport(), Counter[str]()
    records = iter_sources([DataSource(source)], report, columns=columns)
    parse_rows(records, partial(count_form, forms, counts), report)
    report.require_rows(counts.total(), source)
    return RowSummary(source, recipe, dict(counts), report)


def count_form(forms: Sequence[RowForm], counts: Counter[str], record: Record) -> None:
    """Parse a row by its form, and count it."""
    row = TrackedRow.wrap(record.row)
    form = select_form(forms, row, record.where)
    form.parse(row, record.where)
    for key in form.optional:
        row.get(key)
    counts[form.name] += 1
