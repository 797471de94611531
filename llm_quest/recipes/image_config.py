"""Schemas that the image recipes share: the images, their pixels, and the augmentation of training images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_quest.data.images import ImageProcessor
from llm_quest.recipes.config import hold_nothing_out
from llm_quest.recipes.config_schema import BatchedConfig, NonNegativeInt, PositiveInt
from llm_quest.recipes.schema import LocalPath, StrictModel

EvalFraction = Annotated[float, Field(ge=0, lt=0.9)]


class VisionConfig(BatchedConfig):
    """Keys of every image recipe."""

    micro_batch_size: PositiveInt | None = Field(default=None, description="images at once on each process; null: all")

    compile: bool = Field(default=False, description="compile the model; repays itself in long runs")
    eval_steps: NonNegativeInt = Field(default=0, description="steps between evaluations; 0: only at the end")


class AugmentConfig(StrictModel):
    """Random variation of training images; 0 and false: none."""

    rotation_degrees: float = Field(default=0.0, ge=0, le=180, description="degrees")
    scale: float = Field(default=0.0, ge=0, lt=1, description="part of the size")
    translate: float = Field(default=0.0, ge=0, lt=1, description="part of the side")
    horizontal_flip: bool = Field(default=False, description="left and right")
    random_erasing: float = Field(default=0.0, ge=0, lt=1, description="a square of this part of the side")


class ImageDataConfig(StrictModel):
    """The images of a run and their normalization: (brightness 0..1 - mean) / std for each channel."""

    source: Literal["digits", "folder", "cifar10"] = Field(
        default="digits", description="digits come with scikit-learn"
    )
    path: LocalPath | None = Field(
        default=None,
        description="of folder (a sub-folder for each class, or metadata.jsonl or .csv with file_name and label or "
        "labels) and cifar10 (its binary version)",
    )
    image_size: PositiveInt | None = Field(
        default=None, description="pixels of a side; null: those of the source (digits 8, cifar10 32) or of model.load"
    )
    image_mean: tuple[float, ...] | None = Field(
        default=None, description="null: as model.load's folder says; without one, of digits 0, otherwise 0.5"
    )
    image_std: tuple[float, ...] | None = Field(
        default=None, description="null: as model.load's folder says; without one, of digits 0.4, otherwise 0.5"
    )
    held_out: EvalFraction = Field(
        default=0.2, description="the part that is never trained on; 0: none; cifar10 has its own"
    )
    stratify: bool = Field(default=True, description="hold out the same share of each class; false: of all images")
    validation: LocalPath | None = Field(
        default=None, description="of folder: another such folder to evaluate on, in place of a part of path"
    )
    columns: dict[str, str] = Field(
        default={}, description="of metadata.jsonl or .csv: key (file_name, label, labels) -> the column that holds it"
    )
    label_separator: str | None = Field(
        default=None, min_length=1, description="splits a label of text into several, such as ; (multi-label)"
    )
    augment: AugmentConfig = AugmentConfig()

    hold_nothing_out = model_validator(mode="before")(hold_nothing_out)

    @model_validator(mode="after")
    def check_channels(self) -> ImageDataConfig:
        if (channels := self.channels) is not None:
            ImageProcessor(1, self.image_mean or (0.5,) * channels, self.image_std or (0.5,) * channels)
        return self

    @property
    def channels(self) -> int | None:
        """The number of channels, which the means or deviations tell; None without them."""
        numbers = self.image_mean or self.image_std
        return None if numbers is None else len(numbers)

    @model_validator(mode="after")
    def check_folder(self) -> ImageDataConfig:
        if (self.path is None) != (self.source == "digits"):
            raise ValueError(f"source {self.source} {'needs a path' if self.path is None else 'takes no path'}")
        if self.validation is not None and self.source != "folder":
            raise ValueError(f"validation is a folder beside source=folder; source {self.source} has its own split")
        if unknown := [key for key in self.columns if key not in ("file_name", "label", "labels")]:
            raise ValueError(f"columns names the key {unknown[0]!r}; the keys are file_name, label and labels")
        if (self.columns or self.label_separator) and self.source != "folder":
            raise ValueError(f"columns and label_separator are for source=folder, not for {self.source}")
        return self
